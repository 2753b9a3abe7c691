"""noisy_patches by the compiled CUDA library."""

import ctypes

import torch
from torch import Tensor

from maskdiff_kernels.ops.samples import Samples
from maskdiff_kernels.ops.structs import DTYPES, address, call_cuda
from maskdiff_kernels.ops.visible import cuda_struct


def run(samples: Samples, dtype: torch.dtype) -> Tensor:
    """x_t, [B, K, P*P*C] or [M, P*P*C]. Patches of numbers out of range are NaN: nothing is read back."""
    struct = cuda_struct("noisy_patches", samples)
    device = samples.keep_ids.device
    out = torch.empty((*samples.keep_ids.shape, samples.size), dtype=dtype, device=device)
    call_cuda("maskdiff_cuda_noisy_patches", device, ctypes.byref(struct), address(out), DTYPES[dtype])
    return out
