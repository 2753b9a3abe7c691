"""`python -m maskdiff.evaluate RUN_OR_IMAGES`: judges a run's samples, or any images, against real images."""

import argparse
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import data, features, folder, measure, metrics, nearest, precision, sampling
from .checkpoint import META
from .data import ALL_KINDS, PackedSet
from .durable import write_json
from .errors import Parser, UserError, run_command
from .model import cast_products
from .packing.manifest import is_packed
from .pretrained import LoadedRun, load_run
from .sample import dtype_of, sampler_of
from .sampling import SAMPLERS

FORMAT = 1
COUNT = 1000  # samples of a run


@dataclass
class Side:
    """Images of one kind, real or drawn, and what is said of them."""

    batches: Iterator[Tensor]  # of [B, H, W, C] uint8, once
    told: str  # beside the figures, for a reader
    about: dict[str, Any]  # the same for a program
    packed: PackedSet | None = None
    kept: list[Tensor] = field(default_factory=list)  # the first images that `batches` gave, if `keep` asked for them

    def keep(self, count: int) -> None:
        """Has `kept` hold the first so many images as they pass."""

        def passing(batches: Iterator[Tensor]) -> Iterator[Tensor]:
            there = 0
            for batch in batches:
                self.kept.append(batch[: max(0, count - there)])
                there += len(batch)
                yield batch

        self.batches = passing(self.batches)


def main() -> None:
    options = _parser().parse_args()
    _check(options)
    metrics.check_neighbours()
    runs = [load_run(spec, options.weights) if _is_run(spec) else None for spec in (options.images, options.data or "")]
    if options.data is None and runs[0] is None:
        raise UserError(f"--data: name the real images that those of {options.images} are held against")
    if options.nearest and runs[1] is not None:
        raise UserError(f"--nearest shows training images; --data {options.data} is a run, which has none of its own")
    size, patch = _geometry(options, runs)
    extractor = features.load(options.features, options.device)
    if runs[1] is None:
        real = _real(options, runs[0], size, patch)
        assert real.packed is not None
        reference = metrics.Reference.of(extractor, real.packed)
    else:
        real = _drawn(options, options.data, runs[1], None)
        reference = metrics.Reference.from_features(extractor.features(real.batches))
    if runs[0] is None:
        packed = _prepared(options, options.images, size, patch)
        ids = torch.arange(len(packed))
        if options.count is not None and options.count < len(packed):
            ids = torch.linspace(0, len(packed) - 1, options.count, dtype=torch.float64).round().long()
        judged = _images(packed, ids, Path(options.images).name, "images")
    else:
        judged = _drawn(options, options.images, runs[0], real.packed)
    if options.nearest:
        judged.keep(nearest.MOST)
    found = extractor.features(judged.batches)
    scores = reference.compare(found)
    result: dict[str, Any] = {
        "format": FORMAT,
        "images": judged.about,
        "real": real.about,
        "image_size": size,
        "extractor": {key: getattr(extractor, key) for key in ("name", "digest", "title", "width")},
        "scores": dataclasses.asdict(scores),
        "kid": {"subsets": metrics.KID_SUBSETS, "size": metrics.kid_size(len(reference.features), len(found))},
        "neighbours": {"precision, recall": metrics.NEIGHBOURS[0], "density, coverage": metrics.NEIGHBOURS[1]},
        "machine": measure.machine(precision.resolve_device(options.device)),
        "commit": measure.commit(),
    }
    if options.nearest:
        assert real.packed is not None
        images = torch.cat(judged.kept)
        result["nearest"], picture = nearest.compare(images, found[: len(images)], reference, real.packed, extractor)
        Path(options.nearest).parent.mkdir(parents=True, exist_ok=True)
        folder.save(picture, Path(options.nearest))
    print(table(result, judged.told, real.told))
    if options.nearest:
        print(f"samples beside their nearest training images: {options.nearest}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.json, result)


def table(result: dict[str, Any], judged: str, real: str) -> str:
    """The figures for a reader, and what they depend on."""
    scores, extractor, kid = result["scores"], result["extractor"], result["kid"]

    def shown(key: str, form: str = ".3f") -> str:
        return "-" if scores[key] is None else format(scores[key], form)

    spread = f" +- {shown('kid_std', '.2g')} over {kid['subsets']} subsets of {kid['size']}" if kid["size"] else ""
    k = list(result["neighbours"].values())
    rows = [
        ("judged", judged),
        ("against", real),
        ("features", f"{extractor['name']} ({extractor['digest']}), {extractor['width']} numbers an image"),
        (extractor["title"], shown("frechet", ".5g")),
        ("KID", shown("kid", ".3g") + spread),
        ("precision, recall", f"{shown('precision')}, {shown('recall')} (k = {k[0]})"),
        ("density, coverage", f"{shown('density')}, {shown('coverage')} (k = {k[1]})"),
    ]
    for space, unit in (("features", ""), ("pixels", ", of 255")) if "nearest" in result else ():
        far = result["nearest"][space]
        heldout = "" if far["heldout"] is None else f"; of held-out images {far['heldout']:.4g}"
        rows.append((f"nearest, {space}", f"{far['samples']:.4g}{heldout} (median distance{unit})"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {text}" for name, text in rows)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "maskdiff evaluate",
        description="Judges a run's samples, or any images, against real images: Frechet distance (FID with the public "
        "Inception file), KID, precision, recall, density, coverage.",
    )
    add = parser.add_argument
    add("images", metavar="RUN_OR_IMAGES", help=f"a run, one of its checkpoints, or images: {ALL_KINDS}")
    add("--data", help="the real images, or another run (default: what the run was trained on)")
    add(
        "--count",
        type=int,
        help=f"how many samples, or how many of the images (default: {COUNT} samples, all images); distances fall as "
        "it grows: compare at equal counts",
    )
    add(
        "--features",
        default="builtin",
        help="inception: fetched once, 96 MB; a TorchScript file of its convention; builtin (default: builtin)",
    )
    add("--json", type=Path, help="file for the figures and all that they depend on")
    add("--nearest", metavar="FILE.png", help="draws samples beside the training images that they are nearest to")
    add("--image-size", type=int, help="pixels, where neither side is a run or a packed set: both are scaled to it")
    add("--crop", help="which part of a picture is kept, as in maskdiff.pack (default: as the run's, else centre)")
    add("--background", help="behind transparent pictures (default: as the run's, else white)")
    add("--sampler", choices=SAMPLERS, help="what draws (default: the run's)")
    add("--steps", type=int, help="model evaluations an image (default: the run's sample_steps)")
    add("--eta", type=float, help="of ddim (default: the run's)")
    add("--guidance", type=float, help="classifier-free guidance, 1 = none (default: the run's)")
    add("--seed", type=int, default=0, help="of the samples: image i depends on it and i alone (default: 0)")
    add("--weights", choices=("ema", "ema2", "raw"), default="ema", help="of the run (default: ema)")
    add("--batch", type=int, default=64, help="images at a time (default: 64)")
    add("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    add("--precision", help="auto, bf16 or fp32, of the samples (default: the run's, where this device has it)")
    return parser


def _check(options: argparse.Namespace) -> None:
    """Raises UserError for what cannot be meant."""
    if options.count is not None and options.count < 2:
        raise UserError(f"--count got {options.count}; a distance between distributions takes 2 images or more")
    if options.batch < 1:
        raise UserError(f"--batch got {options.batch}; it takes 1 or more")
    if options.nearest and Path(options.nearest).suffix.lower() != ".png":
        raise UserError(f"--nearest {options.nearest!r}: give the name of a .png file")


def _is_run(spec: str) -> bool:
    path = Path(spec)
    return bool(spec) and ((path / META).is_file() or (path / "config.json").is_file()) and not is_packed(path)


def _geometry(options: argparse.Namespace, runs: list[LoadedRun | None]) -> tuple[int, int]:
    """Pixels of a side at which images are compared, and of a patch: of whichever side has them fixed."""
    fixed: dict[str, tuple[int, int]] = {}
    for spec, run in zip((options.images, options.data), runs, strict=True):
        if run is not None:
            fixed[spec] = run.config.model.image_size, run.config.model.patch
        elif spec is not None and is_packed(Path(spec)):
            packed = data.open_packed(spec)
            fixed[spec] = packed.image_size, packed.patch
    sizes = {spec: size for spec, (size, _) in fixed.items()}
    if options.image_size is not None:
        sizes["--image-size"] = options.image_size
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"{spec}: {size} px" for spec, size in sizes.items())
        raise UserError(f"images of different sizes cannot be compared ({told}); pack the real ones at the other size")
    if fixed:
        return next(iter(fixed.values()))
    if options.image_size is None:
        raise UserError("--image-size: say at how many pixels the images are to be compared; they are scaled to it")
    return options.image_size, next(patch for patch in (4, 2, 1) if options.image_size % patch == 0)


def _real(options: argparse.Namespace, run: LoadedRun | None, size: int, patch: int) -> Side:
    """The training images of the real ones; a run's own as it was trained on them."""
    path = options.data
    if run is not None and path in (None, run.config.data.path):
        of, path = run.config.data, run.config.data.path
        crop, background = options.crop or of.crop, options.background or of.background
        packed = data.prepare(path, size, patch, background, crop, of.subset, heldout=of.heldout)
    else:
        packed = _prepared(options, path, size, patch)
    return _images(packed, packed.train_ids, Path(path).name, "training images")


def _prepared(options: argparse.Namespace, spec: str, size: int, patch: int) -> PackedSet:
    if is_packed(Path(spec)):
        for option in ("crop", "background"):
            if getattr(options, option) is not None:
                raise UserError(f"--{option}: {spec} is packed already; pack its pictures again with --{option}")
        return data.open_packed(spec)
    return data.prepare(spec, size, patch, options.background or "white", options.crop or "centre")


def _images(packed: PackedSet, ids: Tensor, name: str, what: str) -> Side:
    about = {"kind": what, "name": name, "hash": packed.hash, "count": len(ids), "of": len(packed)}
    told = f"{len(ids):,} {what} of {name} ({packed.hash[:16]}), {packed.image_size} px"
    batches = metrics.progress((packed.images(part) for part in ids.split(256)), ids)
    return Side(batches, told, about, packed)


def _drawn(options: argparse.Namespace, spec: str, run: LoadedRun, real: PackedSet | None) -> Side:
    """Samples of a run, drawn as asked; of a labelled model with labels as the real images have them."""
    config, classes = run.config, run.config.model.classes
    device = precision.resolve_device(options.device)
    dtype = dtype_of(options.precision, run.meta, device)
    count = options.count or COUNT
    labels, kind = None, None
    if classes:
        if real is not None and real.class_names == (run.meta.get("class_names") or []):
            labels, kind = real.random_labels(count, options.seed), "those of training images, drawn at random"
        else:
            labels, kind = sampling.random_labels(count, classes, options.seed), "all alike, drawn at random"
    sampler = sampler_of(options, run, labels)
    model = run.model.to(device)
    cast_products(model, dtype)
    start, ids = sampling.seeded(model.config, options.seed), torch.arange(count)
    drawn = sampling.batches(model, run.diffusion, sampler, start, ids, labels, options.batch, progress=True)
    decay = {"ema": config.optim.ema, "ema2": config.optim.ema2, "raw": None}[options.weights]
    about = {
        "kind": "samples",
        "name": Path(spec).resolve().name,
        "checkpoint": run.meta["hash"],
        "step": run.meta["step"],
        "count": count,
        "sampler": dataclasses.asdict(sampler),
        "weights": options.weights,
        "ema": decay,
        "seed": options.seed,
        "labels": kind,
        "precision": str(dtype).removeprefix("torch."),
    }
    how = f"{sampler.name}, {sampler.steps} steps" + (f", eta {sampler.eta:g}" if sampler.eta else "")
    how += f", guidance {sampler.guidance:g}, " + ("raw weights" if decay is None else f"{options.weights} {decay}")
    told = f"{count:,} samples of {about['name']}, step {about['step']}: {how}, seed {options.seed}"
    return Side((images for _, images in drawn), told, about)


if __name__ == "__main__":
    run_command(main)
