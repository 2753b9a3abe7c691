"""A block's forward and backward pass by hand, as one step of autograd's: what a CPU runs in training.

The products and ops are those of Block.forward, in the same order and with the same roundings; with AMX some products
are the library's own (maskdiff_kernels.ops.product), whose sums have another order. What is saved is Python's and
autograd's account of some forty parts a block, which takes longer there than the smaller parts themselves.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import maskdiff_kernels
from maskdiff_kernels import dispatch
from maskdiff_kernels.ops import checks, product
from maskdiff_kernels.ops.layer_norm import op as layer_norm

OPS = ("attention", "gelu", "layer_norm")
_attention, _attention_backward = torch.ops.maskdiff.attention.default, torch.ops.maskdiff.attention_backward.default
_gelu, _gelu_backward = torch.ops.maskdiff.gelu.default, torch.ops.maskdiff.gelu_backward.default


class Weights(NamedTuple):
    """A block's parameters, or their gradients, or whether these are wanted: tensors, None where there is none."""

    skip: Any  # [D, 2 D]
    skip_bias: Any  # [D]
    norm1: Any  # [D] float32
    norm1_bias: Any
    qkv: Any  # [3 D, D]
    qkv_bias: Any
    proj: Any  # [D, D]
    proj_bias: Any
    norm2: Any  # [D] float32
    norm2_bias: Any
    fc1: Any  # [H, D]
    fc1_bias: Any
    fc2: Any  # [D, H]
    fc2_bias: Any


def takes(block: Any, x: Tensor) -> bool:
    """Whether `run` computes what the parts of `block` would: in training, on a CPU, by the C++ ops, nothing replaced
    and nothing watched."""
    if not (x.is_cpu and torch.is_grad_enabled() and x.dtype in checks.FLOATS) or torch.compiler.is_compiling():
        return False
    products = (block.qkv, block.proj, block.fc1, block.fc2, *([] if block.skip is None else [block.skip]))
    norms = (block.norm1, block.norm2)
    return (
        x.shape[1] // block.heads in maskdiff_kernels.ATTENTION_WIDTHS
        and all(_is_plain(part, nn.Linear, x.dtype) for part in products)
        and all(_is_plain(part, nn.LayerNorm, torch.float32) for part in norms)
        and all(part.bias is not None for part in (*products[1:], *norms))
        and all(dispatch.choice(op, x.device) == "cpp" for op in OPS)
    )


def _is_plain(part: Any, kind: type[nn.Module], dtype: torch.dtype) -> bool:
    hooks = part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks
    return type(part) is kind and not hooks and part.weight is not None and part.weight.dtype == dtype


def run(
    block: Any,
    x: Tensor,  # [T, D]
    lengths: tuple[int, ...],
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    skip: Tensor | None,  # [T, D]
) -> Tensor:  # [T, D]
    """Block.forward, where `takes` says so. A second derivative is an error."""
    parts = (block.norm1, block.qkv, block.proj, block.norm2, block.fc1, block.fc2)
    weights = [None, None] if block.skip is None else [block.skip.weight, block.skip.bias]
    for part in parts:
        weights += part.weight, part.bias
    shape = (*lengths, 3, block.heads, x.shape[1] // block.heads)
    return _Block.apply(x, skip, cu_seqlens, max_seqlen, shape, (block.norm1.eps, block.norm2.eps), *weights)


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, skip: Any, cu_seqlens, max_seqlen, shape, eps, *weights):
        w = Weights(*weights)
        both = None
        if w.skip is not None:
            both = torch.cat([x, skip], dim=1)
            x = _linear(both, w.skip, w.skip_bias)
        normed1, mid, statistics1 = layer_norm.forward(x, w.norm1, w.norm1_bias, w.proj_bias, eps[0], True)
        qkv = _linear(normed1, w.qkv, w.qkv_bias).view(shape)
        mixed, lse = _attention(qkv, cu_seqlens, max_seqlen, None, "cpp")
        _add_linear(mid, mixed.view_as(x), w.proj)
        normed2, out, statistics2 = layer_norm.forward(mid, w.norm2, w.norm2_bias, w.fc2_bias, eps[1], True)
        inner = _linear(normed2, w.fc1, w.fc1_bias)
        active = _gelu(inner, "cpp")
        _add_linear(out, active, w.fc2)
        ctx.save_for_backward(
            x, both, normed1, statistics1, qkv, mixed, lse, mid, normed2, statistics2, inner, active, cu_seqlens,
            w.skip, w.norm1, w.qkv, w.proj, w.norm2, w.fc1, w.fc2,
        )  # fmt: skip
        ctx.max_seqlen = max_seqlen
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("a block has no second derivative on a CPU: call backward without create_graph")
        (
            x, both, normed1, statistics1, qkv, mixed, lse, mid, normed2, statistics2, inner, active, cu_seqlens,
            skip, norm1, qkv_weight, proj, norm2, fc1, fc2,
        ) = ctx.saved_tensors  # fmt: skip
        wanted = Weights(*ctx.needs_input_grad[-len(Weights._fields) :])
        grad = gradients[0]
        grad_fc2 = _weight_gradient(wanted.fc2, grad, active, fc2)
        grad_inner, sums = _gelu_backward(_input_gradient(grad, fc2), inner, True, "cpp")
        grad_fc1 = _weight_gradient(wanted.fc1, grad_inner, normed2, fc1)
        grad_mid, of_norm2, of_norm2_bias, of_fc2_bias = layer_norm.backward(
            _input_gradient(grad_inner, fc1), grad, mid, norm2, statistics2
        )
        grad_proj = _weight_gradient(wanted.proj, grad_mid, mixed.view_as(x), proj)
        grad_mixed = _input_gradient(grad_mid, proj).view_as(mixed)
        grad_qkv = _attention_backward(grad_mixed, qkv, mixed, lse, cu_seqlens, ctx.max_seqlen, None, "cpp")
        grad_qkv = grad_qkv.view(len(x), -1)
        of_qkv = _weight_gradient(wanted.qkv, grad_qkv, normed1, qkv_weight)
        of_qkv_bias = grad_qkv.sum(0) if wanted.qkv_bias else None
        grad_x, of_norm1, of_norm1_bias, of_proj_bias = layer_norm.backward(
            _input_gradient(grad_qkv, qkv_weight), grad_mid, x, norm1, statistics1
        )
        of_skip, of_skip_bias, grad_skip = None, None, None
        if both is not None:
            of_skip = _weight_gradient(wanted.skip, grad_x, both, skip)
            of_skip_bias = grad_x.sum(0) if wanted.skip_bias else None
            grad_x, grad_skip = _input_gradient(grad_x, skip).split(x.shape[1], dim=1)
        of_fc1_bias = sums.to(inner.dtype) if wanted.fc1_bias else None
        of_weights = Weights(
            of_skip, of_skip_bias, of_norm1, of_norm1_bias, of_qkv, of_qkv_bias, grad_proj, of_proj_bias,
            of_norm2, of_norm2_bias, grad_fc1, of_fc1_bias, grad_fc2, of_fc2_bias,
        )  # fmt: skip
        return grad_x, grad_skip, None, None, None, None, *of_weights


@functools.cache
def _adds_bias_itself() -> bool:
    """Whether oneDNN's product that adds a bias is there and runs in bf16: some processors lack what it needs."""
    one = torch.ones(1, 1, dtype=torch.bfloat16, device="cpu")
    try:
        _pointwise(one, one, one[0])
    except (AttributeError, RuntimeError):
        return False
    return True


def _pointwise(
    x: Tensor,  # [T, K]
    weight: Tensor,  # [N, K]
    bias: Tensor,  # [N]
) -> Tensor:  # [T, N]
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return x.mm(weight.t())
    if x.dtype == torch.bfloat16 and _adds_bias_itself():
        return _pointwise(x, weight, bias)  # addmm copies the bias to every row first, 5 to 8 %
    return torch.addmm(bias, x, weight.t())


def _add_linear(out: Tensor, x: Tensor, weight: Tensor) -> None:
    if product.takes(x, weight) and product.leaves_threads_idle(len(x), *weight.shape):
        product.add_linear(out, x, weight)
    else:
        out.addmm_(x, weight.t())


def _input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """The gradient of what was multiplied with a weight."""
    if product.takes(grad, weight) and product.leaves_threads_idle(len(grad), *reversed(weight.shape)):
        return product.input_gradient(grad, weight)
    return grad.mm(weight)


def _weight_gradient(wanted: Any, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor | None:
    """The gradient of a weight that x was multiplied with, if it is wanted."""
    if not wanted:
        return None
    return product.weight_gradient(grad, x) if product.takes(x, weight) else grad.t().mm(x)
