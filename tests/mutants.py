"""`make mutants`: plants small faults one at a time in a copy of the tree; the tests that are named must notice each.

    python tests/mutants.py [--only TEXT] [--list]

A fault that no test notices has survived: exit status 1. So it is where an old text is not found exactly once, or where
its source does not compile: such a fault proves nothing. Without --only, the faults that tests/emulation plants by
itself, in CUDA kernels that run in the emulator, are planted too.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from planted_faults import EMULATED_FAULTS, MUTANTS, Mutant

ROOT = Path(__file__).resolve().parents[1]
COPIED = (
    "csrc",
    "kernels",
    "maskdiff",
    "tests",
    "benchmarks",
    "CMakeLists.txt",
    "pyproject.toml",
    "setup.py",
    "README.md",
)
TIMEOUT = 600  # seconds for the tests of one fault; a fault that makes them hang is noticed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="faults whose file or text contains TEXT")
    parser.add_argument("--list", action="store_true", help="show the faults and end")
    options = parser.parse_args()
    chosen = [m for m in MUTANTS if options.only in m.file or options.only in m.old]
    if options.list:
        print("\n".join(describe(mutant) for mutant in chosen))
        return 0
    misplaced = [m for m in chosen if (ROOT / m.file).read_text().count(m.old) != 1]
    for mutant in misplaced:
        print(f"not found exactly once: {describe(mutant)}")
    if misplaced:
        return 1
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = Tree(Path(folder))
        return plant_all(tree, chosen) or (0 if options.only else plant_emulated(tree))


def describe(mutant: Mutant) -> str:
    first, second = (" ".join(text.split()) or "nothing" for text in (mutant.old, mutant.new))
    return f"{mutant.file}: {first} -> {second}"


class Tree:
    """A copy of the sources with a build of its own, which imports of the tests find before any other."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "tree"
        self.root.mkdir()
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, self.root / name, ignore=shutil.ignore_patterns("__pycache__", "lib"))
            else:
                shutil.copy(source, self.root / name)
        links = folder / "links"
        links.mkdir()
        (links / "maskdiff").symlink_to(self.root / "maskdiff")
        (links / "maskdiff_kernels").symlink_to(self.root / "kernels")
        self.environment = os.environ | {
            "PYTHONPATH": str(links),
            "PYTHONDONTWRITEBYTECODE": "1",  # a cache may vouch for a mutated file of the same size and second
            "MASKDIFF_BUILD_DIR": str(folder / "objects"),
            "MASKDIFF_CUDA": "0",
        }
        self.built: dict[Path, bytes] = {}

    def build(self) -> str:
        """Compiles what changed since the last build; the compiler's words where that fails."""
        now = {path: path.read_bytes() for path in sorted((self.root / "csrc").rglob("*.*"))}
        if now == self.built:
            return ""
        command = [sys.executable, "setup.py", "--quiet", "build_kernels", "--inplace"]
        done = subprocess.run(command, cwd=self.root, env=self.environment, capture_output=True, text=True)
        self.built = now if done.returncode == 0 else {}
        return "" if done.returncode == 0 else done.stdout + done.stderr

    def test(self, *arguments: str) -> tuple[bool, str]:
        """Whether the tests pass, and what they say."""
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", *arguments]
        try:
            done = subprocess.run(
                command, cwd=self.root, env=self.environment, capture_output=True, text=True, timeout=TIMEOUT
            )
        except subprocess.TimeoutExpired:
            return False, f"no end within {TIMEOUT} s"
        # 1: tests failed; below 0: they crashed; all else (a name of no test, say) is a fault of the list
        if done.returncode > 1:
            raise SystemExit(f"error: {' '.join(command)} ended with {done.returncode}\n{done.stdout}{done.stderr}")
        return done.returncode == 0, done.stdout


def plant_all(tree: Tree, mutants: list[Mutant]) -> int:
    print("building the copy, and running the named tests on it as it is", flush=True)
    if failure := tree.build():
        print(failure)
        return 1
    where = "import maskdiff_kernels as k; print(k.__file__)"
    found = subprocess.run([sys.executable, "-c", where], env=tree.environment, capture_output=True, text=True).stdout
    if not Path(found.strip()).resolve().is_relative_to(tree.root.resolve()):
        print(f"error: the tests would import {found.strip()}, not the copy in {tree.root}")
        return 1
    for tests in dict.fromkeys(mutant.tests for mutant in mutants):
        passed, output = tree.test(*tests)
        if not passed:
            print(f"{output}\nerror: {' '.join(tests)} fails without a fault")
            return 1
    results = []
    for number, mutant in enumerate(mutants, 1):
        start = time.monotonic()
        results.append(plant(tree, mutant))
        took = f"{time.monotonic() - start:5.1f} s"
        print(f"{number:3}/{len(mutants)}  {results[-1]:14}  {took}  {describe(mutant)}", flush=True)
    print(f"\n{results.count('killed')} of {len(results)} killed, {results.count('SURVIVED')} survived")
    return 0 if set(results) == {"killed"} else 1


def plant(tree: Tree, mutant: Mutant) -> str:
    path = tree.root / mutant.file
    sound = path.read_text()
    path.write_text(sound.replace(mutant.old, mutant.new))
    try:
        if tree.build():
            return "DOES NOT BUILD"
        return "SURVIVED" if tree.test(*mutant.tests)[0] else "killed"
    finally:
        path.write_text(sound)


def plant_emulated(tree: Tree) -> int:
    """Runs the tests of tests/emulation that plant one fault each and fail where the emulator does not notice it."""
    passed, output = tree.test("tests/emulation", "-k", EMULATED_FAULTS, "-rA")
    print("\n".join(line for line in output.splitlines() if line.startswith(("PASSED", "FAILED", "SKIPPED"))))
    survived, killed = output.count("\nFAILED "), output.count("\nPASSED ")
    print(f"\n{killed} of {killed + survived} faults in emulated kernels killed, {survived} survived")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
