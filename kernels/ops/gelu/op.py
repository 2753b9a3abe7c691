"""gelu: x Phi(x), and its gradient together with the gradient's sums by column. Contract, checks, registration."""

from typing import Any

import torch
from torch import Tensor

from maskdiff_kernels import dispatch
from maskdiff_kernels.ops import checks
from maskdiff_kernels.ops.gelu import cpp, reference
from maskdiff_kernels.ops.registration import registered


def gelu(
    x: Tensor,  # [.., N], float32 / bfloat16 / float16
    backend: str = "auto",
) -> Tensor:  # like x, dense
    """x Phi(x), Phi the standard normal distribution: the exact GELU, not the one by tanh.

    Computed in float32 and rounded once; x alone is kept for the backward pass. A second derivative is an error. Where
    x is not finite, neither is the result nor the gradient. Results do not depend on the number of threads.

    Args:
        x: at least one dimension, any strides: what is not dense is copied.
        backend: "auto", "cpp" or "reference", PyTorch's own.

    Raises:
        TypeError, ValueError: an argument that does not fit, named, with what it got and what it takes.
        LibraryError: the compiled kernels are missing or stale.

    Source: Hendrycks and Gimpel, arXiv 1606.08415; the C++ has Phi by the form of Abramowitz and Stegun, 26.2.17.
    """
    return _Gelu.apply(x, backend)


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, backend: str):
        # chosen once; a compiled graph cannot ask, and chooses in both ops
        if not torch.compiler.is_compiling():
            backend = dispatch.choice("gelu", x.device, backend)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(x)
            ctx.backend = backend
        return _gelu(x, backend)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor):
        # in a compiled graph the tracer runs this with gradients on, and AOTAutograd itself refuses second derivatives
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("gelu has no second derivative: call backward without create_graph")
        return _backward(gradients[0], *ctx.saved_tensors, False, ctx.backend)[0], None


def _check(x: Tensor) -> None:
    if x.dtype not in checks.FLOATS:
        raise TypeError(f"x: got {x.dtype}, takes float32, bfloat16 or float16 [.., N]")
    if x.dim() == 0:
        raise ValueError("x: got no dimension, takes float32, bfloat16 or float16 [.., N]")


def _run(x, backend):
    _check(x)
    return dispatch.choose("gelu", x.device, backend).run(x.contiguous())


def _fake(x, backend):
    return x.new_empty(x.shape)


def _run_backward(grad_out, x, sums, backend):
    _check(x)
    checks.tensor("grad_out", grad_out, "a tensor like x", x.dtype, x.shape, x.device, contiguous=False)
    return dispatch.choose("gelu", x.device, backend).run_backward(grad_out.contiguous(), x.contiguous(), sums)


def _fake_backward(grad_out, x, sums, backend):
    return x.new_empty(x.shape), x.new_empty(x.shape[-1] if sums else 0, dtype=torch.float32)


_gelu = registered("gelu", "(Tensor x, str backend) -> Tensor", _run, _fake)
# the sums, over all but the last dimension, are the gradient of a bias that was added to x
_backward = registered(
    "gelu_backward",
    "(Tensor grad_out, Tensor x, bool sums, str backend) -> (Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
dispatch.register("gelu", cpp=cpp, reference=reference)
