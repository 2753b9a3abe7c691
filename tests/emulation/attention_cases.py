"""Runs attention's CUDA kernels, emulated or on a GPU, on exact-size buffers, outputs poisoned with NaN first.

    python tests/emulation/attention_cases.py LIBRARY CASE [CASE ...] [--entry=NAME] [--cuda]

runs cases (see CASES) by maskdiff_cuda_attention, or by what else is named, in a process of its own, as the sanitizers
need it; it imports nothing but NumPy. With --cuda the library is the one for GPUs, and PyTorch brings the memory.
"""

import ctypes
from dataclasses import dataclass

import numpy as np
from conformance import BF16, FP16, Cuda, Host, as_dtype, run_cases, set_up

DENSE = (0, 1, 2, 3, 4)


class Input(ctypes.Structure):
    """maskdiff_attention_input."""

    _fields_ = [("qkv", ctypes.c_void_p), ("cu_seqlens", ctypes.c_void_p)] + [
        (name, ctypes.c_int64)
        for name in "sequences length tokens heads width sequence_stride token_stride part_stride head_stride "
        "dtype products".split()
    ]


@dataclass(frozen=True)
class Case:
    """Sequences to attend to: their lengths, and how qkv is laid out."""

    lengths: tuple[int, ...]
    heads: int = 2
    width: int = 64
    dtype: int = BF16
    ragged: bool = False
    spread: float = 1.0  # of q and k
    order: tuple[int, ...] = DENSE  # how [S, L, 3, H, d] stands in memory
    gap: int = 0  # elements after every d

    def data(self) -> tuple[np.ndarray, np.ndarray]:
        """qkv [S, L, 3, H, d] and the output's gradient [S, L, H * d] as 16-bit patterns; ragged: S = 1, L = tokens."""
        random = np.random.default_rng(sum(self.lengths) + self.width)
        shape = (1, sum(self.lengths)) if self.ragged else (len(self.lengths), self.lengths[0])
        qkv = random.standard_normal((*shape, 3, self.heads, self.width), np.float32)
        qkv[:, :, :2] *= self.spread
        gradient = random.standard_normal((*shape, self.heads * self.width), np.float32)
        return as_dtype(qkv, self.dtype), as_dtype(gradient, self.dtype)


def run(
    library: ctypes.CDLL,
    case: Case,
    seed: int = 0,
    prefix: str = "maskdiff_cuda_attention",
    on: type[Host] | type[Cuda] = Host,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """out [S, L, H * d], lse [H, T] and the gradient of qkv [S, L, 3, H, d]; 16-bit patterns but for lse."""
    qkv, gradient = case.data()
    sequences, length, _, heads, width = qkv.shape
    tokens = sequences * length
    padded = np.full((*qkv.shape[:-1], width + case.gap), 0xFFFF, np.uint16)
    padded[..., :width] = qkv
    stored = np.ascontiguousarray(padded.transpose(case.order))
    strides = [stored.strides[case.order.index(axis)] // 2 for axis in range(4)]
    wide = np.full((sequences, length, heads * width + case.gap), 0xFFFF, np.uint16)
    wide[..., : heads * width] = gradient
    memory, scale = on(), ctypes.c_float(width**-0.5)
    pointer, grad_pointer = memory.put(stored), memory.put(wide)
    cu = memory.put(np.cumsum([0, *case.lengths]).astype(np.int32)) if case.ragged else None
    numbers = [len(case.lengths), max(case.lengths, default=0), tokens, heads, width, *strides, case.dtype, 0]
    given = ctypes.byref(Input(pointer, cu, *numbers))
    out = memory.put(np.full((tokens, heads * width), 0xFFFF, np.uint16))
    lse = memory.put(np.full((heads, tokens), np.nan, np.float32))
    grad_qkv = memory.put(np.full(qkv.shape, 0xFFFF, np.uint16))
    explain = set_up(library, on, seed)
    code = getattr(library, prefix)(given, scale, out, lse, 0, None)
    if not code:
        strides = [ctypes.c_int64(wide.strides[axis] // 2) for axis in (0, 1)]
        code = getattr(library, f"{prefix}_backward")(given, scale, out, lse, grad_pointer, *strides, grad_qkv, 0, None)
    for used in (pointer, grad_pointer, *([cu] if cu else [])):
        memory.take(used, (0,), np.uint8)
    results = (
        memory.take(out, (sequences, length, heads * width), np.uint16),
        memory.take(lse, (heads, tokens), np.float32),
        memory.take(grad_qkv, qkv.shape, np.uint16),
    )
    if code:
        raise RuntimeError(explain(code))
    return results


MIX = Case((5, 0, 27, 16, 0, 1, 33), ragged=True)
CASES = {
    "one": Case((1,), heads=1),
    "short": Case((27, 27, 27), heads=3),
    "full": Case((32,) * 2, heads=1),
    "three": Case((33,), heads=1),
    "half": Case((15,), heads=1, dtype=FP16, width=32),
    "middle": Case((65,), heads=1),
    "nine": Case((129,), heads=1),
    "chunks": Case((100,), heads=1),
    "long": Case((257,), heads=1),
    "most": Case((288,), heads=1, width=32),
    "ragged": MIX,
    "ragged-short": Case((9, 0, 17), heads=1, ragged=True),
    "steep": Case((1, 3, 1, 2, 27), ragged=True, spread=24.0),
    "strided": Case((19, 19), order=(0, 2, 3, 1, 4), gap=8),
}


if __name__ == "__main__":
    run_cases(run, CASES)
