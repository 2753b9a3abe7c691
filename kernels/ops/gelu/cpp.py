"""gelu by the compiled CPU library."""

import ctypes

import torch
from torch import Tensor

from maskdiff_kernels.ops.structs import DTYPES, address, call


def run(x: Tensor) -> Tensor:
    """x Phi(x), rounded once; x is dense."""
    out = x.new_empty(x.shape)
    call("maskdiff_cpu_gelu", address(x), ctypes.c_int64(x.numel()), DTYPES[x.dtype], address(out))
    return out


def run_backward(
    grad_out: Tensor,  # like x, both dense
    x: Tensor,  # [.., N]
    sums: bool,
) -> tuple[Tensor, Tensor]:  # like x; [N] float32, else [0]
    """The gradient of x, rounded once, and its sums over all but the last dimension, before it is rounded."""
    columns = x.shape[-1]
    grad, total = x.new_empty(x.shape), x.new_empty(columns if sums else 0, dtype=torch.float32)
    call(
        "maskdiff_cpu_gelu_backward",
        address(x),
        address(grad_out),
        ctypes.c_int64(x.numel() // columns if columns else 0),
        ctypes.c_int64(columns),
        DTYPES[x.dtype],
        address(grad),
        address(total if sums else None),
    )
    return grad, total
