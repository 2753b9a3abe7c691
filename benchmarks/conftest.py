"""What the kernel benchmarks share: a table of rates, and the comparison with another revision (--base).

    python -m pytest benchmarks/bench_noisy_patches.py [-k TEXT] [--base REF] [--choose] [--benchmark-json FILE]

A bench file has `build(case) -> (run, work, unit)`: run() does `work` (bytes or images) once. With --base the library
of that git revision is built in a worktree; this revision and that one then run every case of ours in turns. --choose
writes the fastest implementation of each op measured into kernels/choices.json, for this processor's instruction set.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

import maskdiff_kernels as mk

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 15  # of each revision, in turns


@dataclass
class Table:
    """The rows that the terminal shows at the end."""

    rows: list[tuple[str, str, str]] = field(default_factory=list)
    seconds: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)  # by op, implementation, case
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
    parser.addoption(
        "--choose", action="store_true", help="write the fastest implementations into kernels/choices.json"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_TABLE] = Table()


_TABLE: pytest.StashKey[Table] = pytest.StashKey()


@pytest.fixture(scope="session")
def table(request: pytest.FixtureRequest) -> Table:
    result = request.config.stash[_TABLE]
    result.machine = f"{_processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    return result


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
def measure(
    benchmark, table: Table, base, revisions, request: pytest.FixtureRequest
) -> Callable[[Callable, str], None]:
    """measure(build, case) times the case and adds a row; cases of our own kernels are compared with --base."""

    def run(build: Callable, case: str) -> None:
        once, work, unit = build(case)
        once()
        benchmark(once)
        median, op = benchmark.stats.stats.median, request.path.stem.removeprefix("bench_")
        name, how = case.rsplit("-", 1)
        table.seconds.setdefault(op, {}).setdefault(how, {})[name] = median
        rate = work / median
        shown = f"{rate / 1e9:.2f} GB/s" if unit == "bytes" else f"{rate:,.0f} {unit}/s"
        benchmark.extra_info[f"{unit}_per_s"] = rate
        ratio = ""
        if revisions and how == "cpp":
            times = [[revision.seconds(request.path, case) for revision in revisions] for _ in range(ROUNDS)]
            ratios = sorted(there / here for here, there in times)
            low, middle, high = (ratios[int(share * (ROUNDS - 1))] for share in (0.2, 0.5, 0.8))
            ratio = f"{middle:.3f}x as fast as {base[0]} ({low:.3f} to {high:.3f})"
            benchmark.extra_info["faster_than_base"] = {"base": base[0], "p20": low, "p50": middle, "p80": high}
        table.rows.append((f"{op} {case}", shown, ratio))

    return run


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    seconds = session.config.stash[_TABLE].seconds
    if session.config.getoption("--choose") and exitstatus == 0:
        write_choices(seconds, ROOT / "kernels" / "choices.json")


def write_choices(seconds: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    """For each op the implementation of ours with the least geometric mean over the cases that all of them ran."""
    choices = json.loads(path.read_text())
    for op, measured in seconds.items():
        ours = {how: cases for how, cases in measured.items() if how in mk.backends(op)}
        if not ours:
            continue
        shared = set.intersection(*map(set, ours.values()))
        means = {how: math.fsum(math.log(cases[name]) for name in shared) for how, cases in ours.items()}
        choices.setdefault(f"cpu:{mk.cpu_level()}", {})[op] = min(means, key=lambda how: means[how])
    path.write_text(json.dumps(choices, indent=2) + "\n")


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    table = config.stash[_TABLE]
    if not table.rows:
        return
    terminalreporter.section(f"rates: {table.machine}")
    width = max(len(name) for name, _, _ in table.rows)
    for name, shown, ratio in table.rows:
        terminalreporter.write_line(f"{name:<{width}}  {shown:>20}  {ratio}".rstrip())


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown processor"
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), "unknown processor")
