"""Drawing images with a trained model: diffusers' schedulers, classifier-free guidance, one generator per image."""

import math
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from maskdiff_kernels import philox

from .diffusion import Diffusion
from .errors import UserError
from .model import UViT

if TYPE_CHECKING:
    from PIL.Image import Image


def sample(
    model: UViT,
    diffusion: Diffusion,
    count: int,
    labels: Tensor | None = None,  # [count, A] integer, or [count] with one attribute; -1 = missing
    guidance: float = 1.0,
    steps: int = 50,
    eta: float = 0.0,
    seed: int = 0,
    batch: int = 64,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> Tensor:  # [count, H, W, C] uint8, on the CPU
    """Draws images by DDIM (Song et al., arXiv 2010.02502), x0 clipped to [-1, 1] and eps derived from it again.

    Args:
        model: runs in its own precision; the sampler's state is float32.
        diffusion: what the model was trained on.
        labels: None draws unconditionally.
        guidance: 1 = none; g moves each prediction to unconditional + g * (conditional - unconditional)
            (Ho and Salimans, arXiv 2207.12598).
        steps: model evaluations an image (twice as many with guidance), at most T.
        eta: 0 = deterministic, 1 = as much fresh noise a step as DDPM.
        seed: image i depends on (seed, i) alone, to rounding: not on count or batch.
        batch: images at a time.
        device: where to; the model is moved there. None: where it is.
        progress: shows a progress bar, where there is a terminal.

    Raises UserError for labels or guidance that the model does not take, and for step counts beyond T.
    """
    config = model.config
    device = torch.device(device) if device is not None else model.position.device
    model.to(device)
    if not 1 <= steps <= diffusion.config.timesteps:
        raise UserError(f"sampler steps must lie between 1 and {diffusion.config.timesteps}, got {steps}")
    if labels is None and guidance != 1.0:
        raise UserError(f"guidance of {guidance:g} needs labels to be guided by: give labels, or leave it at 1")
    if labels is not None:
        labels = _checked(labels, count, config.classes).to(device)
    shape = (config.channels, config.image_size, config.image_size)
    scheduler = make_scheduler(diffusion, steps)
    bar = None
    if progress:
        from tqdm import tqdm

        total = math.ceil(count / batch) * len(scheduler.timesteps)
        bar = tqdm(total=total, desc="sampling", unit="step", disable=None)
    images = []
    for ids in torch.arange(count).split(batch):
        generators = _generators(seed, ids)
        x = _normal(generators, shape, device) * scheduler.init_noise_sigma
        for t, following in zip(scheduler.timesteps.tolist(), [*scheduler.timesteps.tolist()[1:], -1], strict=True):
            # diffusers' DDIM moves by T // steps whatever the spacing: where steps does not divide T it would miss the
            # noise level of the next timestep, and leave noise in the image. This makes that quotient t - following.
            scheduler.num_inference_steps = Fraction(2 * diffusion.config.timesteps, 2 * (t - following) + 1)
            prediction = _predict(model, scheduler.scale_model_input(x, t), t, labels, ids, guidance)
            noise = _normal(generators, shape, device) if eta > 0 else None
            x = scheduler.step(
                prediction, t, x, eta=eta, use_clipped_model_output=True, variance_noise=noise, return_dict=False
            )[0]
            if bar is not None:
                bar.update()
        images.append(((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu())
    if bar is not None:
        bar.close()
    return torch.cat(images)


def make_scheduler(diffusion: Diffusion, steps: int) -> Any:
    """diffusers' DDIM on our betas, evaluated at `steps` timesteps from T - 1 down ("trailing")."""
    from diffusers import DDIMScheduler

    scheduler: Any = DDIMScheduler(
        num_train_timesteps=diffusion.config.timesteps,
        trained_betas=diffusion.betas.numpy(),
        prediction_type={"eps": "epsilon", "x0": "sample", "v": "v_prediction"}[diffusion.config.target],
        timestep_spacing="trailing",
        clip_sample=True,
        set_alpha_to_one=True,
    )
    scheduler.set_timesteps(steps)
    return scheduler


@torch.no_grad()
def _predict(
    model: UViT,
    x: Tensor,  # [B, C, H, W]
    t: int,
    labels: Tensor | None,  # [count, A]
    ids: Tensor,  # [B] int64
    guidance: float,
) -> Tensor:  # [B, C, H, W]
    if labels is None:
        return model.predict(x, torch.full((len(ids),), t, device=x.device))
    wanted = labels[ids.to(labels.device)]
    if guidance == 1.0:
        return model.predict(x, torch.full((len(ids),), t, device=x.device), wanted)
    both = torch.cat([wanted, torch.full_like(wanted, -1)])
    conditional, unconditional = model.predict(
        torch.cat([x, x]), torch.full((2 * len(ids),), t, device=x.device), both
    ).chunk(2)
    return unconditional + guidance * (conditional - unconditional)


def _generators(seed: int, ids: Tensor) -> list[torch.Generator]:
    words = philox.elements(torch.tensor([seed]), ids, philox.IMAGE_GENERATOR, 2)  # [B, 2]
    return [torch.Generator().manual_seed(low | high << 32) for low, high in words.tolist()]


def _normal(generators: list[torch.Generator], shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(device)


def _checked(labels: Tensor, count: int, classes: tuple[int, ...]) -> Tensor:
    if not classes:
        raise UserError("this model was trained without labels: leave the labels out")
    labels = labels[:, None] if labels.dim() == 1 else labels
    if tuple(labels.shape) != (count, len(classes)):
        raise UserError(f"labels must be [{count}, {len(classes)}] for {count} images, got {list(labels.shape)}")
    for attribute, (column, values) in enumerate(zip(labels.cpu().unbind(1), classes, strict=True)):
        if wrong := column[(column < -1) | (column >= values)].tolist():
            raise UserError(f"label {wrong[0]} of attribute {attribute}: it takes 0 to {values - 1}, or -1 for missing")
    return labels


def random_labels(
    count: int,
    classes: tuple[int, ...],
    seed: int = 0,
) -> Tensor:  # [count, A] int64
    """Labels drawn evenly over each attribute's values; image i's depend on (seed, i) alone."""
    words = philox.elements(torch.tensor([seed]), torch.arange(count), philox.IMAGE_GENERATOR, 2 + len(classes))
    return torch.stack([philox.high(words[:, 2 + a], values) for a, values in enumerate(classes)], dim=1)


def grid(
    images: Tensor,  # [N, H, W, C] uint8, C = 1 or 3
    gap: int = 2,
) -> "Image":
    """Lays images out in rows on white: nearly a square, without a gap at the end if a slightly wider one has none."""
    count, height, width, channels = images.shape
    root = math.sqrt(count)
    full = [across for across in range(math.ceil(root), int(1.6 * root) + 1) if count % across == 0]
    across = full[0] if full else math.ceil(root)
    down = math.ceil(count / across)
    sheet = torch.full((down * (height + gap) + gap, across * (width + gap) + gap, channels), 255, dtype=torch.uint8)
    for i, image in enumerate(images):
        top, left = gap + i // across * (height + gap), gap + i % across * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return to_image(sheet)


def to_image(
    pixels: Tensor,  # [H, W, C] uint8, C = 1 or 3
) -> "Image":
    """A Pillow image of mode L or RGB. Raises UserError for other numbers of channels."""
    from PIL import Image

    if pixels.shape[2] not in (1, 3):
        raise UserError(f"images of {pixels.shape[2]} channels cannot be saved as pictures: 1 or 3 can")
    return Image.fromarray(pixels.squeeze(2).numpy() if pixels.shape[2] == 1 else pixels.numpy())
