"""`python benchmarks/choices.py ROWS.json [...] [--write]` makes kernels/choices.json of measured rows.

For every device and op that the rows speak of it takes the fastest of the op's backends that need no optional package;
for attention at every length that was measured. One that computed something wrong in any case is none of them. Entries
of other devices and ops stay. A table has one entry for all cards of a kind ("cuda:9.0"): rows must be one card's, and
an op's of one revision. Without --write it only shows what it would write.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import records
from records import Row

from maskdiff_kernels import dispatch

TABLE = Path(dispatch.__file__).parent / "choices.json"
OPTIONAL = ("apex", "xformers")  # another machine with such a card may lack them
MARGIN = 1.03  # how much faster another implementation must be, than that of the lengths before, to be changed to


def fastest(rows: list[Row], before: str | None = None) -> str | None:
    """The implementation with the least geometric mean over the cases; None where none ran any.

    One that ran fewer cases than another is no choice: it may be unable to run the rest. `before`, if it is among
    those left, stays unless another one is faster by MARGIN.
    """
    times: dict[str, dict[tuple, float]] = {}
    for row in rows:
        if row["ms"]:
            times.setdefault(row["implementation"], {})[row["case"], row["dtype"]] = row["ms"]["p50"]
    most = max(map(len, times.values()), default=0)
    able = {name: cases for name, cases in times.items() if len(cases) == most}
    shared = set.intersection(*map(set, able.values())) if able else set()
    if not shared:
        return None
    means = {name: math.fsum(math.log(cases[key]) for key in shared) / len(shared) for name, cases in able.items()}
    best = min(means, key=lambda name: means[name])
    return before if before in means and means[before] <= means[best] + math.log(MARGIN) else best


def by_length(rows: list[Row]) -> str | list[list[Any]] | None:
    """A name, or [most tokens, name] pairs: forward + backward at each longest sequence that was measured."""
    lengths: dict[int, list[Row]] = {}
    for row in rows:
        if row["shape"]["backward"]:
            lengths.setdefault(row["shape"]["longest"], []).append(row)
    pairs: list[list[Any]] = []
    for length in sorted(lengths):
        name = fastest(lengths[length], pairs[-1][1] if pairs else None)
        if name is None:
            continue
        if pairs and pairs[-1][1] == name:
            pairs[-1][0] = length
        else:
            pairs.append([length, name])
    if not pairs:
        return None
    pairs[-1][0] = None
    return pairs if len(pairs) > 1 else pairs[0][1]


def chosen(rows: list[Row]) -> dict[str, dict[str, Any]]:
    """The entries for every device and op that rows of the op's backends speak of.

    Raises ValueError where a device's rows are of several cards, or an op's of several revisions.
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    cards: dict[str, str] = {}
    for row in rows:
        if row["implementation"] in records.ours(row["op"]) and row["implementation"] not in OPTIONAL:
            groups.setdefault((row["device"], row["op"]), []).append(row)
            card = cards.setdefault(row["device"], row["card"])
            if row["card"] != card:
                raise ValueError(f"{row['device']}: got rows of {card} and {row['card']}, takes one card's")
    table: dict[str, dict[str, Any]] = {}
    for (device, op), group in groups.items():
        revisions = {tuple(str(row.get(key)) for key in records.CODE) for row in group}
        if len(revisions) > 1:
            found = ", ".join("/".join(revision) for revision in sorted(revisions))
            raise ValueError(f"{device} {op}: got rows of revisions {found}, takes one's: measure it anew")
        wrong = {row["implementation"] for row in group if row.get("wrong")}
        group = [row for row in group if row["implementation"] not in wrong]
        entry = by_length(group) if op in dispatch.BY_LENGTH else fastest(group)
        if entry is not None:
            table.setdefault(device, {})[op] = entry
    return table


def text(table: dict[str, dict[str, Any]]) -> str:
    """As JSON, an op a line."""
    devices = []
    for device, entries in table.items():
        lines = ",\n".join(f"    {json.dumps(op)}: {json.dumps(entry)}" for op, entry in entries.items())
        devices.append(f"  {json.dumps(device)}: {{\n{lines}\n  }}")
    return "{\n" + ",\n".join(devices) + "\n}\n"


def main(arguments: list[str] | None = None, table: Path = TABLE) -> int:
    parser = argparse.ArgumentParser(prog="python benchmarks/choices.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("rows", nargs="+", type=Path, help="files that gpu_kernels.py or pytest --save wrote")
    parser.add_argument("--write", action="store_true", help="rewrite kernels/choices.json")
    options = parser.parse_args(arguments)
    try:
        new = chosen([row for path in options.rows for row in records.read(path)])
        choices = json.loads(table.read_text())
        for device, entries in new.items():
            for op, entry in entries.items():
                print(f"{device} {op}: {json.dumps(choices.get(device, {}).get(op))} -> {json.dumps(entry)}")
            choices[device] = {**choices.get(device, {}), **entries}
        dispatch.read_table(text(choices))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.write:
        table.write_text(text(choices))
    return 0


if __name__ == "__main__":
    sys.exit(main())
