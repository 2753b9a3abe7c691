"""denoising_loss by the compiled CUDA library."""

import ctypes
import itertools

import torch
from torch import Tensor

from maskdiff_kernels import library
from maskdiff_kernels.ops.samples import Samples
from maskdiff_kernels.ops.structs import DTYPES, TARGETS, address, call_cuda, current_stream
from maskdiff_kernels.ops.visible import cuda_struct

COUNTERS = 16384  # MASKDIFF_CUDA_COUNTERS

_fresh = itertools.count()
_of_stream: dict[tuple[int | None, int | None], int] = {}


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
    struct, device, strides = cuda_struct("denoising_loss", samples), prediction.device, prediction.stride()
    mean, per_sample = (prediction.new_empty(shape, dtype=torch.float32) for shape in ((), samples.n.shape))
    error = torch.empty(prediction.shape if needs_grad else 0, dtype=prediction.dtype, device=device)
    count = library.cuda().maskdiff_cuda_denoising_loss_workspace
    count.restype = ctypes.c_int64
    workspace = torch.empty(count(ctypes.byref(struct)), dtype=torch.float64, device=device)
    call_cuda(
        "maskdiff_cuda_denoising_loss",
        device,
        ctypes.byref(struct),
        address(prediction),
        ctypes.c_int64(strides[0]),
        ctypes.c_int64(strides[-2]),
        DTYPES[prediction.dtype],
        TARGETS[target],
        address(weight),
        address(mean),
        address(per_sample),
        address(error if needs_grad else None),
        address(workspace),
        counter(device),
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
    batch, total = grad_per_sample.shape[0], error.numel() // error.shape[-1]
    call_cuda(
        "maskdiff_cuda_denoising_loss_backward",
        error.device,
        *map(address, (error, cu_patches, grad_mean, grad_per_sample)),
        *map(ctypes.c_int64, (grad_per_sample.stride(0), batch, total, error.shape[-1])),
        DTYPES[error.dtype],
        address(gradient),
    )
    return gradient


def counter(device: torch.device) -> int:
    """The number of the counter that a launch uses: launches that may run side by side must not share one.

    Those of a stream run one after another. A graph that is being captured may later run beside anything: each launch
    in it keeps one of its own.
    """
    if device.type == "cuda" and capturing(device):
        number = next(_fresh)
    else:
        key = device.index, current_stream(device)
        number = _of_stream[key] if key in _of_stream else _of_stream.setdefault(key, next(_fresh))
    if number >= COUNTERS:
        raise RuntimeError(f"denoising_loss: captured in graphs {COUNTERS} times, takes no more in a process")
    return number


def capturing(device: torch.device) -> bool:
    """Whether a graph is being captured on the current stream of `device`, which need not be the current device."""
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()
