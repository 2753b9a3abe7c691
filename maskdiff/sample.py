"""`python -m maskdiff.sample RUN`: draws images with a trained model, as one picture or one file each."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import folder, precision, sampling
from .errors import Parser, UserError, run_command
from .model import cast_products
from .pretrained import LoadedRun, load_run
from .sampling import SAMPLERS, Sampler
from .sheet import captioned, label_words

PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def main() -> None:
    options = _parser().parse_args()
    _check(options)
    loaded = load_run(options.run, options.weights)
    device = precision.resolve_device(options.device)
    dtype = dtype_of(options.precision, loaded.meta, device)
    model = loaded.model if options.image_size is None else loaded.model.resized(options.image_size)
    model.to(device)
    cast_products(model, dtype)
    labels = wanted_labels(
        options.labels,
        options.count,
        model.config.classes,
        options.seed if options.interpolate is None else options.interpolate[0],
        loaded.meta.get("label_names") or [],
        loaded.meta.get("class_names") or [],
    )
    sampler = sampler_of(options, loaded, labels)
    if options.path:
        noise, generators = sampling.seeded(model.config, options.seed)(torch.arange(options.count))
        labels = None if labels is None else labels.to(device)
        images = sampling.path(model, loaded.diffusion, sampler, noise.to(device), generators, labels)
        _save_grid(images, options.out, len(images) // (2 * options.count))
        print(f"from noise to {_images(options.count)}, and what the model guessed on the way, in {options.out}")
        return
    if options.interpolate is None:
        start = sampling.seeded(model.config, options.seed)
    else:
        if not sampler.deterministic:
            raise UserError("--interpolate needs a sampler that adds no noise of its own: not ddpm, and eta 0")
        first, last = options.interpolate
        start = sampling.between(model.config, first, last, options.count)
        labels = None if labels is None else labels[:1].expand(options.count, -1)  # the noise alone changes

    texts = _captions(labels, loaded.meta.get("class_names") or []) if options.captions else None

    def draw(ids: Tensor):
        return sampling.batches(model, loaded.diffusion, sampler, start, ids, labels, options.batch, progress=True)

    began = time.perf_counter()
    if Path(options.out).suffix.lower() in PICTURES:
        drawn = options.count
        images = torch.cat([images for _, images in draw(torch.arange(drawn))])
        across = sampling.columns_of(drawn) if options.interpolate is None else min(drawn, 10)
        _save_grid(images, options.out, across, texts)
    else:
        drawn = folder.fill(Path(options.out), options.count, _settings(options, loaded, sampler, dtype), draw)
    rate = drawn / (time.perf_counter() - began)
    there = options.count - drawn
    done = f"{there} were there, {drawn} drawn" if there else ""
    speed = f"{rate:.3g} images/s" if drawn else ""
    told = ", ".join(part for part in (done, speed) if part)
    print(f"{_images(options.count)} of step {loaded.meta['step']} in {options.out} ({told})")


def _images(count: int) -> str:
    return f"{count} image{'s' * (count > 1)}"


def _parser() -> Parser:
    parser = Parser("maskdiff sample", description="draws images with a trained model")
    parser.add_argument("run", help="folder of a run, or of one of its checkpoints")
    parser.add_argument("--count", type=int, help="how many images (default: 64; 10 with --interpolate, 1 with --path)")
    parser.add_argument(
        "--out",
        help="a picture file: a grid; else a folder: single images, and the same command goes on with it (default: "
        "grid.png, interpolation.png or path.png)",
    )
    parser.add_argument("--sampler", choices=SAMPLERS, help="what draws (default: the run's, ddim unless set)")
    parser.add_argument("--steps", type=int, help="model evaluations an image (default: the run's sample_steps)")
    parser.add_argument(
        "--eta", type=float, help="of ddim: 0 deterministic, 1 as noisy as ddpm (default: the run's, 0)"
    )
    parser.add_argument("--guidance", type=float, help="classifier-free guidance, 1 = none (default: the run's)")
    parser.add_argument("--seed", type=int, help="image i depends on the seed and i alone (default: 0)")
    parser.add_argument(
        "--weights", choices=("ema", "ema2", "raw"), default="ema", help="ema2: the run's second average (default: ema)"
    )
    parser.add_argument(
        "--labels",
        help="what to draw: [ATTRIBUTE=]VALUE,... by name or number, several such sets separated by ';' in turn; what "
        "is not named is drawn at random; 'none': without labels (default of a labelled model: all at random)",
    )
    parser.add_argument("--captions", action="store_true", help="writes the labels of each image under it, in a grid")
    parser.add_argument(
        "--interpolate",
        type=int,
        nargs=2,
        metavar=("S1", "S2"),
        help="goes from image 0 of one seed to that of another",
    )
    parser.add_argument("--path", action="store_true", help="shows how noise becomes image 0 (or --count of them)")
    parser.add_argument("--image-size", type=int, help="pixels, a multiple of the patch (default: as trained)")
    parser.add_argument("--batch", type=int, default=64, help="images at a time (default: 64)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--precision", help="auto, bf16 or fp32 (default: the run's, where this device has it)")
    return parser


def _check(options: argparse.Namespace) -> None:
    """Sets the defaults that depend on other options. Raises UserError for what cannot be meant."""
    if options.path and options.interpolate is not None:
        raise UserError("--path and --interpolate are two pictures: ask for one of them")
    if options.seed is not None and options.interpolate is not None:
        raise UserError("--interpolate names the two seeds itself: leave --seed out")
    options.seed = options.seed or 0
    if options.count is None:
        options.count = 1 if options.path else 64 if options.interpolate is None else 10
    if options.count < 1 or options.batch < 1:
        raise UserError(f"--count and --batch must be at least 1, got {options.count} and {options.batch}")
    if options.out is None:
        options.out = "path.png" if options.path else "grid.png" if options.interpolate is None else "interpolation.png"
    picture = Path(options.out).suffix.lower() in PICTURES
    if options.path and not picture:
        raise UserError(f"--path makes one picture: name it with --out, such as path.png, not {options.out}")
    if options.captions and (options.path or not picture):
        raise UserError("--captions are written into a grid: name one with --out, such as grid.png, without --path")


def dtype_of(asked: str | None, meta: dict[str, Any], device: torch.device) -> torch.dtype:
    """What a run's model computes in: as asked, else as it was trained where this device can."""
    if asked is not None:
        return precision.resolve_precision(asked, device)
    trained = (meta.get("environment") or {}).get("dtype")
    return precision.resolve_precision("auto", device, trained)


def sampler_of(options: argparse.Namespace, loaded: LoadedRun, labels: Tensor | None) -> Sampler:
    """What the options say, over what the run says."""
    config = loaded.config
    name = options.sampler or config.sampler
    eta = options.eta if options.eta is not None else config.eta if name == config.sampler else 0.0
    guidance = options.guidance if options.guidance is not None else config.guidance if labels is not None else 1.0
    return Sampler(name, config.sample_steps if options.steps is None else options.steps, eta, guidance)


def _settings(options: argparse.Namespace, loaded: LoadedRun, sampler: Sampler, dtype: torch.dtype) -> dict[str, Any]:
    """What single images depend on beside their number."""
    between = options.interpolate
    return {
        "checkpoint": loaded.meta["hash"],
        "weights": options.weights,
        "sampler": sampler.name,
        "steps": sampler.steps,
        "eta": sampler.eta,
        "guidance": sampler.guidance,
        "labels": options.labels,
        "image_size": options.image_size or loaded.config.model.image_size,
        "precision": str(dtype).removeprefix("torch."),
        **({"seed": options.seed} if between is None else {"interpolate": between, "count": options.count}),
    }


def _captions(labels: Tensor | None, class_names: Sequence[Sequence[str]]) -> list[list[str]]:
    if labels is None:
        raise UserError("--captions are the names of labels, and these images have none: leave it out")
    return [label_words(label, class_names) for label in labels.tolist()]


def _save_grid(images: Tensor, out: str, across: int, texts: list[list[str]] | None = None) -> None:
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet = sampling.grid(images, across=across) if texts is None else captioned(images, texts, across)
    folder.save(sheet, path)


def wanted_labels(
    text: str | None,  # --labels
    count: int,
    classes: tuple[int, ...],
    seed: int,
    label_names: Sequence[str],  # A, or empty where the run does not know them
    class_names: Sequence[Sequence[str]],  # A lists, or empty
) -> Tensor | None:  # [count, A] int64
    """The label of every image. Raises UserError for labels that the model does not take."""
    if not classes:
        if text is not None and text != "none":
            raise UserError(f"--labels {text}: this model was trained without labels; leave --labels out")
        return None
    if text == "none":
        return None
    labels = sampling.random_labels(count, classes, seed)
    sets = [part for part in (text or "").split(";") if part.strip()]
    for start, part in enumerate(sets):
        for word in part.split(","):
            attribute, value = _parse_label(word.strip(), classes, label_names, class_names)
            labels[start :: len(sets), attribute] = value
    return labels


def _parse_label(
    word: str, classes: tuple[int, ...], label_names: Sequence[str], class_names: Sequence[Sequence[str]]
) -> tuple[int, int]:
    left, equals, value = word.rpartition("=")
    names = [list(names) for names in class_names] or [[] for _ in classes]
    everything = "; ".join(
        f"{label_names[a] if label_names else a}={'|'.join(names[a]) or f'0..{count - 1}'}"
        for a, count in enumerate(classes)
    )
    if equals:
        candidates = [a for a in range(len(classes)) if left == str(a) or (label_names and left == label_names[a])]
    else:
        candidates = list(range(len(classes)))
    found = [(a, names[a].index(value)) for a in candidates if value in names[a]]
    if not found and len(candidates) == 1 and value.isdecimal() and int(value) < classes[candidates[0]]:
        found = [(candidates[0], int(value))]
    if len(found) > 1:
        raise UserError(f"--labels: {len(found)} attributes have {word!r}; write ATTRIBUTE={word} ({everything})")
    if not found:
        raise UserError(f"--labels: there is no label {word!r}; this model takes {everything}")
    return found[0]


if __name__ == "__main__":
    run_command(main)
