"""Products of a Linear layer and of its gradients by the compiled CPU library, where that is faster than PyTorch.

In bfloat16 on a CPU with AMX. Where it pays was measured: docs/notebook.md.
"""

import ctypes

import torch
from torch import Tensor

from maskdiff_kernels import library
from maskdiff_kernels.ops.registration import unseen
from maskdiff_kernels.ops.structs import ProductStruct, call

SIDE = 32  # what a layer's widths must be multiples of
FEW_ROWS, FEW_COLUMNS, LONG = 1280, 768, 1024  # at most, at most, at least: where oneDNN 3.12 leaves a thread idle
MOST_THREADS = 2  # with more nothing was measured, and each packs one factor for itself


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether this library makes products of such an x, [T, K] or [T, N], with such a weight, [N, K]."""
    return (
        x.dtype == weight.dtype == torch.bfloat16
        and x.is_cpu
        and unseen(x)
        and weight.shape[0] % SIDE == weight.shape[1] % SIDE == 0
        and torch.get_num_threads() <= MOST_THREADS
        and library.cpu_level() == "amx_bf16"
    )


def leaves_threads_idle(rows: int, columns: int, depth: int) -> bool:
    """Whether PyTorch would make a product [rows, depth] x [depth, columns] on one thread of two: oneDNN 3.12 does so
    with most of those that have few rows and columns, and is not much faster with the others."""
    return torch.get_num_threads() == 2 and rows <= FEW_ROWS and columns <= FEW_COLUMNS and depth >= LONG


def add_linear(
    out: Tensor,  # [T, N] bfloat16: changed
    x: Tensor,  # [T, K] bfloat16
    weight: Tensor,  # [N, K] bfloat16
) -> Tensor:  # [T, N] bfloat16
    """out plus x times the transpose of weight, summed in float32 and rounded once."""
    return _product(x, weight, out, right_transposed=True, add=True)


def input_gradient(
    grad_out: Tensor,  # [T, N] bfloat16
    weight: Tensor,  # [N, K] bfloat16
) -> Tensor:  # [T, K] bfloat16
    """grad_out times weight, summed in float32 and rounded once."""
    return _product(grad_out, weight, grad_out.new_empty(len(grad_out), weight.shape[1]))


def weight_gradient(
    grad_out: Tensor,  # [T, N] bfloat16
    x: Tensor,  # [T, K] bfloat16
) -> Tensor:  # [N, K] bfloat16
    """The transpose of grad_out times x, summed in float32 and rounded once."""
    return _product(grad_out, x, x.new_empty(grad_out.shape[1], x.shape[1]), left_transposed=True)


def _product(
    left: Tensor,  # [M, K], or [K, M] where it is transposed
    right: Tensor,  # [K, N], or [N, K]
    out: Tensor,  # [M, N]
    left_transposed: bool = False,
    right_transposed: bool = False,
    add: bool = False,
) -> Tensor:
    left, right = (x if x.stride(1) == 1 and x.stride(0) % 2 == 0 else x.contiguous() for x in (left, right))
    strides = (left.stride(0), right.stride(0), out.stride(0))
    pointers = (left.data_ptr(), right.data_ptr(), out.data_ptr())
    options = (left_transposed, right_transposed, add)
    struct = ProductStruct(*pointers, *out.shape, right.shape[right_transposed], *strides, *options)
    call("maskdiff_cpu_product", ctypes.byref(struct))
    return out
