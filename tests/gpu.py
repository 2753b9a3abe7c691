"""`python tests/gpu.py` (make gpu-test): what has to hold on a machine with a GPU, in order, with a summary.

The CUDA library is built for the GPU present, unless a fresh one is there; every wrapper of ptx.cuh is held to the PTX
ISA's tables; then the op tests run on CUDA tensors, steps are captured as CUDA graphs, and the kernels run under
compute-sanitizer, where tool and driver allow it. Needs PyTorch, NumPy, pytest, CMake and nvcc, and maskdiff_kernels on
the path; nothing is installed.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from maskdiff_kernels import dispatch, library
from maskdiff_kernels.source_version import LIBRARIES

ROOT = Path(__file__).resolve().parents[1]
EMULATION = ROOT / "tests" / "emulation"
SANITIZED = {
    "attention_cases.py": ("short", "half", "three", "middle", "ragged", "strided", "nine"),
    "visible_cases.py": ("odd", "fours", "ragged-odd", "slots", "long", "turns"),
    "adamw_cases.py": ("odd", "fours", "aligned", "chunks", "many", "not-due"),
}
FOUND = 99  # what compute-sanitizer ends with where it found something
REFUSALS = ("not supported", "Unable to", "LibraryNotLoaded", "error 999", "Failed to initialize")  # the driver's
OK, FAILED, NOT_RUN = "ok", "FAILED", "not run"


@dataclass
class Step:
    name: str
    result: str
    said: str
    seconds: float


class Session:
    """Runs steps until the time is up."""

    def __init__(self, minutes: float) -> None:
        self.end, self.steps = time.monotonic() + 60 * minutes, list[Step]()

    def step(self, name: str, run: Callable[[], tuple[str, str]]) -> bool:
        """Runs one, which returns a result and what to say of it; whether it did not fail."""
        start = time.monotonic()
        print(f"== {name}", flush=True)
        result, said = run() if self.left() > 0 else (NOT_RUN, "no time left")
        self.steps.append(Step(name, result, said, time.monotonic() - start))
        print(f"   {result}: {said}", flush=True)
        return result != FAILED

    def left(self) -> float:
        return self.end - time.monotonic()

    def command(self, *command: object, **environment: str) -> tuple[int | None, str]:
        """A command's exit status and all that it printed; None where the time ran out."""
        try:
            done = subprocess.run(
                list(map(str, command)), cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, text=True, timeout=max(self.left(), 1),
            )  # fmt: skip
        except subprocess.TimeoutExpired as expired:
            printed = expired.stdout or b""
            return None, printed.decode() if isinstance(printed, bytes) else printed
        return done.returncode, done.stdout

    def checked(self, *command: object, **environment: str) -> tuple[str, str]:
        """A step that is one command: its last line, or, where it fails, the last forty."""
        status, printed = self.command(*command, **environment)
        lines = printed.rstrip().splitlines() or [""]
        if status == 0:
            return OK, lines[-1]
        print("\n".join(lines[-40:]))
        return FAILED, lines[-1] if status is not None else f"no end in time: {lines[-1]}"

    def summary(self) -> int:
        """Prints the table and returns the exit status: 0 where nothing failed."""
        print("\n== summary")
        for step in self.steps:
            print(f"{step.result:8} {step.seconds:6.1f} s  {step.name}: {step.said[:160]}")
        return 1 if any(step.result == FAILED for step in self.steps) else 0


def fresh(arch: int) -> str:
    """Why the libraries have to be built for a GPU of this architecture (90); "" where they need not."""
    try:
        library.cpu()
        archs = sorted(map(int, library.cuda_archs().split(",")))
    except library.LibraryError as error:
        return str(error)
    return (
        "" if arch in archs or arch > archs[-1] else f"built for {archs}, not for {arch}"
    )  # the last comes as PTX too


def build(session: Session, arch: int) -> tuple[str, str]:
    """Both libraries, by CMake: as setup.py does, without setuptools."""
    why = fresh(arch)
    if not why:
        return OK, f"a fresh one is there, for {library.cuda_archs()}"
    folder = ROOT / "build" / f"gpu-{arch}"
    generator = [] if (folder / "CMakeCache.txt").is_file() or not shutil.which("ninja") else ["-G", "Ninja"]
    jobs = str(len(os.sched_getaffinity(0)))
    for command in (
        ["cmake", "-S", ROOT, "-B", folder, *generator, f"-DPython3_EXECUTABLE={sys.executable}"],
        ["cmake", "--build", folder, "--parallel", jobs],
        ["cmake", "--install", folder, "--prefix", LIBRARIES],
    ):
        result, said = session.checked(*command, MASKDIFF_CUDA="1", MASKDIFF_CUDA_ARCHS=str(arch))
        if result != OK:
            return result, said
    for load in (library.cpu, library.cuda):
        load.cache_clear()
    why = fresh(arch)
    return (FAILED, why) if why else (OK, f"built for {library.cuda_archs()}")


def conformance(session: Session, arch: int) -> tuple[str, str]:
    """Every wrapper of ptx.cuh, to the bit."""
    sys.path.insert(0, str(EMULATION))
    import emulate

    if reason := emulate.no_nvcc():
        return NOT_RUN, f"{reason}, which the wrappers' own kernels take"
    try:
        built = emulate.build_for_gpus("wrappers", [EMULATION / "wrappers.cu", emulate.EXPORTS], archs=(arch,))
    except AssertionError as error:
        print(error)
        return FAILED, "the wrappers do not compile"
    status, printed = session.command(sys.executable, EMULATION / "conformance.py", built, "--cuda")
    if status == 0:
        return OK, "every wrapper as the PTX ISA's tables say"
    print(printed)
    wrong = [line.split("NOT as the table says, ")[1] for line in printed.splitlines() if " NOT as " in line]
    return FAILED, "; ".join(wrong) or "it did not come to an end"


OTHERS, TRITON = "(on-cuda or on_cuda) and not triton", "triton-on-cuda or on_a_gpu"  # of the op tests


def op_tests(session: Session, which: str) -> tuple[str, str]:
    """tests/ops on CUDA tensors, by every implementation that can run."""
    files = [ROOT / "tests" / "ops" / f"test_{op}.py" for op in dispatch._OPS]
    files += [ROOT / "tests" / "ops" / f"test_{name}.py" for name in ("interface", "registration")]
    files += sorted((ROOT / "tests" / "ops").glob("test_*_triton.py"))
    command = (sys.executable, "-m", "pytest", "-q", "-k", which, *files)
    result, said = session.checked(*command, CUBLAS_WORKSPACE_CONFIG=":4096:8")
    return (result, said) if " passed" in said else (FAILED, f"no test ran: {said}")


def step_tests(session: Session) -> tuple[str, str]:
    """The training step: as a CUDA graph the same to the bit, without waiting."""
    file = ROOT / "tests" / "trainer" / "test_capture_on_gpu.py"
    result, said = session.checked(sys.executable, "-m", "pytest", "-q", file, CUBLAS_WORKSPACE_CONFIG=":4096:8")
    return (result, said) if " passed" in said else (FAILED, f"no test ran: {said}")


def sanitized(session: Session, tool: str, file: str) -> tuple[str, str]:
    """An op's kernels at a few small shapes, every buffer an allocation of its own."""
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        return NOT_RUN, "no compute-sanitizer"
    cases = (EMULATION / file, LIBRARIES / "libmaskdiff_cuda.so", *SANITIZED[file], "--cuda")
    status, printed = session.command(
        sanitizer, "--tool", tool, "--error-exitcode", FOUND, sys.executable, *cases, PYTORCH_NO_CUDA_MEMORY_CACHING="1"
    )
    return verdict(status, printed, len(SANITIZED[file]))


def verdict(status: int | None, printed: str, cases: int) -> tuple[str, str]:
    """What a run of compute-sanitizer says: nothing found, something found, or that it could not look."""
    lines = printed.rstrip().splitlines() or [""]
    ran = sum(line.startswith("ran ") for line in lines)
    if status == 0 and ran == cases:
        return OK, f"nothing found in {ran} cases"
    if status is None:
        return NOT_RUN, f"no end in time, after {ran} of {cases} cases"
    refusal = next((line for line in lines for word in REFUSALS if word in line), None)
    if refusal is not None and ran == 0:
        return NOT_RUN, f"refused here: {refusal.strip('= ')}"
    print("\n".join(lines[-60:]))
    return FAILED, f"{lines[-1].strip('= ')} (exit status {status})"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tests/gpu.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=7.5, help="after which no step is started (default 7.5)")
    parser.add_argument("--build", action="store_true", help="only build the libraries, where no fresh one is there")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"error: PyTorch {torch.__version__} sees no CUDA device", file=sys.stderr)
        return 2
    major, minor = torch.cuda.get_device_capability()
    arch = 10 * major + minor
    print(f"{torch.cuda.get_device_name()}, sm_{arch}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}")
    session = Session(options.minutes)
    built = session.step("build", lambda: build(session, arch))
    if options.build:
        return 0 if built else 1
    if built and session.step("conformance of ptx.cuh", lambda: conformance(session, arch)):
        session.step("op tests on CUDA tensors", lambda: op_tests(session, OTHERS))
        session.step("the training step as a CUDA graph", lambda: step_tests(session))
        for tool in ("memcheck", "racecheck", "initcheck"):
            for file in SANITIZED:
                session.step(
                    f"compute-sanitizer {tool} {file}", lambda tool=tool, file=file: sanitized(session, tool, file)
                )
        session.step("op tests on CUDA tensors, Triton", lambda: op_tests(session, TRITON))  # compiles long, once
    return session.summary()


if __name__ == "__main__":
    sys.exit(main())
