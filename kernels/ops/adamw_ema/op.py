"""adamw_ema: clipping, AdamW, weight averages and the low-precision weights in one pass. Contract, registration."""

from collections.abc import Sequence

import torch
from torch import Tensor

from maskdiff_kernels import dispatch
from maskdiff_kernels.ops.adamw_ema import apex, cpp, cuda, fused, reference
from maskdiff_kernels.ops.adamw_ema.averages import PowerEma
from maskdiff_kernels.ops.adamw_ema.state import SCHEMA, AdamState, Update, flatten
from maskdiff_kernels.ops.registration import registered


def adamw_ema(
    state: AdamState,
    grads: Sequence[Tensor] | Tensor,  # S tensors, float32 / bfloat16 / float16, or float32 [N]
    hyper: Tensor,  # [2] float32
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    ema_decay: float | PowerEma,
    ema2_decay: float | PowerEma = 0.0,
    ema_every: int = 1,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:  # [] float32, [] float32
    """Clips the gradients to a bound on their common norm, updates the weights by AdamW, then what follows from them:
    their averages and their low-precision copy.

    Where the norm is not finite, the state stays as it is and `skipped` is 1. Nothing is read back from a device.

    Args:
        state: what is updated, in place.
        grads: one dense gradient for each parameter, of its size, in any mixture of dtypes; or one float32 tensor
            [N] laid out as the state's buffers. Their values are undefined afterwards.
        hyper: learning rate, and bound on the gradient norm: infinity for none.
        betas, eps, weight_decay: AdamW's. Decay is that of the learning rate times the weight.
        ema_decay, ema2_decay: final decays of the averages. A decay rises to it as (1 + k) / (10 + k), k the updates
            that the average has seen, so that early averages are not stuck at the start. Or a PowerEma.
        ema_every: the averages change at every so many of the updates that they see, 1 to 1000, and stay as they are at
            the others: the compiled kernels then neither read nor write them. Such a change has the decays of all the
            updates since the last one, multiplied. Counts are exact up to 2^24 updates: longer runs take 1.
        backend: "auto", "cpp", "cuda", "torch", "apex" or "reference".

    Returns:
        - the norm of all gradients before clipping, [] float32.
        - skipped, [] float32: 1 where the norm was not finite, else 0. A sum of squares beyond float32 is not finite.

    Raises:
        TypeError, ValueError: an argument that does not fit, named, with what it got and what it takes.
        LibraryError: the compiled kernels are missing or stale; apex is missing.

    Source: Loshchilov and Hutter, arXiv 1711.05101, algorithm 2; the skip is PyTorch's `found_inf`.
    """
    numbers = (betas, eps, weight_decay, ema_decay, ema2_decay, ema_every)
    return _adamw_ema(*flatten(state, grads, hyper, *numbers), backend)


def _run(*arguments):
    *flat, backend = arguments
    update = Update(*flat)
    update.check()
    torch.autograd.graph.increment_version(update.written())
    return dispatch.choose("adamw_ema", update.master.device, backend).run(update)


def _fake(*arguments):
    master = arguments[0]
    return master.new_empty(()), master.new_empty(())


_adamw_ema = registered("adamw_ema", f"({SCHEMA}, str backend) -> (Tensor, Tensor)", _run, _fake)
dispatch.register("adamw_ema", cpp=cpp, cuda=cuda, torch=fused, apex=apex, reference=reference)
