"""adamw_ema by the kernels of NVIDIA apex's FusedAdam, in its capturable form; averages by PyTorch.

Where a gradient has the dtype of the low-precision copy, the kernel writes that part of the copy too. The betas are
float32 there: an average's share of the new, 1 - beta, differs from another implementation's by some 2^-25.
"""

import functools
import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from maskdiff_kernels.library import LibraryError
from maskdiff_kernels.ops.adamw_ema.fused import round_masters, update_averages
from maskdiff_kernels.ops.adamw_ema.state import Update

CHUNK = 2048 * 32  # elements that a block updates, as apex itself takes them
DECOUPLED, CORRECTED = 1, 1  # AdamW's weight decay, and correction of the moments' bias
NEEDS = ("multi_tensor_l2norm", "multi_tensor_adam_capturable", "multi_tensor_adam_capturable_master")
INSTALL = (
    "build NVIDIA's from github.com/NVIDIA/apex: APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-build-isolation ."
)


@functools.cache
def kernels() -> ModuleType:
    """apex's compiled module. Raises LibraryError where it is absent, too old, or another project's of that name."""
    try:
        module = importlib.import_module("amp_C")
    except ImportError as error:
        raise LibraryError(f"{_missing(error)}; {INSTALL}") from None
    if lacking := [name for name in NEEDS if not hasattr(module, name)]:
        raise LibraryError(f"the apex installed here is too old, it has no {lacking[0]}; {INSTALL}")
    return module


def _missing(error: ImportError) -> str:
    found = importlib.util.find_spec("apex")  # looks for it only: a stranger's code is not to run
    if found is None:
        return "apex is not installed"
    if any((Path(place) / "multi_tensor_apply").is_dir() for place in found.submodule_search_locations or ()):
        return f"the apex installed here has no CUDA extensions ({error})"
    return "the package apex that is installed here is PyPI's, another project of that name"


def load() -> str:
    """In a few words, what would run."""
    kernels()
    return "NVIDIA apex's FusedAdam"


def run(u: Update) -> tuple[Tensor, Tensor]:
    """Norm before clipping [] and skipped [], float32. Nothing is read back."""
    apex, device = kernels(), u.master.device
    flag = torch.zeros(1, dtype=torch.int32, device=device)
    norm = _total_norm(u, flag)
    skipped = (~norm.isfinite()).float()
    lr, bound = u.hyper.unbind()
    flag.copy_(skipped)
    clip = torch.where(norm > bound, bound / norm, torch.ones_like(norm)).view(1)
    u.adam_step.add_(1 - skipped)
    u.ema_step.add_(1 - skipped)
    step = u.adam_step.to(torch.int32).view(1)
    flats = [u.parts(flat) for flat in (u.exp_avg, u.exp_avg_sq, u.master)]
    lows = _lows(u)
    for decays, dtype in dict.fromkeys(zip(u.decays, map(_dtype, lows), strict=True)):
        chosen = [i for i, low in enumerate(lows) if u.decays[i] == decays and _dtype(low) == dtype]
        grads, copies = [u.grads[i].reshape(-1) for i in chosen], [low for i in chosen if (low := lows[i]) is not None]
        exp_avgs, exp_avg_sqs, masters = ([parts[i] for i in chosen] for parts in flats)
        if dtype == torch.float32:
            update = apex.multi_tensor_adam_capturable
            tensors = [[grad.float() for grad in grads], masters, exp_avgs, exp_avg_sqs]
        else:
            update = apex.multi_tensor_adam_capturable_master
            tensors = [grads, copies, exp_avgs, exp_avg_sqs, masters]
        weight_decay = u.weight_decay if decays else 0.0
        numbers = (u.beta1, u.beta2, u.eps, step, DECOUPLED, CORRECTED, weight_decay)
        update(CHUNK, flag, tensors, lr.view(1), *numbers, clip)
    update_averages(u, skipped)
    if any(low is None for low in lows):
        round_masters(u, skipped)
    return norm, skipped


def _lows(u: Update) -> list[Tensor | None]:
    """The parts of the copy that the kernel can write itself: whole ones, of their gradients' dtype."""
    low, ends = u.low, zip(u.offsets, u.sizes, strict=True)
    if low is None:
        return [None] * len(u.offsets)
    return [
        low[offset : offset + size] if grad.dtype == low.dtype and offset + size <= low.shape[0] else None
        for grad, (offset, size) in zip(u.grads, ends, strict=True)
    ]


def _dtype(low: Tensor | None) -> torch.dtype:
    return torch.float32 if low is None else low.dtype


def _total_norm(
    u: Update,
    flag: Tensor,  # [1] int32: scratch
) -> Tensor:  # [] float32
    """The 2-norm of all gradients together: of each dtype's, then of those. Infinite where its square is."""
    norms = []
    for dtype in dict.fromkeys(grad.dtype for grad in u.grads):
        grads = [grad.reshape(-1) for grad in u.grads if grad.dtype == dtype]
        norms.append(kernels().multi_tensor_l2norm(CHUNK, flag, [grads], False)[0])
    square = torch.cat(norms).double().square().sum()
    return torch.where(square.float().isfinite(), square.sqrt().float(), square.float())
