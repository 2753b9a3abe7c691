"""What the benchmarks of whole steps on a CPU share: their options, how they begin, and their JSON."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from maskdiff import measure, precision

CPU = torch.device("cpu")


def read(doc: str, rates: str, rounds: int, of: str) -> argparse.Namespace:
    """The options; `doc` is the module's, `rates` and `rounds` are defaults, `of` says what there are rounds of."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("--preset", default="celeba64")
    parser.add_argument("--batch", type=int, default=8, help="images a step (default 8)")
    parser.add_argument("--rates", default=rates, help=f"mask rates (default {rates})")
    parser.add_argument("--rounds", type=int, default=rounds, help=f"{of} of each form (default {rounds})")
    parser.add_argument("--precision", default="auto", help="auto, bf16 or fp32")
    parser.add_argument("--json", type=Path, help="file for all figures")
    return parser.parse_args()


def begin(options: argparse.Namespace) -> torch.dtype:
    """Settles memory and precision, and says what is measured where."""
    precision.keep_freed_memory()
    dtype = precision.resolve_precision(options.precision, CPU)
    name = str(dtype).removeprefix("torch.")
    print(f"{options.preset}, batch {options.batch}, {name}, {measure.machine(CPU)['processor']}")
    return dtype


def mask(rate: float) -> str:
    """As a stage names it."""
    return f"patch:{rate:g}" if rate else "dense"


def save(options: argparse.Namespace, dtype: torch.dtype, rows: list[dict[str, Any]], **more: Any) -> None:
    """Writes --json, where it is given."""
    if options.json:
        result = {"machine": measure.machine(CPU), "commit": measure.commit(), "preset": options.preset}
        result |= {"batch": options.batch, "dtype": str(dtype).removeprefix("torch."), "rounds": options.rounds, **more}
        options.json.write_text(json.dumps(result | {"rows": rows}, indent=1) + "\n")
