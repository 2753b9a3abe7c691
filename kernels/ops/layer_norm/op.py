"""layer_norm: LayerNorm, and the start of a residual sum beside it. Contract, checks, autograd, registration."""

import math
from typing import Any, overload

import torch
from torch import Tensor

from maskdiff_kernels import dispatch
from maskdiff_kernels.ops import checks
from maskdiff_kernels.ops.layer_norm import cpp, reference
from maskdiff_kernels.ops.registration import registered, unseen

# Numbers below which PyTorch's own is as fast in float32, which it need not cast: Python takes longer than the kernel.
FEW = 131072


@overload
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, shift: None = None, backend: str = "auto"
) -> Tensor: ...


@overload
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, *, shift: Tensor, backend: str = "auto"
) -> tuple[Tensor, Tensor]: ...


def layer_norm(
    x: Tensor,  # [..., D] float32 / bfloat16 / float16
    weight: Tensor,  # [D] float32
    bias: Tensor,  # [D] float32
    eps: float = 1e-5,
    shift: Tensor | None = None,  # [D], of x's dtype
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:  # [..., D], or two of them
    """(x - mean) / sqrt(variance + eps) * weight + bias for each row of x; with `shift`, x + shift too.

    The second is for pre-norm blocks, x + bias + W f(norm(x)): the product adds itself onto the sum, which is made
    while x is at hand, and the backward pass adds both gradients of x, and sums that of the bias, as it goes, where
    autograd would take passes of their own. Statistics and sums are float32. Besides x two numbers a row are kept for
    the backward. By the C++ a second derivative is an error, and results do not depend on the number of threads.

    Args:
        x: rows of D numbers. Rows of a matrix may lie apart; what lies otherwise is copied first.
        weight, bias: what normalised rows are multiplied with, and what is added then.
        eps: added to the variance, which is the mean square of x - mean.
        shift: added to each row of x. None: no such sum is made.
        backend: "auto", "cpp" or "reference", which is PyTorch's own, under autograd: compilers always see this one,
            and "auto" takes it for few numbers in float32.

    Returns:
        The normalised rows, or these and the sum: dense, of x's shape and dtype.

    Raises:
        TypeError, ValueError: an argument that does not fit, named, with what it got and what it takes.
        LibraryError: the compiled kernels are missing or stale.

    Source: Ba et al., arXiv 1607.06450, equation 4; pre-norm blocks as in Xiong et al., arXiv 2002.04745.
    """
    if torch.compiler.is_compiling():  # which fuses it with what stands around
        out, summed = reference.run(x, weight, bias, shift, eps)
    else:
        _check(x, weight, bias, shift, eps)
        if _choice(x, backend) == "reference":
            out, summed = reference.run(x, weight, bias, shift, eps)
        elif torch.is_grad_enabled():
            out, summed = _LayerNorm.apply(x, weight, bias, shift, eps)
        else:
            out, summed, _ = forward(x, weight, bias, shift, eps, False)
    return out if summed is None else (out, summed)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, eps: float):
        ctx.set_materialize_grads(False)
        out, summed, statistics = forward(x, weight, bias, shift, eps, True)
        ctx.save_for_backward(x, weight, statistics)
        return out, summed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None):
        if torch.is_grad_enabled():
            raise RuntimeError("layer_norm has no second derivative: call backward without create_graph")
        x, weight, statistics = ctx.saved_tensors
        grad_out, grad_sum = gradients
        if grad_out is None:
            grad_out = torch.zeros_like(x)
        grad_x, grad_weight, grad_bias, grad_shift = backward(grad_out, grad_sum, x, weight, statistics)
        return grad_x, grad_weight, grad_bias, None if grad_sum is None else grad_shift, None


def _choice(x: Tensor, backend: str) -> str:
    """The implementation asked for; for "auto" the chosen one, or PyTorch's where x is so small that this is faster."""
    name = dispatch.choice("layer_norm", x.device, backend)
    if x.dtype == torch.float32 and x.numel() < FEW and dispatch.asked("layer_norm", backend)[0] == "auto":
        return "reference"
    return name


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, eps: float, keep: bool
) -> tuple[Tensor, Any, Any]:  # two tensors, None where they are not asked for
    """The op by the C++, apart from autograd and its checks: see cpp.run."""
    if unseen(x):
        return cpp.run(x, weight, bias, shift, eps, keep)
    out, summed, statistics = _layer_norm(x, weight, bias, shift, eps, keep)
    return out, None if shift is None else summed, statistics


def backward(
    grad_out: Tensor, grad_sum: Tensor | None, x: Tensor, weight: Tensor, statistics: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Its gradients: see cpp.run_backward."""
    return (cpp.run_backward if unseen(x) else _layer_norm_backward)(grad_out, grad_sum, x, weight, statistics)


def _check(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, eps: float) -> None:
    if x.dtype not in checks.FLOATS:
        raise TypeError(f"x: got {x.dtype}, takes float32, bfloat16 or float16 [..., D]")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: got shape {list(x.shape)}, takes [..., D], D at least 1")
    width = x.shape[-1:]
    checks.tensor("weight", weight, "float32 [D]", torch.float32, width, x.device)
    checks.tensor("bias", bias, "float32 [D]", torch.float32, width, x.device)
    if shift is not None:
        checks.tensor("shift", shift, "[D] of x's dtype", x.dtype, width, x.device)
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps: got {eps}, takes a number of 0 or more")


def _run(x, weight, bias, shift, eps, keep):
    _check(x, weight, bias, shift, eps)
    _check_on_cpu(x)
    out, summed, statistics = cpp.run(x, weight, bias, shift, eps, keep)
    summed = x.new_empty(0) if summed is None else summed  # an op has no optional outputs
    return out, summed, weight.new_empty(0) if statistics is None else statistics


def _fake(x, weight, bias, shift, eps, keep):
    summed = x.new_empty(0 if shift is None else x.shape)
    return x.new_empty(x.shape), summed, weight.new_empty((2, math.prod(x.shape[:-1])) if keep else 0)


def _run_backward(grad_out, grad_sum, x, weight, statistics):
    _check(x, weight, weight, None, 0.0)
    _check_on_cpu(x)
    for name, tensor in (("grad_out", grad_out), ("grad_sum", grad_sum)):
        if tensor is not None:
            checks.tensor(name, tensor, "a tensor like x", x.dtype, x.shape, x.device, contiguous=False)
    rows = math.prod(x.shape[:-1])
    checks.tensor("statistics", statistics, "float32 [2, rows]", torch.float32, (2, rows), x.device)
    *grads, grad_shift = cpp.run_backward(grad_out, grad_sum, x, weight, statistics)
    return *grads, x.new_empty(0) if grad_shift is None else grad_shift


def _fake_backward(grad_out, grad_sum, x, weight, statistics):
    grad_shift = x.new_empty(0 if grad_sum is None else weight.shape)
    return x.new_empty(x.shape), torch.empty_like(weight), torch.empty_like(weight), grad_shift


def _check_on_cpu(x: Tensor) -> None:
    if not x.is_cpu:
        raise ValueError(f"x: got a tensor on {x.device}, takes one on cpu")


_layer_norm = registered(
    "layer_norm",
    "(Tensor x, Tensor weight, Tensor bias, Tensor? shift, float eps, bool keep) -> (Tensor, Tensor, Tensor)",
    _run,
    _fake,
)
_layer_norm_backward = registered(
    "layer_norm_backward",
    "(Tensor grad_out, Tensor? grad_sum, Tensor x, Tensor weight, Tensor statistics)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
dispatch.register("layer_norm", cpp=cpp, reference=reference)
