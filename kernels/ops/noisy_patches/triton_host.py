"""noisy_patches in Triton: launches the kernel of triton_kernel.py."""

import torch
from torch import Tensor

from maskdiff_kernels.ops import triton_visible
from maskdiff_kernels.ops.samples import Samples
from maskdiff_kernels.triton_package import kernels, on

PROGRAMS = 2048  # twice what an H100 holds at a time, with 256 threads each


def run(samples: Samples, dtype: torch.dtype) -> Tensor:
    """x_t, [B, K, P*P*C] or [M, P*P*C]. Patches of numbers out of range are NaN: nothing is read back."""
    given = triton_visible.arguments("noisy_patches", samples)
    device, batch, quads = samples.keep_ids.device, samples.n.shape[0], triton_visible.quads_of(samples)
    out = torch.empty((*samples.keep_ids.shape, samples.size), dtype=dtype, device=device)
    if quads == 0:
        return out
    parts = triton_visible.parts_of(quads, batch, triton_visible.Q, PROGRAMS, PROGRAMS)
    kernel = kernels("noisy_patches").gather_and_add_noise
    with on(device):
        kernel[(batch * parts,)](**given, out=out, parts=parts, **triton_visible.OPTIONS)
    return out
