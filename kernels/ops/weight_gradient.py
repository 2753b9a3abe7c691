"""The gradient of a Linear layer's weight by the compiled CPU library, where AMX makes that faster than PyTorch's."""

import ctypes

import torch
from torch import Tensor

from maskdiff_kernels import library
from maskdiff_kernels.ops.structs import WeightGradientStruct, call

SIDE = 32  # what a layer's widths must be multiples of


def takes(grad_out: Tensor, x: Tensor) -> bool:
    """Whether `run` is for these: bfloat16 on a CPU with AMX."""
    return (
        grad_out.dtype == x.dtype == torch.bfloat16
        and grad_out.is_cpu
        and grad_out.shape[1] % SIDE == x.shape[1] % SIDE == 0
        and library.cpu_level() == "amx_bf16"
    )


def run(
    grad_out: Tensor,  # [T, N] bfloat16
    x: Tensor,  # [T, K] bfloat16
) -> Tensor:  # [N, K] bfloat16
    """The transpose of grad_out times x, summed in float32 and rounded once."""
    grad_out, x = (factor if factor.stride(1) == 1 else factor.contiguous() for factor in (grad_out, x))
    out = x.new_empty(grad_out.shape[1], x.shape[1])
    strides = (grad_out.stride(0), x.stride(0), out.stride(0))
    struct = WeightGradientStruct(grad_out.data_ptr(), x.data_ptr(), out.data_ptr(), len(x), *out.shape, *strides)
    call("maskdiff_cpu_weight_gradient", ctypes.byref(struct))
    return out
