"""Labels of pictures: from the names of their folders, from a CSV file, or from columns of values."""

import csv
import io
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from maskdiff.errors import UserError

MOST_CLASSES = 100_000  # of an attribute: a column with more different values holds no classes
_NAME_COLUMNS = ("file_name", "filename", "file", "image_id", "image", "name", "path")


class Labels(NamedTuple):
    """The labels of a source's pictures."""

    names: dict[str, list[str]]  # A attributes, each with the names of its classes
    rows: np.ndarray  # [N, A] int32, -1 where missing

    @classmethod
    def none(cls, count: int) -> "Labels":
        return cls({}, np.empty((count, 0), np.int32))


def of_files(spec: str, names: Sequence[str]) -> Labels:
    """The labels of files by their names (with '/'). `spec`: auto, none, folders, FILE.csv or FILE.csv:COLUMN,COLUMN.

    auto: the first folder in which the names differ is a file's class, if every file lies in one.
    """
    if spec == "none":
        return Labels.none(len(names))
    if spec in ("auto", "folders"):
        parts = [[part for part in name.split("/")[:-1] if part != "."] for name in names]  # a tar has ./cats/1.png
        depth = len(os.path.commonprefix(parts)) if parts else 0
        folders = [part[depth] if len(part) > depth else None for part in parts]
        usable = None not in folders and len(set(folders)) > 1
        if usable:
            return from_columns({"class": (folders, None)})
        if spec == "auto":
            return Labels.none(len(names))
        raise UserError(
            "labels from folders need every picture in a folder, and two folders or more; give --labels none"
        )
    path, _, columns = spec.partition(".csv")
    if path != spec and (not columns or columns.startswith(":")):
        return _from_csv(Path(f"{path}.csv"), [column for column in columns[1:].split(",") if column], names)
    raise UserError(f"labels {spec!r} are not of files; give auto, none, folders, FILE.csv or FILE.csv:COLUMN,COLUMN")


def from_columns(columns: Mapping[str, tuple[Sequence[Any], Sequence[str] | None]]) -> Labels:
    """Labels from columns of values: {attribute: (one value for each picture, names of the classes or None)}.

    With names the values are their numbers; else each different value is a class, sorted, numbers by size. None, "" and
    NaN, and -1 where there are names, are missing labels. There must be a column. Raises UserError for what are no
    classes.
    """
    names: dict[str, list[str]] = {}
    rows = []
    for attribute, (values, classes) in columns.items():
        if classes is None:
            keys = (_key(attribute, value) for value in values)
            numbers = sorted({key for key in keys if key is not None}, key=_order)
            if not numbers:
                raise UserError(f"no picture has a label in {attribute!r}; give labels none")
            if len(numbers) > MOST_CLASSES:
                raise UserError(f"{attribute!r} has {len(numbers):,} different values: it holds no classes")
            of: dict[Any, int] = {key: number for number, key in enumerate(numbers)}
            ids = [of.get(_key(attribute, value), -1) for value in values]
            names[attribute] = [str(key) for key in numbers]
        else:
            ids = [_number(attribute, value, len(classes)) for value in values]
            names[attribute] = list(classes)
        rows.append(np.array(ids, np.int32))
    return Labels(names, np.stack(rows, 1))


def _key(attribute: str, value: Any) -> str | int | None:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or value == "" or value != value:
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, (int, str)):
        raise UserError(f"{attribute!r} holds {value!r}, a {type(value).__name__}: labels are whole numbers or texts")
    return value


def _order(key: str | int) -> tuple[int, int, str]:
    """Numbers by size, also those that are written as text; then texts."""
    text = str(key)
    number = text.removeprefix("-").isascii() and text.removeprefix("-").isdigit() and len(text) < 19
    return (0, int(text), text) if number else (1, 0, text)


def _number(attribute: str, value: Any, classes: int) -> int:
    if value is None or value == -1:
        return -1
    if not isinstance(value, (int, np.integer)) or not 0 <= value < classes:
        raise UserError(f"{attribute!r} holds {value!r}, and has names for 0 to {classes - 1}")
    return int(value)


def _from_csv(path: Path, wanted: list[str], names: Sequence[str]) -> Labels:
    """One row a file, the first line names the columns; files by their name, or by its end where that is unique."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"labels {str(path)!r} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UserError(f"labels {str(path)!r} are not UTF-8 text") from None
    first = text.partition("\n")[0]
    try:
        lines = list(csv.reader(io.StringIO(text, newline=""), delimiter="\t" if "\t" in first else ",", strict=True))
    except csv.Error as error:
        raise UserError(f"labels {str(path)!r} are no CSV: {error}") from None
    lines = [line for line in lines if line]
    if len(lines) < 2:
        raise UserError(f"labels {str(path)!r} hold no row; the first line names the columns")
    header = [cell.strip() for cell in lines[0]]
    if len(set(header)) < len(header):
        raise UserError(f"labels {str(path)!r} name a column twice")
    wrong = next((number for number, line in enumerate(lines) if len(line) != len(header)), None)
    if wrong is not None:
        raise UserError(
            f"labels {str(path)!r}: row {wrong} has {len(lines[wrong])} cells, the first line {len(header)}"
        )
    key = next((header.index(name) for name in _NAME_COLUMNS if name in header), 0)
    columns = wanted or [name for at, name in enumerate(header) if at != key]
    if missing := [name for name in columns if name not in header]:
        raise UserError(f"labels {str(path)!r} have no column {missing[0]!r}; there are {', '.join(header)}")
    if not columns:
        raise UserError(f"labels {str(path)!r} have no column beside {header[key]!r}")
    row_of: dict[str, list[str]] = {}
    for number, line in enumerate(lines[1:], 1):
        file = line[key].strip().replace("\\", "/").removeprefix("./")
        if not file or file in row_of:
            raise UserError(f"labels {str(path)!r}: row {number} names {f'{file!r} once more' if file else 'no file'}")
        row_of[file] = line
    ends = unique_ends(names)
    rows = [row_of.get(name) or row_of.get(end or name) for name, end in zip(names, ends, strict=True)]
    if not any(rows):
        raise UserError(f"labels {str(path)!r} name none of the pictures in their column {header[key]!r}")
    places = {name: header.index(name) for name in columns}
    return from_columns(
        {name: ([row[at].strip() if row else None for row in rows], None) for name, at in places.items()}
    )


def unique_ends(names: Sequence[str]) -> list[str]:
    """The last parts of names; "" for those that several have."""
    ends = [name.rsplit("/", 1)[-1] for name in names]
    seen = Counter(ends)
    return [end if seen[end] == 1 else "" for end in ends]
