"""adamw_ema by the compiled CUDA library."""

import ctypes

import torch
from torch import Tensor

from maskdiff_kernels import library
from maskdiff_kernels.ops.adamw_ema.state import Update
from maskdiff_kernels.ops.structs import adamw_structs, address, call_cuda


def run(u: Update) -> tuple[Tensor, Tensor]:
    """Norm before clipping [] and skipped [], float32; the state is updated in place. Nothing is read back."""
    device = u.master.device
    norm, skipped = u.master.new_empty(()), u.master.new_empty(())
    workspace = torch.empty(library.cuda().maskdiff_cuda_adamw_ema_workspace(), dtype=torch.float64, device=device)
    outputs = map(address, (norm, skipped, workspace))
    call_cuda("maskdiff_cuda_adamw_ema", device, *map(ctypes.byref, adamw_structs(u)), *outputs)
    return norm, skipped
