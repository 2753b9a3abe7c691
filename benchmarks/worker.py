"""Runs cases of bench files for benchmarks/conftest.py: reads [file, case] lines, answers the seconds of one run."""

import importlib.util
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import maskdiff_kernels

ROUND = 0.02  # seconds


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def timed(run: Callable[[], None], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def main() -> None:
    tree = Path(sys.argv[1]).resolve()
    assert Path(maskdiff_kernels.__file__).resolve().parent == tree / "kernels", "another revision was imported"
    cases: dict[tuple[str, str], tuple[Callable[[], None], int]] = {}
    for line in sys.stdin:
        file, case = json.loads(line)
        if (file, case) not in cases:
            run = load(file).build(case)[0]
            timed(run, 3)
            cases[file, case] = run, max(1, round(ROUND / timed(run, 3)))
        print(timed(*cases[file, case]), flush=True)


if __name__ == "__main__":
    main()
