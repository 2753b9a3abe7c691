"""Decides which implementation of an op runs, and says why another cannot.

The order of decision: the op's argument `backend`, the environment variable MASKDIFF_KERNELS, the table choices.json
(by compute capability or CPU level, written by a benchmark on request), the first implementation that can run.
A library that is missing or stale is an error and never a reason to fall back: a run must not turn slow in silence.
"""

import functools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from maskdiff_kernels import library

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton, which reads the same variable when it is imported, runs its kernels in Python, on the CPU."""
TRITON_DEVICES = ("cuda", "cpu") if INTERPRETED else ("cuda",)


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op."""

    module: ModuleType  # its function `run` computes the op
    devices: tuple[str, ...]  # device types whose tensors it takes; () = any
    load: Callable[[], str]  # loads what it needs and describes it in a few words; raises LibraryError

    def can_run(self, device: str | None = None) -> tuple[bool, str]:
        """Whether it can run here (on tensors of a device type, or on any), with the reason."""
        if device is not None and self.devices and device not in self.devices:
            return False, f"takes {' or '.join(self.devices)} tensors, not {device}"
        try:
            return True, self.load()
        except library.LibraryError as error:
            return False, str(error)


_OPS: dict[str, dict[str, Implementation]] = {}


def register(op: str, **implementations: ModuleType) -> None:
    """Names the implementations of an op. The name says what it needs: cpp the CPU library, cuda the CUDA library and a
    GPU, triton and xformers such a package and a GPU, the others nothing."""
    kinds: dict[str, tuple[tuple[str, ...], Callable[[], str]]] = {
        "reference": ((), lambda: "plain PyTorch, any device"),
        "cpp": (("cpu",), lambda: f"C++, {library.cpu_level()}"),
        "cuda": (("cuda",), _cuda),
        "sdpa": ((), lambda: "PyTorch's scaled_dot_product_attention, any device"),
        "explicit": ((), lambda: "PyTorch's products and softmax, any device"),
        "triton": (TRITON_DEVICES, lambda: implementations["triton"].load()),
        "xformers": (("cuda",), lambda: implementations["xformers"].load()),
    }
    _OPS[op] = {name: Implementation(module, *kinds[name]) for name, module in implementations.items()}


def _cuda() -> str:
    archs = library.cuda_archs()
    if not torch.cuda.is_available():
        raise library.LibraryError("PyTorch sees no CUDA device")
    return f"CUDA C++, built for {archs}"


def backends(op: str) -> dict[str, tuple[bool, str]]:
    """For each implementation of an op: whether it can run on this machine, and why, or why not."""
    return {name: implementation.can_run() for name, implementation in _implementations(op).items()}


def chosen(device: torch.device | str, backend: str = "auto") -> dict[str, str]:
    """The implementation of every op that runs for tensors on `device`: what a run writes down. Raises as `choice`."""
    return {op: choice(op, device, backend) for op in _OPS}


def choice(op: str, device: torch.device | str, backend: str = "auto") -> str:
    """The name of the implementation that runs for tensors on `device`.

    Raises ValueError for an unknown name or one that cannot take such tensors, LibraryError for a missing library.
    """
    said_by = "backend"
    if backend == "auto":
        backend, said_by = os.environ.get("MASKDIFF_KERNELS") or "auto", "MASKDIFF_KERNELS"
    return _choice(op, torch.device(device), backend, said_by)


@functools.cache  # the ops ask at every call; errors are not kept
def _choice(op: str, device: torch.device, backend: str, said_by: str) -> str:
    implementations = _implementations(op)
    if backend == "auto":
        backend = _table_choice(op, device)
    elif backend not in implementations:
        raise ValueError(f"{said_by}: got {backend!r}, {op} takes auto or one of {', '.join(implementations)}")
    if backend == "auto":
        able = (name for name, implementation in implementations.items() if implementation.can_run(device.type)[0])
        return next(able, "reference")
    implementation = implementations[backend]
    if implementation.devices and device.type not in implementation.devices:
        raise ValueError(f"{said_by}: {backend!r} of {op} {implementation.can_run(device.type)[1]}")
    implementation.load()
    return backend


def choose(op: str, device: torch.device, backend: str) -> ModuleType:
    """The module whose `run` computes `op` for tensors on `device`; raises as `choice` does."""
    return _OPS[op][choice(op, device, backend)].module


def _implementations(op: str) -> dict[str, Implementation]:
    if op not in _OPS:
        raise ValueError(f"op: got {op!r}, takes one of {', '.join(_OPS)}")
    return _OPS[op]


@functools.cache
def _table() -> dict[str, dict[str, str]]:
    return json.loads((Path(__file__).parent / "choices.json").read_text())


def _table_choice(op: str, device: torch.device) -> str:
    table = _table()
    keys = [device.type]
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        keys.insert(0, f"cuda:{major}.{minor}")
    elif device.type == "cpu":
        keys.insert(0, f"cpu:{library.cpu_level()}")
    return next((table[key][op] for key in keys if op in table.get(key, {})), "auto")
