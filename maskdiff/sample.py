"""`python -m maskdiff.sample RUN`: draws images with a trained model, as one picture or one file each."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from . import precision, sampling
from .errors import UserError, run_command
from .model import cast_products
from .pretrained import load_run

PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def main() -> None:
    options = _parser().parse_args()
    if options.count < 1 or options.batch < 1:
        raise UserError(f"--count and --batch must be at least 1, got {options.count} and {options.batch}")
    out = Path(options.out)
    single = out.suffix.lower() not in PICTURES
    if single and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} exists and is not an empty folder: name a new folder, or a file such as grid.png")
    loaded = load_run(options.run, options.weights)
    model, config = loaded.model, loaded.config
    device = precision.resolve_device(options.device)
    model.to(device)
    cast_products(model, precision.resolve_precision(options.precision, device))
    labels = wanted_labels(
        options.labels,
        options.count,
        config.model.classes,
        options.seed,
        loaded.meta.get("label_names") or [],
        loaded.meta.get("class_names") or [],
    )
    guidance = options.guidance if options.guidance is not None else config.guidance if labels is not None else 1.0
    images = sampling.sample(
        model,
        loaded.diffusion,
        options.count,
        labels=labels,
        guidance=guidance,
        steps=config.sample_steps if options.steps is None else options.steps,
        eta=options.eta,
        seed=options.seed,
        batch=options.batch,
        progress=True,
    )
    if single:
        out.mkdir(parents=True, exist_ok=True)
        for number, image in enumerate(images):
            sampling.to_image(image).save(out / f"{number:06d}.png")
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        sampling.grid(images).save(out)
    print(f"{options.count} images in {out}{'/' if single else ''}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("maskdiff sample", description="draws images with a trained model")
    parser.add_argument("run", help="folder of a run, or of one of its checkpoints")
    parser.add_argument("--count", type=int, default=64, help="how many images (default: 64)")
    parser.add_argument(
        "--out", default="grid.png", help="a picture file: a grid; else a folder: single images (default: grid.png)"
    )
    parser.add_argument("--steps", type=int, help="sampler steps (default: the run's sample_steps)")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance, 1 = none (default: the run's)")
    parser.add_argument("--eta", type=float, default=0.0, help="0: deterministic; 1: as noisy as DDPM (default: 0)")
    parser.add_argument("--seed", type=int, default=0, help="image i depends on the seed and i alone (default: 0)")
    parser.add_argument(
        "--weights", choices=("ema", "ema2", "raw"), default="ema", help="ema2: the run's second average (default: ema)"
    )
    parser.add_argument(
        "--labels",
        help="what to draw: [ATTRIBUTE=]VALUE,... by name or number, several such sets separated by ';' in turn; what "
        "is not named is drawn at random; 'none': without labels (default of a labelled model: all at random)",
    )
    parser.add_argument("--batch", type=int, default=64, help="images at a time (default: 64)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--precision", default="auto", help="auto, bf16 or fp32 (default: auto)")
    return parser


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
