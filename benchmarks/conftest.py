"""What the kernel benchmarks share: contestants in turns, a table, rows in JSON, another revision beside (--base).

    python -m pytest benchmarks/bench_noisy_patches.py [-k TEXT] [--base REF] [--save FILE] [--benchmark-json FILE]

A bench file has `build("case-implementation") -> (run, work, unit)`: run() does `work` (bytes, flops or images) once.
Its result is judged (judging.py) before anything is timed. The implementations of a case run in turns, each for some
20 ms a round; of a peer that cannot run here a line says why. gpu_kernels.py runs the same files on a GPU, with a
file's CUDA_PEERS beside. With --base the library of that git revision is built in a worktree, and runs every case of
our C++ in turns with this one. --save adds the rows (records.py) to a file, of which benchmarks/choices.py makes
kernels/choices.json.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import judging
import pytest
import records
import torch

from maskdiff import measure

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
ROUNDS = 15
LONG = 4.0  # seconds: a case whose rounds would take longer than this gets fewer, at least 3


@dataclass
class Table:
    """The lines that the terminal shows at the end."""

    lines: list[str] = field(default_factory=list)
    settled: list[str] = field(default_factory=list)  # the case that was run and thrown away
    machine: str = ""


class Revision:
    """A process that runs cases of bench files with the kernels of one tree."""

    def __init__(self, tree: Path, links: Path) -> None:
        links.mkdir()
        (links / "maskdiff_kernels").symlink_to(tree / "kernels")
        path = os.pathsep.join((str(links), os.environ.get("PYTHONPATH", "")))
        command = [sys.executable, str(ROOT / "benchmarks" / "worker.py"), str(tree)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
        )

    def seconds(self, bench: Path, case: str) -> float:
        """The time of one run of a case, from a round of about 20 ms."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps([str(bench), case]), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            pytest.skip("that revision cannot run this case")
        return float(answer)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--base", metavar="REF", help="git revision to build and to measure beside this one")
    parser.addoption("--save", metavar="FILE", type=Path, help="add the rows to a JSON file, under benchmarks/results/")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_TABLE] = Table()


_TABLE: pytest.StashKey[Table] = pytest.StashKey()


@pytest.fixture(scope="session")
def kept(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Keeps rows for the table, and in the file that --save names."""
    table, path, stamp = request.config.stash[_TABLE], request.config.getoption("--save"), records.stamp(CPU)
    table.machine = f"{stamp['card']}, {stamp['device']}, torch {torch.__version__}, commit {stamp['commit']}"
    saved = None if path is None else records.Records(path, stamp)

    def keep(rows: list[records.Row], *lines: str) -> None:
        table.lines += [*map(records.line, rows), *lines]
        if saved is not None:
            saved.add(*rows)

    return keep


@pytest.fixture(scope="session")
def base(request: pytest.FixtureRequest) -> Iterator[tuple[str, Path] | None]:
    """The --base revision: its short name, and a built worktree of it."""
    ref = request.config.getoption("--base")
    if ref is None:
        yield None
        return
    found = subprocess.run(
        ["git", "rev-parse", "--short=12", f"{ref}^{{commit}}"], cwd=ROOT, capture_output=True, text=True
    )
    if found.returncode:
        raise pytest.UsageError(f"--base: got {ref!r}, takes a git revision of this repository")
    with tempfile.TemporaryDirectory(prefix="maskdiff-base-") as folder:
        tree = Path(folder) / "tree"
        subprocess.run(
            ["git", "worktree", "add", "--quiet", "--detach", tree, found.stdout.strip()], cwd=ROOT, check=True
        )
        try:
            environment = {**os.environ, "MASKDIFF_BUILD_DIR": f"{folder}/build"}
            build = [sys.executable, "setup.py", "--quiet", "build_kernels", "--inplace"]
            subprocess.run(build, cwd=tree, env=environment, check=True, stdout=subprocess.DEVNULL)
            yield found.stdout.strip(), tree
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=ROOT, check=True)


@pytest.fixture(scope="session")
def revisions(
    base: tuple[str, Path] | None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Revision, ...]]:
    """Processes of this revision and of the --base one; none without --base."""
    links = tmp_path_factory.mktemp("links")
    trees = () if base is None else (ROOT, base[1])
    running = tuple(Revision(tree, links / str(i)) for i, tree in enumerate(trees))
    yield running
    for revision in running:
        revision.close()


@pytest.fixture
def in_turns(benchmark, kept, base, revisions, request: pytest.FixtureRequest) -> Callable[..., None]:
    """in_turns(build, case, implementations) times them in turns and keeps a row of each, if their results are right.

    Right is what the op's reference gives, or what `judge(name, result)` has nothing to say of.
    """
    settled = request.config.stash[_TABLE].settled

    def run(
        build: Callable,
        case: str,
        names: Sequence[str],
        fixed: dict[str, Any] | None = None,
        judge: judging.Judge | None = None,
    ) -> None:
        op = request.path.stem.removeprefix("bench_")
        ours = records.ours(op)
        fixed = fixed or records.fixed(op, case)
        calls, clock, failed = {}, measure.LongClock(), []
        says = judge or judging.by_reference(op, lambda name: build(f"{case}-{name}")[0])
        for name in names:
            try:
                calls[name], work, unit = build(f"{case}-{name}")
                result = calls[name]()
            except Exception as error:
                if name in ours:
                    raise
                failed.append(records.failed(fixed, name, True, f"{type(error).__name__}: {error}"))
                calls.pop(name, None)
                continue
            if said := says(name, result):
                pytest.fail(f"{name}: {said}", pytrace=False)
            del result
        del says  # with the results that it compares
        if not settled:  # seen: whatever runs first in a process takes twice its time for as long as its tensors live
            settled.append(case)
            measure.interleaved(calls, 5, CPU, clock=measure.LongClock())
            return run(build, case, names, fixed, judge)
        copy, copied = measure.memory_copy(CPU, 1 << 26)
        calls[records.COPY] = copy
        one_round = sum(max(clock.length, clock.once(call, CPU)) for call in calls.values())
        rounds, warm = max(3, min(ROUNDS, int(LONG / one_round))), 2 if one_round < 1 else 0
        samples = measure.interleaved(calls, rounds, CPU, clock=clock, warm=warm)
        peers = [name for name in names if name not in ours]
        rows = [*records.timed(fixed, samples, peers, {unit: work}, copied), *failed]
        lines = []
        if revisions and "cpp" in names:
            times = [[revision.seconds(request.path, f"{case}-cpp") for revision in revisions] for _ in range(ROUNDS)]
            low, middle, high = measure.quantiles([there / here for here, there in times])
            lines.append(f"{op} {case}  cpp: {middle:.3f}x as fast as {base[0]} ({low:.3f} to {high:.3f})")
            benchmark.extra_info["faster_than_base"] = {"base": base[0], "p20": low, "p50": middle, "p80": high}
        kept(rows, *lines)
        benchmark.extra_info["rows"] = rows
        benchmark.pedantic(calls[names[0]], rounds=1)

    return run


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    table = config.stash[_TABLE]
    if table.lines:
        terminalreporter.section(table.machine)
        for text in table.lines:
            terminalreporter.write_line(text)
