"""Noise schedules, loss weights, and the conversions between the three things a model may predict."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import UserError

SCHEDULES = ("linear", "cosine", "shifted-cosine")
TARGETS = ("eps", "x0", "v")


@dataclass(frozen=True)
class DiffusionConfig:
    """What is added to the images and what the model predicts. Raises UserError for values that do not exist."""

    schedule: str = "cosine"
    """noise schedule: linear, cosine, shifted-cosine"""
    shift: float = 1.0
    """of shifted-cosine: this resolution over the one that the schedule was made for (64 in the paper)"""
    timesteps: int = 1000
    """number of noise levels, T; 21 or more"""
    target: str = "eps"
    """what the model predicts: eps, x0, v"""
    min_snr: float | None = None
    """gamma of the min-SNR loss weights (5 in the paper); none: unweighted"""
    v_loss: float | None = None
    """weights the error as a loss on v would, whatever is predicted, up to this on x0's; none: unweighted"""

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise UserError(f"diffusion.schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        if self.target not in TARGETS:
            raise UserError(f"diffusion.target must be one of {', '.join(TARGETS)}, got {self.target!r}")
        if not (self.shift > 0 and math.isfinite(self.shift)):
            raise UserError(f"diffusion.shift must be a positive number, got {self.shift}")
        if self.schedule != "shifted-cosine" and self.shift != 1.0:
            raise UserError(
                f"diffusion.shift = {self.shift} has no effect on the {self.schedule} schedule: "
                "leave it at 1 or choose shifted-cosine"
            )
        if self.timesteps < 21:  # the linear schedule is scaled by 1000 / T: below, betas would reach 1
            raise UserError(f"diffusion.timesteps must be at least 21, got {self.timesteps}")
        for name in ("min_snr", "v_loss"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise UserError(f"diffusion.{name} must be positive, got {getattr(self, name)}")
        if self.min_snr is not None and self.v_loss is not None:
            raise UserError("diffusion.min_snr and diffusion.v_loss are two ways to weight the loss: set one of them")


def schedule_betas(config: DiffusionConfig) -> Tensor:  # [T] float64
    """The variance added at each step.

    linear: Ho et al., arXiv 2006.11239 (1e-4 to 0.02 at T = 1000, scaled so that other T end alike). cosine: Nichol and
    Dhariwal, arXiv 2102.09672, eq. 17. shifted-cosine: the cosine's log-SNR lowered by 2 log(shift), Hoogeboom et al.,
    arXiv 2301.11093, eq. 4.
    """
    steps = config.timesteps
    if config.schedule == "linear":
        scale = 1000 / steps
        return torch.linspace(scale * 1e-4, scale * 0.02, steps, dtype=torch.float64)
    offset = 0.008
    time = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    kept = torch.cos((time + offset) / (1 + offset) * math.pi / 2) ** 2  # alpha-bar, up to its first value
    if config.schedule == "shifted-cosine":
        ratio = 1 / config.shift**2  # on the signal-to-noise ratio kept / (1 - kept)
        kept = ratio * kept / (1 - kept + ratio * kept)
    return (1 - kept[1:] / kept[:-1]).clamp(0, 0.999)


class Diffusion:
    """The tables of a schedule, indexed by timestep, and conversions. x_t = alpha * x0 + sigma * eps."""

    betas: Tensor  # [T] float64
    alpha_sigma: Tensor  # [T, 2] float32
    weight: Tensor | None  # [T] float32 loss weights; None = all 1

    def __init__(self, config: DiffusionConfig):
        self.config = config
        self.betas = schedule_betas(config)
        kept = torch.cumprod(1 - self.betas, 0)
        self.alpha_sigma = torch.stack([kept.sqrt(), (1 - kept).sqrt()], dim=1).float()
        self.weight = _loss_weight(kept, config)

    def to(self, device: torch.device | str) -> "Diffusion":
        """Moves what a training step reads; betas stay where they are, on the CPU."""
        self.alpha_sigma = self.alpha_sigma.to(device)
        self.weight = None if self.weight is None else self.weight.to(device)
        return self

    def to_x0(
        self,
        prediction: Tensor,  # [B, ...]
        x_t: Tensor,  # [B, ...]
        t: Tensor,  # [B] integer or float, where the tables are
    ) -> Tensor:  # [B, ...] float32
        """The clean image that a prediction implies. (At the end of a cosine schedule eps divides by alpha = 5e-5.)"""
        alpha, sigma = self._at(t, x_t)
        if self.config.target == "eps":
            return (x_t - sigma * prediction) / alpha
        if self.config.target == "v":
            return alpha * x_t - sigma * prediction
        return prediction.float()

    def to_eps(
        self,
        prediction: Tensor,  # [B, ...]
        x_t: Tensor,  # [B, ...]
        t: Tensor,  # [B] integer
    ) -> Tensor:  # [B, ...] float32
        """The noise that a prediction implies."""
        alpha, sigma = self._at(t, x_t)
        if self.config.target == "x0":
            return (x_t - alpha * prediction) / sigma
        if self.config.target == "v":
            return sigma * x_t + alpha * prediction
        return prediction.float()

    def to_target(
        self,
        x0: Tensor,  # [B, ...]
        eps: Tensor,  # [B, ...]
        t: Tensor,  # [B] integer
    ) -> Tensor:  # [B, ...] float32
        """What the model should predict: eps, x0 or v = alpha * eps - sigma * x0 (arXiv 2202.00512)."""
        alpha, sigma = self._at(t, x0)
        if self.config.target == "v":
            return alpha * eps - sigma * x0
        return (eps if self.config.target == "eps" else x0).float()

    @property
    def levels(self) -> Tensor:  # [T] float64, on the CPU
        """sigma / alpha, the noise level in units of the image; between two timesteps it goes straight."""
        kept = torch.cumprod(1 - self.betas, 0)
        return ((1 - kept) / kept).sqrt()

    def _at(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        shape = (-1,) + (1,) * (like.dim() - 1)
        if t.is_floating_point():
            levels = self.levels.to(t.device)
            below = t.long().clamp(max=len(levels) - 2)
            level = torch.lerp(levels[below], levels[below + 1], t.double() - below)
            alpha = (1 + level**2).rsqrt()
            pair = torch.stack([alpha, level * alpha], dim=1).float()
        else:
            pair = self.alpha_sigma[t]
        alpha, sigma = pair.to(like.device).unbind(1)
        return alpha.view(shape), sigma.view(shape)


def _loss_weight(
    kept: Tensor,  # [T] float64 alpha-bar
    config: DiffusionConfig,
) -> Tensor | None:  # [T] float32
    """The weight of each timestep: one on the error of x0, expressed for what is predicted.

    min_snr: min(SNR, gamma), Hang et al., arXiv 2303.09556. v_loss: min(SNR + 1, cap). The error of v is 1 / sigma^2 =
    SNR + 1 times that of x0, and so a model that predicts x0, the easier thing for a narrow one, learns what one that
    predicts v would (Li and He, arXiv 2511.13720).
    """
    snr = kept / (1 - kept)
    if config.min_snr is not None:
        on_x0 = snr.clamp(max=config.min_snr)
    elif config.v_loss is not None:
        on_x0 = (snr + 1).clamp(max=config.v_loss)
    else:
        return None
    return {"x0": on_x0, "eps": on_x0 / snr, "v": on_x0 / (snr + 1)}[config.target].float()
