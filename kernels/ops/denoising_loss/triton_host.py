"""denoising_loss in Triton: launches the kernels of triton_kernel.py."""

import functools

import torch
from torch import Tensor

from maskdiff_kernels.ops import triton_visible
from maskdiff_kernels.ops.denoising_loss.cuda import COUNTERS, capturing, counter
from maskdiff_kernels.ops.samples import Samples
from maskdiff_kernels.ops.structs import TARGETS
from maskdiff_kernels.triton_package import kernels, on

PROGRAMS, MOST_SUMS = 1024, 64  # in all, as an H100 holds at a time; of a sample, which one thread adds up
MOST_SCALED = 65535
BLOCK = 2048


def run(
    prediction: Tensor,  # [B, K, P*P*C] or [M, P*P*C]
    samples: Samples,
    target: str,
    weight: Tensor | None,  # [T] float32
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [], per-sample losses [B], and 2 weight_t (prediction - target), shaped and typed like the prediction.

    Losses and gradients of numbers out of range are NaN: nothing is read back.
    """
    given = triton_visible.arguments("denoising_loss", samples)
    device, batch, strides = prediction.device, samples.n.shape[0], prediction.stride()
    mean, per_sample = (prediction.new_empty(shape, dtype=torch.float32) for shape in ((), (batch,)))
    error = torch.empty(prediction.shape if needs_grad else 0, dtype=prediction.dtype, device=device)
    parts = triton_visible.parts_of(triton_visible.quads_of(samples), batch, triton_visible.Q, PROGRAMS, MOST_SUMS)
    at = counter(device)
    with on(device):
        kernels("denoising_loss").score[(batch * parts,)](
            **given,
            prediction=prediction,
            sample_stride=strides[0] if samples.cu_patches is None else 0,
            patch_stride=strides[-2],
            weight=weight,
            error=error if needs_grad else None,
            sums=torch.empty(batch * parts, dtype=torch.float64, device=device),
            per_sample=per_sample,
            mean=mean,
            counter=_counters(device)[at],
            batch=batch,
            parts=parts,
            TARGET=TARGETS[target],
            **triton_visible.OPTIONS,
        )
    return mean, per_sample, error


def run_backward(
    error: Tensor,  # [B, K, P*P*C] or [M, P*P*C]
    cu_patches: Tensor | None,  # [B + 1] int32
    grad_mean: Tensor,  # [] float32
    grad_per_sample: Tensor,  # [B] float32, of any stride
) -> Tensor:
    """error times the factor of its sample, rounded once."""
    gradient = torch.empty_like(error)
    batch, elements = grad_per_sample.shape[0], error.shape[-1]
    total = error.numel() // elements
    if total == 0:
        return gradient
    parts = triton_visible.parts_of(error.numel(), batch, BLOCK, batch * MOST_SCALED, MOST_SCALED)
    with on(error.device):
        kernels("denoising_loss").scale[(batch * parts,)](
            error=error,
            cu_patches=cu_patches,
            grad_mean=grad_mean,
            grad_per_sample=grad_per_sample,
            gradient=gradient,
            grad_stride=grad_per_sample.stride(0),
            visible=0 if cu_patches is not None else error.shape[1],
            total=total,
            batch=batch,
            parts=parts,
            ELEMENTS=elements,
            BLOCK=BLOCK,
            **triton_visible.OPTIONS,
        )
    return gradient


@functools.cache
def _counters(device: torch.device) -> Tensor:  # [COUNTERS, 4] int32
    """Those that `counter` numbers, zero between launches; 16 bytes apart: alignment is compiled in."""
    if device.type == "cuda" and capturing(device):
        raise RuntimeError("denoising_loss: captured in a graph at its first call, takes one outside before")
    made = torch.zeros(COUNTERS, 4, dtype=torch.int32, device=device)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # other streams will count here too
    return made
