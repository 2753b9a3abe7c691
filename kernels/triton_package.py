"""Loads the kernels written in Triton, and the package triton with them; one helpful error where that is absent."""

import functools
import importlib
import os
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType

import torch

from maskdiff_kernels.library import LibraryError

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton, which reads the same variable when it is imported, runs its kernels in Python, on the CPU."""
DEVICES = ("cuda", "cpu") if INTERPRETED else ("cuda",)
OLDEST = (3, 5)


@functools.cache
def version() -> str:
    """Triton's. Raises LibraryError where it is missing or too old."""
    try:
        import triton
    except ImportError as error:
        raise LibraryError(f"triton is not there ({error}): pip install 'triton>=3.5'") from error
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST:
        raise LibraryError(f"triton is {triton.__version__}, the kernels need 3.5: pip install 'triton>=3.5'")
    return triton.__version__


@functools.cache
def kernels(op: str) -> ModuleType:
    """triton_kernel.py of an op. Raises LibraryError."""
    version()
    return importlib.import_module(f"maskdiff_kernels.ops.{op}.triton_kernel")


def load() -> str:
    """In a few words, what would run. Raises LibraryError."""
    if INTERPRETED:
        return f"Triton {version()}, in its interpreter"
    if not torch.cuda.is_available():
        raise LibraryError(f"Triton {version()} is there, but PyTorch sees no CUDA device")
    return f"Triton {version()}"


def on(device: torch.device) -> AbstractContextManager:
    """Where kernels are launched."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
