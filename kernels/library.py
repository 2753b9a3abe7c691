"""Loads the compiled libraries by ctypes; one helpful error where one is absent, or built from other sources."""

import ctypes
import functools
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from maskdiff_kernels.source_version import LIBRARIES, expected_version

ABI = 11  # must equal MASKDIFF_ABI in csrc/maskdiff_kernels.h: changed with any exported function or struct
LEVELS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16")  # in the order of the numbers that the library uses


class LibraryError(RuntimeError):
    """A compiled library is missing, or was built from other sources than those it is used with."""


@functools.cache
def cpu() -> ctypes.CDLL:
    """The CPU library, checked and set to the instruction set that MASKDIFF_CPU_ISA allows. Raises LibraryError."""
    library = _opened("maskdiff_cpu", "maskdiff", "the compiled kernels are missing", "run `pip install -e .`")
    wanted = os.environ.get("MASKDIFF_CPU_ISA")
    if wanted:
        _set_level(library, wanted, "MASKDIFF_CPU_ISA")
    return library


@functools.cache
def cuda() -> ctypes.CDLL:
    """The CUDA library, checked. Raises LibraryError."""
    library = _opened(
        "maskdiff_cuda", "maskdiff_cuda", "the CUDA kernels were not built", "run `MASKDIFF_CUDA=1 pip install -e .`"
    )
    library.maskdiff_cuda_archs.restype = library.maskdiff_cuda_error_text.restype = ctypes.c_char_p
    return library


def cuda_archs() -> str:
    """The compute capabilities that the CUDA library was built for, as "80,90,100,120". Raises LibraryError."""
    return cuda().maskdiff_cuda_archs().decode()


def runs_on(
    archs: str,  # as cuda_archs gives them
    capability: tuple[int, int],  # compute capability of a GPU
) -> bool:
    """Whether what was built for these runs there: machine code on its own capability and on later ones of the same
    major number, and the last, which comes as PTX too, on every later one. "90a": on that one alone.

    Source: CUDA C++ Programming Guide, 3.1.2 to 3.1.4.
    """
    built = [(int(digits[:-1]), int(digits[-1]), kind) for digits, kind in re.findall(r"(\d+)([a-z]?)", archs)]
    for major, minor, kind in built:
        if (major, minor) == capability or kind != "a" and major == capability[0] and minor < capability[1]:
            return True
    return not built[-1][2] and built[-1][:2] < capability


def _opened(name: str, prefix: str, missing: str, build: str) -> ctypes.CDLL:
    """A library of kernels/lib, loaded; LibraryError where it is missing, broken or stale."""
    path = LIBRARIES / f"lib{name}.so"
    build += " in the repository"
    if not path.is_file():
        hint = "or set MASKDIFF_KERNELS=reference to use the slow PyTorch implementations"
        raise LibraryError(f"{missing} ({path}): {build}, {hint}")
    try:
        library = ctypes.CDLL(str(path))
        abi, version = getattr(library, f"{prefix}_abi"), getattr(library, f"{prefix}_source_version")
    except (OSError, AttributeError) as error:
        raise LibraryError(f"{path} does not load ({error}): {build}") from error
    version.restype = ctypes.c_char_p
    built, expected = version().decode(), expected_version()
    if abi() != ABI or built != expected:
        raise LibraryError(f"{path} is stale (built from sources {built}, these are {expected}): {build}")
    return library


def cpu_level() -> str:
    """The instruction set in use: "baseline", "avx2", "avx512", "avx512_bf16" or "amx_bf16". Raises LibraryError."""
    return LEVELS[cpu().maskdiff_cpu_level()]


def cpu_levels() -> tuple[str, ...]:
    """The instruction sets that both this processor and this library have, lowest first. Raises LibraryError."""
    return LEVELS[: cpu().maskdiff_cpu_best_level() + 1]


@contextmanager
def use_cpu_level(name: str) -> Iterator[None]:
    """Runs a block of code at another instruction set, for the whole process: a tool of tests and benchmarks."""
    before = cpu_level()
    _set_level(cpu(), name, "name")
    try:
        yield
    finally:
        _set_level(cpu(), before, "name")


def _set_level(library: ctypes.CDLL, name: str, argument: str) -> None:
    present = LEVELS[: library.maskdiff_cpu_best_level() + 1]
    if name not in present:
        raise ValueError(f"{argument}: got {name!r}, takes one of {', '.join(present)} on this processor")
    library.maskdiff_cpu_set_level(LEVELS.index(name))


def source_version() -> str:
    """The version of the sources that the loaded CPU library was built from. Raises LibraryError."""
    return cpu().maskdiff_source_version().decode()
