"""Tables with a column of pictures: Parquet files as Hugging Face lays them out, and data sets of its library."""

import importlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from maskdiff.errors import UserError, first_line
from maskdiff.packing.items import Broken, InFile, Item
from maskdiff.packing.labels import Labels, from_columns
from maskdiff.packing.reader import digest

_BATCH = 64  # rows read at a time
_PICTURES = ("image", "img", "picture", "png", "jpg", "jpeg", "webp")
_CLASSES = ("label", "labels", "class")


class ParquetReader:
    """Parquet files, one after the other: a column of binary, or of struct {bytes, path}."""

    kind = "parquet"

    def __init__(self, paths: Sequence[Path], label_spec: str, column: str | None, name: str) -> None:
        """Reads footers and labels. Raises UserError: a damaged file, differing columns, no column of pictures."""
        self._parquet = _library("pyarrow.parquet", "pyarrow", "parquet")
        self.name = name
        self.rejects: list[tuple[str, str]] = []
        self._paths = paths
        tables = [self._open(path) for path in paths]
        schema = tables[0].schema_arrow
        for path, table in zip(paths, tables, strict=True):
            if not table.schema_arrow.equals(schema):
                raise UserError(f"{str(path)!r} has other columns than {str(paths[0])!r}")
        self._rows_of = [table.metadata.num_rows for table in tables]
        self.count = sum(self._rows_of)
        if not self.count:
            raise UserError(f"no row in {str(paths[0])!r}")
        features = _features(schema.metadata)
        types = {field.name: str(field.type) for field in schema}
        self._column = _picture_column(types, features, column, str(paths[0]))
        self._in_struct = types[self._column].startswith("struct")

        def values(name: str) -> list:
            return [value for table in tables for value in self._column_of(table, name)]

        found = _labels(types, features, label_spec, self.count, values)
        self.labels, self.rows = found.names, found.rows
        status = [os.stat(path) for path in paths]
        marks = [f"{path.name} {one.st_size} {one.st_mtime_ns}" for path, one in zip(paths, status, strict=True)]
        self.fingerprint = digest([*marks, self._column])

    def names(self) -> Iterator[str]:
        for path, rows in zip(self._paths, self._rows_of, strict=True):
            yield from (f"{path.name}#{row}" for row in range(rows))

    def items(self, chosen: Sequence[int]) -> Iterator[Item]:
        wanted, first = iter(chosen), 0
        at = next(wanted, None)
        for path in self._paths:
            table = self._open(path)
            start = first
            for group in range(table.num_row_groups):
                rows = table.metadata.row_group(group).num_rows
                numbers = []
                while at is not None and at < first + rows:
                    numbers.append(at)
                    at = next(wanted, None)
                for number, content in self._contents(table, group, [number - first for number in numbers]):
                    row = first + number
                    yield Item(f"{path.name}#{row - start}", content, tuple(self.rows[row].tolist()))
                first += rows

    def _contents(self, table: Any, group: int, numbers: list[int]) -> Iterator[tuple[int, Any]]:
        """(number, content) of these rows of a row group; Broken from where the file is damaged."""
        done = 0
        try:
            first = 0
            if numbers:
                for batch in table.iter_batches(_BATCH, [group], [self._column], use_threads=False):
                    while done < len(numbers) and numbers[done] < first + len(batch):
                        value = batch.column(0)[numbers[done] - first].as_py()
                        yield numbers[done], self._content(value)
                        done += 1
                    first += len(batch)
            reason = "no such row"
        except (ValueError, OSError, MemoryError) as error:  # pyarrow's own are kinds of these
            reason = f"damaged: {first_line(error)}"
        for number in numbers[done:]:
            yield number, Broken(reason)

    def _content(self, value: Any) -> bytes | Broken:
        content = value.get("bytes") if self._in_struct and value else value
        return content if isinstance(content, bytes) else Broken("no bytes in the row")

    def _open(self, path: Path) -> Any:
        try:
            return self._parquet.ParquetFile(path, page_checksum_verification=True)
        except (ValueError, OSError, MemoryError) as error:
            raise UserError(f"{str(path)!r} is not a readable Parquet file: {first_line(error)}") from None

    def _column_of(self, table: Any, name: str) -> list:
        try:
            return table.read([name], use_threads=False).column(0).to_pylist()
        except (ValueError, OSError, MemoryError) as error:
            raise UserError(f"the labels {name!r} of {self.name!r} cannot be read: {first_line(error)}") from None


class HubReader:
    """A data set of the `datasets` library: hf:NAME, hf:NAME@CONFIG, hf:NAME:SPLIT; NAME may be a folder on disk."""

    kind = "hf"
    rejects: list[tuple[str, str]] = []

    def __init__(self, spec: str, label_spec: str, column: str | None) -> None:
        """Loads the data set. Raises UserError where that fails, or where it has no column of pictures."""
        library = _library("datasets", "datasets", "hf")
        loaded = _load(library, spec)
        self.name = re.sub(r"^.*/", "", spec.rstrip("/"))
        self.count = len(loaded)
        if not self.count:
            raise UserError(f"hf:{spec} has no row")
        features = {name: feature.to_dict() if hasattr(feature, "to_dict") else _plain(feature)
                    for name, feature in loaded.features.items()}  # fmt: skip
        types = {name: str(features[name].get("dtype", "")) for name in features}
        self._column = _picture_column(types, features, column, f"hf:{spec}")
        found = _labels(types, features, label_spec, self.count, lambda name: loaded.select_columns([name])[:][name])
        self.labels, self.rows = found.names, found.rows
        self.fingerprint = digest([loaded._fingerprint, self._column])
        pictures = loaded.select_columns([self._column])
        if features[self._column].get("_type") == "Image":
            pictures = pictures.cast_column(self._column, library.Image(decode=False))
        self._pictures = pictures

    def names(self) -> Iterator[str]:
        return (str(i) for i in range(self.count))

    def items(self, chosen: Sequence[int]) -> Iterator[Item]:
        for at in range(0, len(chosen), _BATCH):
            numbers = [int(number) for number in chosen[at : at + _BATCH]]
            for number, value in zip(numbers, self._pictures[numbers][self._column], strict=True):
                yield Item(str(number), _stored(value), tuple(self.rows[number].tolist()))


def _stored(value: Any) -> Any:
    if isinstance(value, bytes):
        return value
    if isinstance(value, Mapping):
        if isinstance(value.get("bytes"), bytes):
            return value["bytes"]
        if isinstance(value.get("path"), str):
            return InFile(value["path"])
    return Broken("no bytes in the row")


def _load(library: Any, spec: str) -> Any:
    name, _, split = spec.partition(":")
    name, _, config = name.partition("@")
    folder = Path(name)
    try:
        if any((folder / file).is_file() for file in ("state.json", "dataset_dict.json")):
            loaded = library.load_from_disk(name)
            if isinstance(loaded, library.DatasetDict):
                wanted = split or ("train" if "train" in loaded else next(iter(loaded)))
                if wanted not in loaded:
                    raise UserError(f"hf:{name} has no split {wanted!r}; there are {', '.join(loaded)}")
                return loaded[wanted]
            return loaded
        return library.load_dataset(name, config or None, split=split or "train")
    except UserError:
        raise
    except Exception as error:  # a library that asks a network, unpacks and converts: nearly anything
        raise UserError(f"cannot load hf:{spec} by the datasets library: {first_line(error)}") from None


def _plain(feature: Any) -> dict[str, Any]:
    names = getattr(feature, "names", None)
    return {"_type": type(feature).__name__, "dtype": getattr(feature, "dtype", ""), "names": names}


def _library(module: str, package: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(
            f"this data needs {package}, which is not installed; run: pip install {package} (or 'maskdiff[{extra}]')"
        ) from None


def _features(metadata: Mapping[bytes, bytes] | None) -> dict[str, dict[str, Any]]:
    """What Hugging Face says of the columns in a Parquet file's schema; {} where it says nothing sensible."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError):
        return {}


def _picture_column(types: Mapping[str, str], features: Mapping[str, Any], wanted: str | None, where: str) -> str:
    def holds_bytes(name: str) -> bool:
        kind = types[name]
        image = features.get(name, {}).get("_type") == "Image"
        return kind in ("binary", "large_binary") or image or ("struct" in kind and "bytes: binary" in kind)

    able = [name for name in types if holds_bytes(name)]
    if wanted is not None:
        if wanted not in able:
            raise UserError(f"{where} has no column {wanted!r} of pictures; it has {', '.join(able) or 'none'}")
        return wanted
    marked = [name for name in able if features.get(name, {}).get("_type") == "Image"]
    named = [name for name in able if name.lower() in _PICTURES]
    for found in (marked, named, able):
        if len(found) == 1:
            return found[0]
    many = f"several columns of pictures, {', '.join(able)}: name one" if able else "no column of pictures"
    raise UserError(f"{where} has {many}; its columns are {', '.join(types)}")


def _labels(
    types: Mapping[str, str],
    features: Mapping[str, Any],
    spec: str,
    count: int,
    values: Callable[[str], list],
) -> Labels:
    def classes(name: str) -> list[str] | None:
        feature = features.get(name, {})
        names = feature.get("names")
        good = feature.get("_type") == "ClassLabel" and isinstance(names, list) and names
        return names if good and all(isinstance(name, str) for name in names) else None

    if spec == "auto":
        wanted = [name for name in types if classes(name)] or [name for name in types if name.lower() in _CLASSES][:1]
    else:
        wanted = [] if spec == "none" else spec.split(",")
    if missing := [name for name in wanted if name not in types]:
        raise UserError(f"there is no column {missing[0]!r} of labels; there are {', '.join(types)}")
    if not wanted:
        return Labels.none(count)
    return from_columns({name: (values(name), classes(name)) for name in wanted})


def parquet_files(folder: Path) -> list[Path]:
    """The Parquet files right in a folder or in its folder `data`; where names tell splits apart, those of `train`."""
    found = sorted(folder.glob("*.parquet")) or sorted((folder / "data").glob("*.parquet"))
    train = [path for path in found if path.name.startswith("train")]
    if train and len(train) < len(found):
        print(f"{folder}: of {len(found)} Parquet files the {len(train)} of the split train are taken", file=sys.stderr)
    return train or found
