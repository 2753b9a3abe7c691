"""Builds CUDA sources for the emulator (g++) or for GPUs (nvcc), and runs scripts with a sanitizer's library loaded."""

import ctypes
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from maskdiff_kernels.source_version import hash_sources

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
ARCHS = (80, 90, 100, 120)
EXPORTS = HERE / "exports.cu"
OPS = ("noisy_patches", "denoising_loss", "adamw_ema")  # whose CUDA kernels take whatever the op takes
DEFINES = ['-DMASKDIFF_SOURCE_VERSION="of the tests"', '-DMASKDIFF_CUDA_ARCHS="emulated"']
COMMON = ["-std=c++17", "-fno-strict-aliasing", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra"]
COMMON += ["-Wno-unknown-pragmas", "-Wno-unused-function", "-ffp-contract=off", "-DISA=emulated"]
COMMON += [f"-I{ROOT / 'csrc'}", f"-I{HERE}"]
SANITIZERS = {  # -Og -g1, lines alone in reports: compiled in half the time of -O1 -g, and as fast
    "": ["-O2", "-fopenmp"],
    "address": ["-Og", "-g1", "-fopenmp", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "thread": ["-Og", "-g1", "-fsanitize=thread"],  # no OpenMP: its runtime is not instrumented
}
NVCC = ["nvcc", "-O3", "-std=c++17", f"-I{ROOT / 'csrc'}", "-DISA=cuda", *DEFINES]
PRELOAD = {"address": ("libasan.so", "libubsan.so"), "thread": ("libtsan.so",)}


def build(name: str, sources: list[Path], sanitizer: str = "") -> Path:
    """The emulated library of some .cu files in build/emulation; compiled anew only where any source has changed."""
    command = ["g++", *SANITIZERS[sanitizer], *COMMON, *DEFINES, "-Werror", "-x", "c++", *map(str, sources)]
    return _compile(f"{name}-{sanitizer or 'plain'}", command)


def build_for_gpus(name: str, sources: list[Path], *flags: str, archs: tuple[int, ...] = ARCHS) -> Path:
    """The same for GPUs of some architectures; the assembler's report stands beside it (.txt).

    Spilled registers, stack in a kernel and any warning are errors.
    """
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    strict = ["-Werror=all-warnings", "-Xptxas=-v,--warn-on-spills,--warn-on-local-memory-usage,--warning-as-error"]
    shared = ["-shared", "-cudart=static", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra"]
    return _compile(f"{name}-gpu", [*NVCC, *codes, *shared, *strict, *flags, *map(str, sources)])


def check_gpu_build(op: str, kernels: int, most_registers: int, *flags: str) -> None:
    """Builds an op's kernels for every GPU: no stack, no spills, at most so many registers."""
    built = build_for_gpus(op, [ROOT / "csrc" / "cuda" / f"{op}.cu"], *flags)
    usage = re.findall(r"(\d+) bytes stack frame.*\n.*Used (\d+) registers", built.with_suffix(".txt").read_text())
    assert len(usage) == len(ARCHS) * kernels
    assert {int(stack) for stack, _ in usage} == {0}
    assert max(int(registers) for _, registers in usage) <= most_registers, usage


def fuses(op: str, *flags: str) -> bool:
    """Whether the code for GPUs of an op's kernels has fused products and sums of its own, as its PTX says."""
    command = [*NVCC, "-ptx", "-arch=compute_90", *flags, str(ROOT / "csrc" / "cuda" / f"{op}.cu")]
    return "fma.rn" in _compile(f"{op}{'-'.join(flags)}-ptx", command).read_text()


def _compile(name: str, command: list[str]) -> Path:
    folder = ROOT / "build" / "emulation"
    folder.mkdir(parents=True, exist_ok=True)
    everything = f"{hash_sources(ROOT / 'csrc')} {hash_sources(HERE)} {' '.join(command)}"
    library = folder / f"{name}-{hashlib.sha256(everything.encode()).hexdigest()[:16]}.so"
    with open(folder / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process of the tests may be compiling it
        if not library.is_file():
            for old in (*folder.glob(f"{name}-*.so"), *folder.glob(f"{name}-*.txt")):
                old.unlink()
            done = subprocess.run([*command, "-o", f"{library}.new"], capture_output=True, text=True)
            assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
            library.with_suffix(".txt").write_text(done.stdout + done.stderr)
            os.replace(f"{library}.new", library)
    return library


def load(library: Path) -> ctypes.CDLL:
    """A library of build(), with what all of them export: emulator_seed and wrapper_error."""
    loaded = ctypes.CDLL(str(library))
    loaded.wrapper_error.restype = ctypes.c_char_p
    return loaded


def load_ops() -> ctypes.CDLL:
    """The CUDA kernels of all ops in one emulated library: what kernels/library.py takes for the CUDA library."""
    sources = [ROOT / "csrc" / "cuda" / f"{op}.cu" for op in (*OPS, "attention")]
    library = load(build("ops", [EXPORTS, *sources]))
    library.maskdiff_cuda_error_text = library.wrapper_error
    return library


def run_sanitized(sanitizer: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs Python on what loads a library built for `sanitizer`: its runtime must come first in the process."""
    names = [_runtime(name) for name in PRELOAD[sanitizer]]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(names),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python keeps memory to its end
        "TSAN_OPTIONS": "exitcode=66 history_size=0",  # a short history makes fibers cheap
        "OMP_NUM_THREADS": "2",
        "OPENBLAS_NUM_THREADS": "1",
    }
    command = [os.path.realpath(sys.executable), *arguments]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)


def _runtime(name: str) -> str:
    return subprocess.run(
        ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()


def no_emulator() -> str:
    """Why the emulator cannot be built here; empty where it can."""
    return "" if shutil.which("g++") else "no g++"


def no_nvcc() -> str:
    """Why nothing can be compiled for GPUs here; empty where it can."""
    return "" if shutil.which("nvcc") else "no nvcc"
