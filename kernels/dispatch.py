"""Decides which implementation of an op runs, and says why another cannot.

The order of decision: the op's argument `backend`, `using`, the environment variable MASKDIFF_KERNELS ("reference" for
all ops, "attention=sdpa,adamw_ema=torch" for some), the table choices.json (by compute capability or CPU level, written
by benchmarks/choices.py on request), the first implementation that can run. A library that is missing or stale is an
error and no reason to fall back: a run must not turn slow in silence.
"""

import functools
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from maskdiff_kernels import library, triton_package


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


BY_LENGTH = ("attention",)  # ops whose implementation may depend on the most tokens that a sequence has
_OPS: dict[str, dict[str, Implementation]] = {}


def register(op: str, **modules: ModuleType) -> None:
    """Names the implementations of an op. The name says what it needs: cpp the CPU library, cuda the CUDA library and a
    GPU, triton, xformers and apex such a package and a GPU, the others nothing."""
    kinds: dict[str, tuple[tuple[str, ...], Callable[[], str]]] = {
        "reference": ((), lambda: "plain PyTorch, any device"),
        "cpp": (("cpu",), lambda: f"C++, {library.cpu_level()}"),
        "cuda": (("cuda",), _cuda),
        "torch": ((), lambda: "PyTorch's fused optimizer, any device"),
        "sdpa": ((), lambda: "PyTorch's scaled_dot_product_attention, any device"),
        "explicit": ((), lambda: "PyTorch's products and softmax, any device"),
        "triton": (triton_package.DEVICES, triton_package.load),
        "xformers": (("cuda",), lambda: modules["xformers"].load()),
        "apex": (("cuda",), lambda: modules["apex"].load()),
    }
    _OPS[op] = {name: Implementation(module, *kinds[name]) for name, module in modules.items()}


def _cuda() -> str:
    archs = library.cuda_archs()
    if not torch.cuda.is_available():
        raise library.LibraryError("PyTorch sees no CUDA device")
    major, minor = torch.cuda.get_device_capability()  # of the current one
    if (major, minor) < (8, 0):
        raise library.LibraryError(f"the CUDA kernels need compute capability 8.0, this GPU is {major}.{minor}")
    if not library.runs_on(archs, (major, minor)):
        build = f"run `MASKDIFF_CUDA_ARCHS={major}{minor} pip install -e .` in the repository"
        raise library.LibraryError(f"the CUDA kernels were built for {archs}, this GPU is {major}.{minor}: {build}")
    return f"CUDA C++, built for {archs}"


def backends(op: str) -> dict[str, tuple[bool, str]]:
    """For each implementation of an op: whether it can run on this machine, and why, or why not."""
    return {name: implementation.can_run() for name, implementation in implementations(op).items()}


def able(op: str, device: torch.device | str) -> list[str]:
    """The implementations of an op that can run for tensors on `device` here."""
    device = torch.device(device)
    with _current(device):
        return [name for name, implementation in implementations(op).items() if implementation.can_run(device.type)[0]]


def chosen(device: torch.device | str, backend: str = "auto", **by_op: str) -> dict[str, str]:
    """The implementation of every op that runs for tensors on `device`: what a run writes down. Raises as `choice`.

    `by_op` names another `backend` for some of them: adamw_ema="torch".

    Where it depends on the length, all are named: "cuda to 288 tokens, triton beyond".
    """
    for op in by_op:
        implementations(op)  # raises for an unknown op
    return {op: _words(_chosen(op, device, by_op.get(op, backend))) for op in _OPS}


def choice(op: str, device: torch.device | str, backend: str = "auto", length: int = 0) -> str:
    """The name of the implementation that runs for tensors on `device`, and sequences of at most `length` tokens.

    Raises ValueError for an unknown name or one that cannot take such tensors, LibraryError for a missing library.
    """
    found = _chosen(op, device, backend)
    return found if isinstance(found, str) else next(name for most, name in found if length <= most)


def choose(op: str, device: torch.device, backend: str, length: int = 0) -> ModuleType:
    """The module whose `run` computes `op` for tensors on `device`; raises as `choice` does."""
    return _OPS[op][choice(op, device, backend, length)].module


ByLength = tuple[tuple[float, str], ...]  # (most tokens, name), the last of them for any number


def asked(op: str, backend: str = "auto") -> tuple[str, str]:
    """What was asked for of an op, "auto" if nothing, and by what: "backend", "using" or MASKDIFF_KERNELS."""
    if backend != "auto":
        return backend, "backend"
    if op in _using:
        return _using[op], "using"
    return _in_environment(os.environ.get("MASKDIFF_KERNELS", "")).get(op, "auto"), "MASKDIFF_KERNELS"


_using: dict[str, str] = {}  # what `using` says now


@contextmanager
def using(**names: str) -> Iterator[None]:
    """Has ops run by the named implementations inside: `with using(attention="sdpa"):`, for calls that name none.

    "auto" lets the table choose. It holds for all threads and not for a CUDA graph that was captured before. A backward
    pass runs what its forward pass chose; that of a compiled function chooses again: keep both inside. May be nested:
    what the inner one does not name stays. Raises ValueError for an unknown op or name; one that cannot run is an error
    of the call that would run it.
    """
    for op, name in names.items():
        if name not in ("auto", *implementations(op)):
            raise _unknown("using", name, op)
    global _using
    before, _using = _using, {**_using, **names}
    try:
        yield
    finally:
        _using = before


@functools.cache
def _in_environment(text: str) -> dict[str, str]:
    """MASKDIFF_KERNELS by op: "NAME" is for all ops, "OP=NAME,OP=NAME" for these."""
    if "=" not in text:
        return dict.fromkeys(_OPS, text or "auto")
    pairs = [word.strip().partition("=") for word in text.split(",")]
    if wrong := [op for op, _, _ in pairs if op not in _OPS]:
        takes = f"a name, or OP=NAME,OP=NAME of {', '.join(_OPS)}"
        raise ValueError(f"MASKDIFF_KERNELS: got {wrong[0]!r} in {text!r}, takes {takes}")
    return {op: name for op, _, name in pairs}


def _unknown(said_by: str, name: str, op: str) -> ValueError:
    return ValueError(f"{said_by}: got {name!r}, {op} takes auto or one of {', '.join(implementations(op))}")


def _chosen(op: str, device: torch.device | str, backend: str) -> str | ByLength:
    implementations(op)  # raises for an unknown op
    device, (name, said_by) = torch.device(device), asked(op, backend)
    return _choice(op, device, name, said_by, device_key(device) if name == "auto" else "")


@functools.cache  # the ops ask at every call; errors are not kept
def _choice(op: str, device: torch.device, backend: str, said_by: str, key: str) -> str | ByLength:
    known = implementations(op)
    found: str | ByLength = backend
    if backend == "auto":
        found, said_by = _table_choice(op, device.type, key), "choices.json"
    elif backend not in known:
        raise _unknown(said_by, backend, op)
    if found == "auto":
        with _current(device):
            return next((name for name, how in known.items() if how.can_run(device.type)[0]), "reference")
    for name in (found,) if isinstance(found, str) else dict.fromkeys(name for _, name in found):
        implementation = known[name]
        if implementation.devices and device.type not in implementation.devices:
            raise ValueError(f"{said_by}: {name!r} of {op} {implementation.can_run(device.type)[1]}")
        with _current(device):
            implementation.load()
    return found


def _current(device: torch.device) -> AbstractContextManager:
    """Makes a GPU the current one, of which implementations are asked whether they can run there."""
    gpu = device.type == "cuda" and torch.cuda.is_available()
    return torch.cuda.device(device) if gpu else nullcontext()


def _words(found: str | ByLength) -> str:
    if isinstance(found, str):
        return found
    return ", ".join(f"{name} beyond" if most == math.inf else f"{name} to {most:g} tokens" for most, name in found)


def implementations(op: str) -> dict[str, Implementation]:
    """All implementations of an op by name. Raises ValueError for an unknown op."""
    if op not in _OPS:
        raise ValueError(f"op: got {op!r}, takes one of {', '.join(_OPS)}")
    return _OPS[op]


@functools.cache
def _table() -> dict[str, dict[str, str | ByLength]]:
    return read_table((Path(__file__).parent / "choices.json").read_text())


def read_table(text: str) -> dict[str, dict[str, str | ByLength]]:
    """The table that choices.json holds: for each device, and each op, a name or, for attention, names by length.

    Devices are "cpu", "cuda", or more exactly "cpu:avx2" (an instruction set), "cuda:9.0" (a compute capability). By
    length: [[most tokens, name], ...], numbers that rise and null, for any number, at the end. Raises ValueError for
    any other form, for an unknown op or name, and for one that such a device cannot run.
    """
    table = json.loads(text)
    levels = "|".join(library.LEVELS)
    for device, entries in table.items():
        if not re.fullmatch(rf"cpu(:({levels}))?|cuda(:\d+\.\d+)?", device):
            raise ValueError(f'choices.json: got {device!r}, takes devices such as "cpu:avx2", "cuda" or "cuda:9.0"')
        for op, entry in entries.items():
            entries[op] = _entry(entry, op, device)
    return table


def _entry(entry: Any, op: str, device: str) -> str | ByLength:
    pairs = entry if isinstance(entry, list) and op in BY_LENGTH else [[None, entry]]
    takes = "a name, or [most tokens, name] pairs that rise and end with null" if op in BY_LENGTH else "a name"
    wrong = ValueError(f"choices.json: {device}: {op}: got {json.dumps(entry)}, takes {takes}")
    if not all(isinstance(pair, list) and len(pair) == 2 and isinstance(pair[1], str) for pair in pairs):
        raise wrong
    most = [math.inf if number is None else number for number, _ in pairs]
    if not most or most[-1] != math.inf or not all(isinstance(number, int) for number in most[:-1]):
        raise wrong
    if any(a >= b for a, b in zip([0, *most], most, strict=False)):
        raise wrong
    if op not in _OPS:
        raise ValueError(f"choices.json: {device}: got op {op!r}, takes one of {', '.join(_OPS)}")
    kind = device.partition(":")[0]
    names = [name for name, known in _OPS[op].items() if not known.devices or kind in known.devices]
    if unknown := [name for _, name in pairs if name not in names]:
        raise ValueError(f"choices.json: {device}: {op}: got {unknown[0]!r}, takes one of {', '.join(names)}")
    return pairs[0][1] if isinstance(entry, str) else tuple(zip(most, (name for _, name in pairs), strict=True))


def device_key(device: torch.device) -> str:
    """The most exact name of a device in the table: "cuda:9.0", "cpu:avx2"."""
    if device.type == "cuda":
        return "cuda:{}.{}".format(*torch.cuda.get_device_capability(device))
    return f"cpu:{library.cpu_level()}" if device.type == "cpu" else device.type


def _table_choice(op: str, kind: str, key: str) -> str | ByLength:
    table = _table()
    return next((table[name][op] for name in (key, kind) if op in table.get(name, {})), "auto")
