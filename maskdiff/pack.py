"""`python -m maskdiff.pack SOURCE OUT`: packs pictures of any kind for training, checks packed sets, shows them."""

import argparse
from pathlib import Path

from .data import ALL_KINDS, open_packed, source_of
from .errors import Parser, UserError, run_command
from .packing.check import verify
from .packing.decode import FILTERS
from .packing.look import CROPS, RECIPES, Look
from .packing.manifest import Manifest, is_packed
from .packing.sources import Options
from .packing.writer import locked, pack
from .sheet import contact_sheet


def main() -> None:
    options = _parser().parse_args()
    source, out = options.source, options.out
    if out is None and not (options.verify or options.show):
        raise UserError("give SOURCE OUT to pack, or a packed set with --verify or --show FILE")
    if out is not None:
        if is_packed(Path(source)):
            raise UserError(f"{source!r} is a packed set already; give the pictures themselves")
        _pack(options)
    packed = Path(source if out is None else out)
    if options.verify:
        print(f"{packed}: all is as it was packed: {_summary(verify(packed))}")
    if options.show:
        _show(packed, Path(options.show))
    elif out is not None and not options.verify:
        print(f"{packed}: {_summary(Manifest.read(packed))}")


def _pack(options: argparse.Namespace) -> None:
    recipe = RECIPES.get(options.crop)
    size = options.image_size or (recipe.size if recipe else 64)
    look = Look(options.crop, options.filter, options.background)
    wanted = Options(look, options.labels, options.column, options.subset, options.only)
    if options.workers is not None and options.workers < 1:
        raise UserError(f"--workers is {options.workers}; give 1 or more")
    if Path(options.out).exists():  # told before a large source is listed
        raise UserError(f"{options.out!r} exists; remove it first, or give another name")
    source = source_of(options.source, wanted)
    out = Path(options.out)
    with locked(out):
        pack(source, out, size, options.patch, options.heldout, options.workers, options.dedupe)


def _show(packed: Path, file: Path) -> None:
    if file.suffix.lower() != ".png":
        raise UserError(f"--show {str(file)!r}: give the name of a .png file")
    file.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(open_packed(packed)).save(file)
    print(f"{file}: a contact sheet of {packed}")


def _summary(manifest: Manifest) -> str:
    labels = ", ".join(
        f"{name} ({len(classes)} classes{f', {counts[-1]:,} images without' if counts[-1] else ''})"
        for name, classes, counts in zip(manifest.label_names, manifest.class_names, manifest.class_counts, strict=True)
    )
    return (
        f"{manifest.count:,} images of {manifest.image_size} px, patch {manifest.patch}, "
        f"{manifest.heldout:,} held out, {len(manifest.rejects):,} rejects, {len(manifest.copies):,} copies, "
        f"labels: {labels or 'none'}"
    )


def _parser() -> Parser:
    crops = "; ".join(f"{name}: {recipe.what}, {recipe.size} px" for name, recipe in RECIPES.items())
    parser = Parser("maskdiff pack", description="packs pictures for training")
    add = parser.add_argument
    add("source", metavar="SOURCE", help=f"{ALL_KINDS}. hf:NAME@CONFIG:SPLIT, NAME may be a folder".replace("%", "%%"))
    add("out", metavar="OUT", nargs="?", help="new folder of the packed set")
    add("--image-size", type=int, help="pixels of the side (default: 64, or the recipe's)")
    add("--patch", type=int, default=4, help="pixels of a patch's side; the model's (default: 4)")
    add("--crop", default="centre", help=f"{CROPS}; {crops} (default: centre, the largest square)")
    add("--filter", choices=tuple(FILTERS), help="how pictures are scaled (default: lanczos, or the recipe's)")
    add("--background", default="white", help="behind transparent pictures: a name or #rrggbb (default: white)")
    add(
        "--labels",
        default="auto",
        help="auto; none; folders: the first folder of a file's name; FILE.csv[:COLUMN,...]: the first line names the "
        "columns; COLUMN,...: of a table or .npz. auto: folders, or the columns that say so (default: auto)",
    )
    add("--column", help="column of a table, or array of an .npz, with the pictures, where there are several")
    add("--subset", help="3000 or 10%%: so many of the pictures, always the same, each subset within the larger ones")
    add(
        "--only",
        metavar="FILE",
        help="the pictures that a text file names, one a line; FILE:VALUE: of lines NAME VALUE those with this value",
    )
    add("--heldout", type=float, default=0.02, help="share held out of training, by content (default: 0.02)")
    add("--dedupe", action="store_true", help="leaves out images that equal an earlier one")
    add("--workers", type=int, help="processes (default: one per processor)")
    add("--verify", action="store_true", help="checks every byte of the packed set against its hashes")
    add("--show", metavar="FILE.png", help="writes a contact sheet of the packed set")
    return parser


if __name__ == "__main__":
    run_command(main)
