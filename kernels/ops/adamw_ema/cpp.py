"""adamw_ema by the compiled CPU library."""

import ctypes

from torch import Tensor

from maskdiff_kernels.ops.adamw_ema.state import Update
from maskdiff_kernels.ops.structs import adamw_structs, address, call


def run(u: Update) -> tuple[Tensor, Tensor]:
    """Norm before clipping [] and skipped [], float32; the state is updated in place."""
    norm, skipped = u.master.new_empty(()), u.master.new_empty(())
    call("maskdiff_cpu_adamw_ema", *map(ctypes.byref, adamw_structs(u)), address(norm), address(skipped))
    return norm, skipped
