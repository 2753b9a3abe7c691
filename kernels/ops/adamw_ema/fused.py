"""adamw_ema by PyTorch's own means: its fused AdamW, which unscales gradients on the fly and can skip, and lerp."""

import torch
from torch import Tensor

from maskdiff_kernels.ops.adamw_ema.state import Update


def run(u: Update) -> tuple[Tensor, Tensor]:
    """Norm before clipping [] and skipped [], float32. Float32 gradients are overwritten by the clipped ones."""
    grads = [grad.reshape(-1).float() for grad in u.grads]
    norm = _total_norm(grads)
    skipped = (~norm.isfinite()).float()
    lr, bound = u.hyper.unbind()
    scale = torch.where(norm > bound, norm / bound, torch.ones_like(norm))
    u.adam_step.add_(1 - skipped)
    u.ema_step.add_(1 - skipped)
    masters, exp_avgs, exp_avg_sqs = map(u.parts, (u.master, u.exp_avg, u.exp_avg_sq))
    for decays in (True, False):
        chosen = [i for i, d in enumerate(u.decays) if d == decays]
        if not chosen:
            continue
        torch._fused_adamw_(
            [masters[i] for i in chosen],
            [grads[i] for i in chosen],
            [exp_avgs[i] for i in chosen],
            [exp_avg_sqs[i] for i in chosen],
            [],
            [u.adam_step] * len(chosen),
            lr=lr,
            beta1=u.beta1,
            beta2=u.beta2,
            weight_decay=u.weight_decay if decays else 0.0,
            eps=u.eps,
            amsgrad=False,
            maximize=False,
            grad_scale=scale,
            found_inf=skipped,
        )
    update_averages(u, skipped)
    round_masters(u, skipped)
    return norm, skipped


def update_averages(
    u: Update,
    skipped: Tensor,  # [] float32: 1 where nothing is to change
) -> None:
    """Lets the averages follow the masters; `ema_step` counts this update already. Where they are not to change, their
    share of the new is 0: they are read and written all the same, since the host does not know."""
    due = u.due(u.ema_step) & (skipped == 0)
    for ema, decay in u.averages(u.ema_step):
        ema.lerp_(u.master, ((1 - decay) * due).float())


def round_masters(
    u: Update,
    skipped: Tensor,  # [] float32: 1 where nothing is to change
) -> None:
    """Makes the low-precision copy, if there is one."""
    if u.low is not None:
        u.low.copy_(torch.where(skipped > 0, u.low, u.master[: u.low.shape[0]].to(u.low.dtype)))


def _total_norm(grads: list[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, []. On a CPU by products, which run at 1.4x the rate of norms."""
    if grads[0].device.type != "cpu":
        return torch.nn.utils.get_total_norm(grads)
    return torch.stack([torch.dot(grad, grad) for grad in grads]).sum().sqrt()
