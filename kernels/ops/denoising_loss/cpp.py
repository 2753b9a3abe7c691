"""denoising_loss by the compiled CPU library."""

import ctypes

import torch
from torch import Tensor

from maskdiff_kernels.ops.denoising_loss.reference import factors
from maskdiff_kernels.ops.samples import Samples, check_cu_patches
from maskdiff_kernels.ops.structs import DTYPES, TARGETS, address, call, samples_struct


def run(
    prediction: Tensor,  # [B, K, P*P*C] or [M, P*P*C]
    samples: Samples,
    target: str,
    weight: Tensor | None,  # [T] float32
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [], per-sample losses [B], and 2 weight_t (prediction - target), shaped and typed like the prediction."""
    mean, per_sample = (prediction.new_empty(shape, dtype=torch.float32) for shape in ((), samples.n.shape))
    error = prediction.new_empty(prediction.shape if needs_grad else 0)
    strides = prediction.stride()
    code = call(
        "maskdiff_cpu_denoising_loss",
        ctypes.byref(samples_struct(samples)),
        address(prediction),
        ctypes.c_int64(strides[0]),
        ctypes.c_int64(strides[-2]),
        DTYPES[prediction.dtype],
        TARGETS[target],
        address(weight),
        address(mean),
        address(per_sample),
        address(error if needs_grad else None),
    )
    if code:
        samples.check_ranges()  # says which number it is
    return mean, per_sample, error


def run_backward(
    error: Tensor,  # [B, K, P*P*C] or [M, P*P*C]
    cu_patches: Tensor | None,  # [B + 1] int32
    grad_mean: Tensor,  # [] float32
    grad_per_sample: Tensor,  # [B] float32, of any stride
) -> Tensor:
    """error times the factor of its sample, rounded once."""
    factor = factors(error, cu_patches, grad_mean, grad_per_sample)
    gradient = torch.empty_like(error)
    total = error.numel() // error.shape[-1]
    code = call(
        "maskdiff_cpu_denoising_loss_backward",
        address(error),
        address(cu_patches),
        address(factor),
        ctypes.c_int64(factor.shape[0]),
        ctypes.c_int64(total),
        ctypes.c_int64(error.shape[-1]),
        DTYPES[error.dtype],
        address(gradient),
    )
    if code and cu_patches is not None:
        check_cu_patches(cu_patches, total)
    return gradient
