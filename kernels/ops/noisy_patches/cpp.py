"""noisy_patches by the compiled CPU library."""

import ctypes

import torch
from torch import Tensor

from maskdiff_kernels.ops.samples import Samples
from maskdiff_kernels.ops.structs import DTYPES, address, call, samples_struct


def run(samples: Samples, dtype: torch.dtype) -> Tensor:
    """x_t, [B, K, P*P*C] or [M, P*P*C]."""
    out = samples.keep_ids.new_empty((*samples.keep_ids.shape, samples.size), dtype=dtype)
    struct = samples_struct(samples)
    if call("maskdiff_cpu_noisy_patches", ctypes.byref(struct), address(out), DTYPES[dtype]):
        samples.check_ranges()  # says which number it is
    return out
