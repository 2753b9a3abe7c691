"""adamw_ema in plain PyTorch: what the op means. In float64 where the state is, which gives tests the truth."""

import torch
from torch import Tensor

from maskdiff_kernels.ops.adamw_ema.state import Update


def run(u: Update) -> tuple[Tensor, Tensor]:
    """Norm before clipping [] and skipped [], both of the masters' dtype; the state is updated in place."""
    dtype = u.master.dtype
    grads = [grad.reshape(-1).to(dtype) for grad in u.grads]
    norm = torch.stack([grad.square().sum() for grad in grads]).sum().sqrt()
    finite = norm.isfinite()
    lr, bound = u.hyper.to(dtype).unbind()
    clip = torch.where(norm > bound, bound / norm, torch.ones_like(norm))
    t, seen = (count.double() + 1 for count in (u.adam_step, u.ema_step))
    correction, correction_sq = ((1 - beta**t).to(dtype) for beta in (u.beta1, u.beta2))
    rows = zip(grads, u.decays, *map(u.parts, (u.master, u.exp_avg, u.exp_avg_sq)), strict=True)
    for grad, decays, master, exp_avg, exp_avg_sq in rows:
        g = clip * grad
        m = exp_avg + (1 - u.beta1) * (g - exp_avg)
        v = u.beta2 * exp_avg_sq + (1 - u.beta2) * g * g
        step = (m / correction) / ((v / correction_sq).sqrt() + u.eps)
        decayed = master * u.weight_decay if decays else 0
        for old, new in ((exp_avg, m), (exp_avg_sq, v), (master, master - lr * (step + decayed))):
            old.copy_(torch.where(finite, new, old))
    due = finite & u.due(seen)
    for ema, decay in u.averages(seen):
        keep, take = decay.to(dtype), (1 - decay).to(dtype)
        for old, master in zip(u.parts(ema), u.parts(u.master), strict=True):
            old.copy_(torch.where(due, keep * old + take * master, old))
    if u.low is not None:
        u.low.copy_(torch.where(finite, u.master[: u.low.shape[0]].to(u.low.dtype), u.low))
    u.adam_step.add_(finite)
    u.ema_step.add_(finite)
    return norm, (~finite).to(dtype)
