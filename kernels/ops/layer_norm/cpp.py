"""layer_norm by the compiled CPU library."""

import ctypes

import torch
from torch import Tensor

from maskdiff_kernels.ops.structs import DTYPES, LayerNormGradientsStruct, LayerNormStruct, address, call, pointer


def run(
    x: Tensor,  # [..., D]
    weight: Tensor,  # [D] float32
    bias: Tensor,  # [D] float32
    shift: Tensor | None,  # [D], of x's dtype
    eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # [..., D], [..., D], [2, rows] float32
    """The normalised rows; x + shift; what the backward reads, if that is to be kept: means and 1 / deviations."""
    x, stride = rows_of(x)
    width = x.shape[-1]
    rows = x.numel() // width
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    summed = None if shift is None else torch.empty_like(out)
    statistics = weight.new_empty(2, rows) if keep else None
    struct = LayerNormStruct(
        x.data_ptr(), weight.data_ptr(), bias.data_ptr(), pointer(shift), rows, width, stride, DTYPES[x.dtype]
    )
    arguments = (ctypes.byref(struct), ctypes.c_float(eps), address(out), address(summed), address(statistics))
    call("maskdiff_cpu_layer_norm", *arguments)
    return out, summed, statistics


def run_backward(
    grad_out: Tensor,  # [..., D]
    grad_sum: Tensor | None,  # [..., D]
    x: Tensor,  # [..., D]
    weight: Tensor,  # [D] float32
    statistics: Tensor,  # [2, rows] float32
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # [..., D], [D] float32, [D] float32, [D]
    """The gradients of x, weight, bias and, given that of the sum, shift."""
    x, stride = rows_of(x)
    grad_out, out_stride = rows_of(grad_out)
    sum_stride, grad_shift = 0, None
    if grad_sum is not None:
        grad_sum, sum_stride = rows_of(grad_sum)
        grad_shift = torch.empty_like(weight, dtype=x.dtype)
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    grad_weight, grad_bias = torch.empty_like(weight), torch.empty_like(weight)
    width = x.shape[-1]
    numbers = (statistics.shape[1], width, stride, DTYPES[x.dtype])
    struct = LayerNormStruct(x.data_ptr(), weight.data_ptr(), None, None, *numbers)
    gradients = LayerNormGradientsStruct(
        statistics.data_ptr(),
        grad_out.data_ptr(),
        pointer(grad_sum),
        grad_x.data_ptr(),
        grad_weight.data_ptr(),
        grad_bias.data_ptr(),
        pointer(grad_shift),
        out_stride,
        sum_stride,
    )
    call("maskdiff_cpu_layer_norm_backward", ctypes.byref(struct), ctypes.byref(gradients))
    return grad_x, grad_weight, grad_bias, grad_shift


def rows_of(x: Tensor) -> tuple[Tensor, int]:
    """x as rows that are dense each, copied if need be, and the stride from one to the next."""
    if x.dim() == 2 and x.stride(1) == 1:
        return x, x.stride(0)
    return x.contiguous(), x.shape[-1]
