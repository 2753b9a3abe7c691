"""noisy_patches in plain PyTorch: what the op means. `compute` is float64 where a test wants the truth."""

import torch
from torch import Tensor

from maskdiff_kernels import philox
from maskdiff_kernels.ops.samples import Samples


def run(samples: Samples, dtype: torch.dtype, compute: torch.dtype = torch.float32) -> Tensor:
    """x_t, [B, K, P*P*C] or [M, P*P*C]."""
    if samples.keep_ids.is_cpu:
        samples.check_ranges()
    x = clean(samples, compute)
    if samples.alpha_sigma is not None:
        alpha, sigma = coefficients(samples, compute)
        x = alpha * x + sigma * noise(samples, compute)
    return x.to(dtype).view(*samples.keep_ids.shape, samples.size)


def clean(samples: Samples, compute: torch.dtype) -> Tensor:  # [M, P*P*C]
    """The visible patches x_0 in [-1, 1], mirrored where the sample is flipped."""
    pixels, flip = samples.stored(), samples.flip[samples.sample()]
    mirrored = pixels.unflatten(1, (samples.patch, samples.patch, -1)).flip(2).flatten(1)
    return torch.where(flip[:, None], mirrored, pixels).to(compute) * (2 / 255) - 1


def coefficients(samples: Samples, compute: torch.dtype) -> tuple[Tensor, Tensor]:  # [M, 1], [M, 1]
    """alpha_t and sigma_t of each visible patch."""
    assert samples.alpha_sigma is not None
    alpha, sigma = samples.alpha_sigma[samples.timestep[samples.sample()]].to(compute).split(1, dim=1)
    return alpha, sigma


def noise(samples: Samples, compute: torch.dtype) -> Tensor:  # [M, P*P*C]
    """eps of each visible patch."""
    n = samples.n[samples.sample()]
    return philox.noise(samples.seed, n, samples.keep_ids.flatten(), samples.size, compute)
