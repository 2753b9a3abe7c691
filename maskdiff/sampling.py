"""Drawing images with a trained model: diffusers' schedulers, classifier-free guidance, one generator per image."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from maskdiff_kernels import philox

from .diffusion import Diffusion
from .errors import UserError
from .model import ModelConfig, UViT, check_labels

if TYPE_CHECKING:
    from PIL.Image import Image

SamplerName = Literal["ddim", "ddpm", "dpm++", "unipc", "heun"]
SAMPLERS: tuple[str, ...] = get_args(SamplerName)

# Where images start: given image numbers [B], unit normal noise [B, C, H, W] and the generators of later noise.
Start = Callable[[Tensor], tuple[Tensor, "list[torch.Generator] | None"]]


@dataclass(frozen=True)
class Sampler:
    """How noise becomes images. Raises UserError for what does not exist.

    ddim: Song et al., arXiv 2010.02502. ddpm: Ho et al., arXiv 2006.11239, over any number of steps; ddim with eta = 1
    is the same. dpm++: DPM-Solver++ 2M, Lu et al., arXiv 2211.01095. unipc: UniPC-2, Zhao et al., arXiv 2302.04867.
    heun: Karras et al., arXiv 2206.00364, algorithm 1 on their noise levels.
    """

    name: str = "ddim"
    steps: int = 50  # model evaluations an image (twice as many with guidance), at most T; heun makes 2 k - 1 of them
    eta: float = 0.0  # ddim alone: 0 = deterministic, 1 = as much fresh noise a step as ddpm
    guidance: float = 1.0  # 1 = none; g moves predictions to unconditional + g * (conditional - unconditional)

    def __post_init__(self) -> None:
        if self.name not in SAMPLERS:
            raise UserError(f"no sampler {self.name!r}; there are {', '.join(SAMPLERS)}")
        if self.steps < 1:
            raise UserError(f"sampler steps must be at least 1, got {self.steps}")
        if not 0 <= self.eta <= 1:
            raise UserError(f"eta must lie between 0 and 1, got {self.eta:g}")
        if self.eta and self.name != "ddim":
            raise UserError(f"eta belongs to ddim: with sampler {self.name} leave it at 0, got {self.eta:g}")
        if not math.isfinite(self.guidance):
            raise UserError(f"guidance must be a number, got {self.guidance}")

    @property
    def deterministic(self) -> bool:
        """True where the first noise alone decides what is drawn."""
        return self.name != "ddpm" and self.eta == 0


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
    sampler: str = "ddim",
) -> Tensor:  # [count, H, W, C] uint8, on the CPU
    """Draws images.

    Args:
        model: runs in its own precision; the sampler's state is float32.
        diffusion: what the model was trained on.
        labels: None draws unconditionally.
        guidance, steps, eta, sampler: see `Sampler`. Guidance: Ho and Salimans, arXiv 2207.12598.
        seed: image i depends on (seed, i) alone, to rounding: not on count or batch.
        batch: images at a time.
        device: where to; the model is moved there. None: where it is.
        progress: shows a progress bar, where there is a terminal.

    Raises UserError for labels, guidance or samplers that do not exist or do not go together, and for step counts
    beyond T.
    """
    if device is not None:
        model.to(device)
    how = Sampler(sampler, steps, eta, guidance)
    drawn = batches(model, diffusion, how, seeded(model.config, seed), torch.arange(count), labels, batch, progress)
    return torch.cat([images for _, images in drawn])


def batches(
    model: UViT,
    diffusion: Diffusion,
    sampler: Sampler,
    start: Start,
    ids: Tensor,  # [N] int64, which images
    labels: Tensor | None = None,  # [most id + 1, A] or more; -1 = missing
    batch: int = 64,
    progress: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:  # ids [B], images [B, H, W, C] uint8 on the CPU
    """Draws the images of these numbers, so many at a time. Raises UserError as `sample` does, before the first."""
    make_scheduler(diffusion, sampler)
    if sampler.guidance != 1.0 and not model.config.classes:
        raise UserError(
            f"guidance of {sampler.guidance:g} needs labels, and this model was trained without: leave it at 1, "
            "or train one with --data.labels"
        )
    if labels is None and sampler.guidance != 1.0:
        raise UserError(f"guidance of {sampler.guidance:g} needs labels to be guided by: give labels, or leave it at 1")
    if labels is not None:
        labels = _checked(labels, int(ids.max()) + 1, model.config.classes)
    return _batches(model, diffusion, sampler, start, ids, labels, batch, progress)


def _batches(
    model: UViT,
    diffusion: Diffusion,
    sampler: Sampler,
    start: Start,
    ids: Tensor,
    labels: Tensor | None,
    batch: int,
    progress: bool,
) -> Iterator[tuple[Tensor, Tensor]]:
    device, bar = model.position.device, None
    if progress:
        from tqdm import tqdm

        counts = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]"
        bar = tqdm(total=len(ids), desc="sampling", unit=" images", disable=None, bar_format=counts)
    for part in ids.split(batch):
        noise, generators = start(part)
        share = len(part) / evaluations(sampler)
        images = draw(
            model,
            diffusion,
            sampler,
            noise.to(device),
            generators,
            None if labels is None else labels[part.to(labels.device)].to(device),
            None if bar is None else lambda *_, share=share: bar.update(share),
        )
        yield part, to_bytes(images)
    if bar is not None:
        bar.close()


@torch.no_grad()
def draw(
    model: UViT,
    diffusion: Diffusion,
    sampler: Sampler,
    noise: Tensor,  # [B, C, H, W] unit normal
    generators: list[torch.Generator] | None = None,  # B on the CPU: later noise of a sampler that is not deterministic
    labels: Tensor | None = None,  # [B, A] integer, -1 = missing
    watch: Callable[[float, Tensor, Tensor], None] | None = None,
) -> Tensor:  # [B, C, H, W] float32, from -1 to 1 or a little beyond
    """Turns noise into images. The model's guess of the image is clipped to [-1, 1] before it moves anything.

    `watch` is called after each evaluation of the model with the timestep, x_t as the model saw it, and that guess.
    """
    scheduler = make_scheduler(diffusion, sampler)
    timesteps = scheduler.timesteps.tolist()
    x = noise.float() * scheduler.init_noise_sigma
    for t, following in zip(timesteps, [*timesteps[1:], -1], strict=True):
        shown = scheduler.scale_model_input(x, t)
        time = torch.full((len(x),), t)
        prediction = _predict(model, shown, time.to(x.device), labels, sampler.guidance)
        x0 = diffusion.to_x0(prediction, shown, time).clamp(-1, 1)
        more: dict[str, Any] = {}
        if sampler.name == "ddpm":
            more["generator"] = generators
        elif sampler.name == "ddim":
            # diffusers' DDIM moves by T // steps whatever the spacing: where steps does not divide T it would miss the
            # noise level of the next timestep, and leave noise in the image. This makes that quotient t - following.
            scheduler.num_inference_steps = Fraction(2 * diffusion.config.timesteps, 2 * (t - following) + 1)
            more["eta"] = sampler.eta
            if sampler.eta > 0:
                assert generators is not None
                more["variance_noise"] = _normal(generators, noise.shape[1:], x.device)
        x = scheduler.step(x0, t, x, return_dict=False, **more)[0]
        if watch is not None:
            watch(t, shown, x0)
    return x


def evaluations(sampler: Sampler) -> int:
    """How often the model is evaluated for an image: heun evaluates it twice a step, the last one once."""
    return sampler.steps - (1 - sampler.steps % 2) if sampler.name == "heun" else sampler.steps


SIGMA_MAX, RHO = 80.0, 7.0  # of Karras et al., table 1


def make_scheduler(diffusion: Diffusion, sampler: Sampler) -> Any:
    """diffusers' scheduler of that name on our betas, given the model's guesses of the image whatever it predicts.

    Timesteps go down evenly from T - 1 ("trailing"). heun's are seldom whole: they follow the noise levels of Karras et
    al., eq. 5, from sigma / alpha = 80 at most. From the 20,000 where a cosine schedule ends, one step of heun goes far
    astray: on even timesteps, 25 evaluations drew Gaussian data twice as wide. Raises UserError for more steps than T.
    """
    import diffusers
    import numpy as np

    if sampler.steps > diffusion.config.timesteps:
        raise UserError(f"sampler steps must lie between 1 and {diffusion.config.timesteps}, got {sampler.steps}")
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "ddim": ("DDIMScheduler", {"clip_sample": False}),
        "ddpm": ("DDPMScheduler", {"clip_sample": False}),
        "dpm++": ("DPMSolverMultistepScheduler", {}),
        "unipc": ("UniPCMultistepScheduler", {}),
        "heun": ("HeunDiscreteScheduler", {"clip_sample": False}),
    }
    kind, settings = kinds[sampler.name]
    scheduler: Any = getattr(diffusers, kind)(
        num_train_timesteps=diffusion.config.timesteps,
        trained_betas=diffusion.betas.numpy(),
        prediction_type="sample",
        timestep_spacing="trailing",
        **settings,
    )
    if sampler.name == "heun":
        levels = diffusion.levels.numpy()
        ends = min(SIGMA_MAX, levels[-1]) ** (1 / RHO), levels[0] ** (1 / RHO)
        wanted = np.linspace(*ends, (sampler.steps + 1) // 2) ** RHO
        scheduler.set_timesteps(timesteps=np.interp(wanted, levels, np.arange(len(levels))))
    else:
        scheduler.set_timesteps(sampler.steps)
        # A rounding in np.arange gives some counts, such as 61 of 1000, one timestep more: -1.
        scheduler.timesteps = scheduler.timesteps[: sampler.steps]
        if hasattr(scheduler, "sigmas"):
            scheduler.sigmas = torch.cat([scheduler.sigmas[: sampler.steps], scheduler.sigmas[-1:]])
    return scheduler


def _predict(
    model: UViT,
    x: Tensor,  # [B, C, H, W]
    time: Tensor,  # [B]
    labels: Tensor | None,  # [B, A]
    guidance: float,
) -> Tensor:  # [B, C, H, W]
    if labels is None or guidance == 1.0:
        return model.predict(x, time, labels)
    both = torch.cat([labels, torch.full_like(labels, -1)])
    conditional, unconditional = model.predict(torch.cat([x, x]), torch.cat([time, time]), both).chunk(2)
    return unconditional + guidance * (conditional - unconditional)


def seeded(config: ModelConfig, seed: int) -> Start:
    """Each image by a generator of its own, which depends on the seed and the image's number alone."""
    if not 0 <= seed < 2**63:
        raise UserError(f"a seed is a number from 0 to 2^63 - 1, got {seed}")
    shape = (config.channels, config.image_size, config.image_size)

    def start(ids: Tensor) -> tuple[Tensor, list[torch.Generator] | None]:
        generators = _generators(seed, ids)
        return _normal(generators, shape), generators

    return start


def between(config: ModelConfig, first: int, last: int, count: int) -> Start:
    """`count` starts on the way from image 0 of one seed to image 0 of another, both included.

    Spherical interpolation (Shoemake 1985): on a straight line between two noises lies what is too small to be noise.
    """
    zero = torch.zeros(1, dtype=torch.int64)
    ends = torch.cat([seeded(config, seed)(zero)[0] for seed in (first, last)]).double()
    a, b = ends.flatten(1)
    angle = torch.acos((a @ b / (a.norm() * b.norm())).clamp(-1, 1))

    def start(ids: Tensor) -> tuple[Tensor, None]:
        share = ids.double() / max(1, count - 1)
        weights = torch.stack([1 - share, share], dim=1)
        if first != last:
            weights = torch.sin(weights * angle) / torch.sin(angle)
        return torch.einsum("ke,echw->kchw", weights, ends).float(), None

    return start


def _generators(seed: int, ids: Tensor) -> list[torch.Generator]:
    words = philox.elements(torch.tensor([seed]), ids, philox.IMAGE_GENERATOR, 2)  # [B, 2]
    return [torch.Generator().manual_seed(low | high << 32) for low, high in words.tolist()]


def _normal(generators: list[torch.Generator], shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(device)


def _checked(labels: Tensor, count: int, classes: tuple[int, ...]) -> Tensor:
    if not classes:
        raise UserError("this model was trained without labels: leave the labels out")
    labels = labels[:, None] if labels.dim() == 1 else labels
    if labels.shape[0] < count or tuple(labels.shape[1:]) != (len(classes),):
        raise UserError(f"labels must be [{count}, {len(classes)}] for {count} images, got {list(labels.shape)}")
    check_labels(labels.cpu(), classes)
    return labels


def random_labels(
    count: int,
    classes: tuple[int, ...],
    seed: int = 0,
) -> Tensor:  # [count, A] int64
    """Labels drawn evenly over each attribute's values; image i's depend on (seed, i) alone."""
    words = philox.elements(torch.tensor([seed]), torch.arange(count), philox.IMAGE_GENERATOR, 2 + len(classes))
    return torch.stack([philox.high(words[:, 2 + a], values) for a, values in enumerate(classes)], dim=1)


def to_bytes(
    images: Tensor,  # [B, C, H, W] float, -1 black, 1 white
) -> Tensor:  # [B, H, W, C] uint8, on the CPU
    """Pixels as they are stored."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu()


def path(
    model: UViT,
    diffusion: Diffusion,
    sampler: Sampler,
    noise: Tensor,  # [B, C, H, W] unit normal
    generators: list[torch.Generator] | None = None,
    labels: Tensor | None = None,  # [B, A]
    columns: int = 10,
) -> Tensor:  # [2 * B * columns, H, W, C] uint8, rows of `columns` (or of fewer, where there are fewer evaluations)
    """The ways from noise to images: of each a row of x_t, as the model saw it, and below it what the model guessed.

    The columns lie evenly along the evaluations, first and last included; after them stands what was drawn.
    """
    total = evaluations(sampler)
    kept = set(torch.linspace(0, total - 1, min(columns - 1, total)).round().int().tolist())
    rows: tuple[list[Tensor], list[Tensor]] = ([], [])
    seen = 0

    def watch(t: float, shown: Tensor, x0: Tensor) -> None:
        nonlocal seen
        if seen in kept:
            rows[0].append(to_bytes(shown))
            rows[1].append(to_bytes(x0))
        seen += 1

    drawn = to_bytes(draw(model, diffusion, sampler, noise, generators, labels, watch))
    for row in rows:
        row.append(drawn)
    return torch.stack([torch.stack(row, dim=1) for row in rows], dim=1).flatten(0, 2)


def grid(
    images: Tensor,  # [N, H, W, C] uint8, C = 1 or 3
    gap: int = 2,
    across: int | None = None,
) -> "Image":
    """Lays images out in rows on white.

    across: images a row; None: `columns_of`.
    """
    count, height, width, channels = images.shape
    across = across or columns_of(count)
    down = math.ceil(count / across)
    sheet = torch.full((down * (height + gap) + gap, across * (width + gap) + gap, channels), 255, dtype=torch.uint8)
    for i, image in enumerate(images):
        top, left = gap + i // across * (height + gap), gap + i % across * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return to_image(sheet)


def columns_of(count: int) -> int:
    """Images a row of so many: nearly a square, without a gap at the end if a slightly wider one has none."""
    root = math.sqrt(count)
    full = [across for across in range(math.ceil(root), int(1.6 * root) + 1) if count % across == 0]
    return full[0] if full else math.ceil(root)


def to_image(
    pixels: Tensor,  # [H, W, C] uint8, C = 1 or 3
) -> "Image":
    """A Pillow image of mode L or RGB. Raises UserError for other numbers of channels."""
    from PIL import Image

    if pixels.shape[2] not in (1, 3):
        raise UserError(f"images of {pixels.shape[2]} channels cannot be saved as pictures: 1 or 3 can")
    return Image.fromarray(pixels.squeeze(2).numpy() if pixels.shape[2] == 1 else pixels.numpy())
