"""attention: softmax attention over packed qkv, equal lengths or ragged. Contract, checks, autograd, registration."""

import functools
import math
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from maskdiff_kernels import dispatch, triton_package
from maskdiff_kernels.library import LibraryError
from maskdiff_kernels.ops import checks
from maskdiff_kernels.ops.attention import cpp, cuda, explicit, layout, reference, sdpa, triton_host, xformers
from maskdiff_kernels.ops.registration import registered

WIDTHS = (32, 64, 128)


def attention(
    qkv: Tensor,  # [B, L, 3, H, d] or [T, 3, H, d], float32 / bfloat16 / float16
    cu_seqlens: Tensor | None = None,  # [S + 1] int32
    max_seqlen: int | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:  # [B, L, H * d] or [T, H * d]
    """softmax(scale q k^T) v for each sequence and head, every token attending to its whole sequence.

    The input is read where it stands: no copy, transpose or padding of it. The output has the layout that the next
    product reads. The backward makes one tensor in the layout of qkv; besides qkv only the output and the log-sum-exp
    of the scores (float32) are kept for it. A second derivative is an error. Results do not depend on the number of
    threads; softmax and sums are float32.

    Args:
        qkv: queries, keys and values packed side by side, d = 32, 64 or 128. Any strides but for the last dimension,
            which is dense. [B, L, 3, H, d]: B sequences of L tokens. [T, 3, H, d]: the tokens of S sequences, one
            sequence after another, with `cu_seqlens`.
        cu_seqlens: [S + 1] int32: where each sequence starts, from 0 to T. A sequence may be empty.
        max_seqlen: the most tokens that a sequence has, or more. Needed with cu_seqlens, which is not read back from a
            GPU; without them it must be left out.
        scale: what scores are multiplied with. None: 1 / sqrt(d).
        backend: "auto", "cpp", "cuda", "triton", "reference", or by PyTorch's own means "sdpa", "explicit" (products
            and softmax) or "xformers" (mslk or xformers, whichever is there). The last three pad ragged sequences
            (xformers: read cu_seqlens back) and run their forward again in the backward.

    Returns:
        [B, L, H * d] or [T, H * d], dense, of qkv's dtype.

    Raises:
        TypeError, ValueError: an argument that does not fit, named, with what it got and what it takes. Numbers out of
            range in cu_seqlens are found on the CPU; CUDA tensors are not read back.
        LibraryError: the compiled kernels are missing or stale, or a package asked for is not there.

    Source: Vaswani et al., arXiv 1706.03762, equation 1; the log-sum-exp as in Dao, arXiv 2307.08691.
    """
    return _Attention.apply(qkv, cu_seqlens, max_seqlen, scale, backend)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cu_seqlens: Tensor | None, max_seqlen, scale, backend):
        # chosen once: not all implementations make the log-sum-exp that another's backward reads. A compiled graph
        # cannot ask, and chooses in both ops, from the same tensors
        if not torch.compiler.is_compiling():
            backend = _choice(qkv, _check(qkv, cu_seqlens, max_seqlen, scale)[0], backend)
        out, lse = _attention(qkv, cu_seqlens, max_seqlen, scale, backend)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(qkv, out, lse, *([] if cu_seqlens is None else [cu_seqlens]))
            ctx.options = max_seqlen, scale, backend
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor):
        # in a compiled graph the tracer runs this with gradients on, and AOTAutograd itself refuses second derivatives
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("attention has no second derivative: call backward without create_graph")
        qkv, out, lse, *rest = ctx.saved_tensors
        grad = _backward(gradients[0], qkv, out, lse, rest[0] if rest else None, *ctx.options)
        return grad, None, None, None, None


def _check(qkv: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None, scale: float | None) -> tuple[int, float]:
    """Checks everything but the numbers in cu_seqlens; returns the longest length and the scale."""
    shape = qkv.shape
    if len(shape) == 5 and shape[2] == 3 and shape[3] and shape[4] in WIDTHS and qkv.dtype in checks.FLOATS:
        if cu_seqlens is None and max_seqlen is None and scale is None and qkv.stride(4) == 1:
            return shape[1], shape[4] ** -0.5  # the common case, in 2 us
    ragged = cu_seqlens is not None
    takes = f"float32, bfloat16 or float16 [{'T' if ragged else 'B, L'}, 3, H, d]"
    checks.tensor("qkv", qkv, takes, checks.FLOATS, (*[None] * (1 if ragged else 2), 3, None, None), contiguous=False)
    heads, width = qkv.shape[-2:]
    if width not in WIDTHS or heads == 0:
        raise ValueError(f"qkv: got {heads} heads of width {width}, takes at least one, of width 32, 64 or 128")
    if qkv.numel() and qkv.stride(-1) != 1:
        raise ValueError(f"qkv: got strides {list(qkv.stride())}, takes a dense last dimension")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale: got {scale}, takes a finite number")
    length = qkv.shape[1]
    if cu_seqlens is not None:
        checks.tensor("cu_seqlens", cu_seqlens, "int32 [S + 1]", torch.int32, (None,), qkv.device)
        if cu_seqlens.shape[0] == 0:
            raise ValueError("cu_seqlens: got no number, takes S + 1 of them")
        if max_seqlen is None:
            raise ValueError("max_seqlen: got None beside cu_seqlens, takes the most tokens that a sequence has")
        checks.number("max_seqlen", max_seqlen, 0, 2**31 - 1)
        length = max_seqlen
    elif max_seqlen is not None:
        raise ValueError(f"max_seqlen: got {max_seqlen} without cu_seqlens, takes None: all sequences have L tokens")
    return length, width**-0.5 if scale is None else scale


def _choice(qkv: Tensor, length: int, backend: str) -> str:
    """The implementation asked for; for "auto" the chosen one, or another where that does not take such a tensor."""
    name = dispatch.choice("attention", qkv.device, backend, length)
    if name == "cuda" and dispatch.asked("attention", backend)[0] == "auto":
        return name if cuda.can_take(qkv, length)[0] else _where_cuda_cannot()
    return name


@functools.cache
def _where_cuda_cannot() -> str:
    """Triton, which takes every tensor, or PyTorch's own where it is not there."""
    try:
        triton_package.load()
    except LibraryError:
        return "sdpa"
    return "triton"


def _choose(qkv: Tensor, cu_seqlens: Tensor | None, length: int, backend: str) -> ModuleType:
    """The chosen implementation; the numbers in cu_seqlens are checked, on the CPU."""
    name = _choice(qkv, length, backend)
    if cu_seqlens is not None and qkv.is_cpu and name != "cpp":  # the C++ looks by itself
        layout.check_cu_seqlens(cu_seqlens, qkv.shape[0], length)
    return dispatch.choose("attention", qkv.device, name, length)


def _as_given(device: torch.device) -> AbstractContextManager:
    """Keeps autocast out of the PyTorch products inside an op: the dtype is the input's."""
    active = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if active else nullcontext()


def _run(qkv, cu_seqlens, max_seqlen, scale, backend):
    length, scale = _check(qkv, cu_seqlens, max_seqlen, scale)
    with _as_given(qkv.device):
        return _choose(qkv, cu_seqlens, length, backend).run(qkv, cu_seqlens, max_seqlen, scale)


def _fake(qkv, cu_seqlens, max_seqlen, scale, backend):
    heads, width = qkv.shape[-2:]
    out = qkv.new_empty((*qkv.shape[:-3], heads * width))
    return out, qkv.new_empty((heads, math.prod(qkv.shape[:-3])), dtype=torch.float32)


def _run_backward(grad_out, qkv, out, lse, cu_seqlens, max_seqlen, scale, backend):
    length, scale = _check(qkv, cu_seqlens, max_seqlen, scale)
    heads, width = qkv.shape[-2:]
    shape, takes = (*qkv.shape[:-3], heads * width), "a tensor like the output"
    for name, tensor in (("grad_out", grad_out), ("out", out)):
        checks.tensor(name, tensor, takes, qkv.dtype, shape, qkv.device, contiguous=tensor is out)
    lse_shape = (heads, math.prod(qkv.shape[:-3]))
    checks.tensor("lse", lse, "float32 [H, T]", torch.float32, lse_shape, qkv.device)
    chosen = _choose(qkv, cu_seqlens, length, backend)
    with _as_given(qkv.device):
        return chosen.run_backward(grad_out, qkv, out, lse, cu_seqlens, max_seqlen, scale)


def _fake_backward(grad_out, qkv, out, lse, cu_seqlens, max_seqlen, scale, backend):
    return qkv.new_empty(qkv.shape)


_SEQUENCES = "Tensor? cu_seqlens, SymInt? max_seqlen, float? scale, str backend"
_attention = registered("attention", f"(Tensor qkv, {_SEQUENCES}) -> (Tensor, Tensor)", _run, _fake)
_backward = registered(
    "attention_backward",
    f"(Tensor grad_out, Tensor qkv, Tensor out, Tensor lse, {_SEQUENCES}) -> Tensor",
    _run_backward,
    _fake_backward,
)
dispatch.register(
    "attention",
    cuda=cuda,
    cpp=cpp,
    triton=triton_host,
    sdpa=sdpa,
    reference=reference,
    explicit=explicit,
    xformers=xformers,
)
