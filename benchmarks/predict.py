"""`python benchmarks/predict.py [--write]` predicts training steps on cards that have not run them, for the docs.

A real step runs on meta tensors, which have shapes and no numbers; every operation that reaches the device is written
down with its bytes and FLOPs. Times follow from these by the few stated rates below: nothing here is measured.
--write puts the tables into docs/performance.md, between its two markers.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpu_step
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import maskdiff_kernels as mk
from maskdiff import flops
from maskdiff.bench import Bench

PAGE = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
BEGIN, END = "<!-- predict.py begins -->", "<!-- predict.py ends -->"
MASKS = ("dense", "patch:0.5", "patch:0.75", "patch:0.9")
PLACES = (("celeba64", 256), ("celebahq256", 32))

# What is assumed of a card. The first two are what is commonly measured on such cards, all others are guesses.
COPY = {"H100": 3.0e12, "H200": 4.3e12}  # bytes a second, read and written
MATRIX = 790e12  # bf16 FLOP a second of a large product, both cards
PRODUCTS = 0.75  # share of it that the model's products reach
STREAMS = 0.85  # share of the copy rate that elementwise operations, and adamw_ema, reach
SHORT = 0.65  # share of it that attention and the loss's backward pass reach
ATTENTION = 250e12  # FLOP a second inside attention, of what its tiles compute
ISSUED = 0.6 * 132 * 4 * 1.7e9  # instructions of warps a second: of what 132 multiprocessors issue at 1.7 GHz
LAUNCH = 2e-6  # seconds that a kernel of a CUDA graph takes beside its work: the gap before it, its ramp and its tail
OWN_LAUNCH = 3e-6  # the same as our kernels' entries on the page have it
DRAW = 10e-6  # seconds of draw_batch in one launch

LAUNCHES = {"native_layer_norm_backward": 2, "embedding_dense_backward": 8, "adamw_ema": 2}  # of one call; else 1
ON_CHIP, ONE_BLOCK = 288, 144  # tokens: to so many CUDA takes a sequence; beyond so many a block fills a multiprocessor
ALLOCATES = ("empty", "new_empty", "empty_like", "empty_strided")
PRODUCT = ("mm", "addmm", "addmm_", "bmm")
KINDS = ("products", "attention", "elementwise", "draw", "gather and noise", "loss", "optimizer")
OURS = {
    "attention": "attention", "attention_backward": "attention", "draw_batch": "draw", "adamw_ema": "optimizer",
    "noisy_patches": "gather and noise", "denoising_loss": "loss", "denoising_loss_backward": "loss",
}  # fmt: skip


@dataclass
class Work:
    """What one launch, or a few of one operation, do."""

    name: str
    kind: str  # of KINDS
    launches: int
    reads: dict[int, int]  # bytes by storage
    writes: dict[int, int]
    flops: float = 0.0  # on tensor cores, tiles' padding included
    instructions: float = 0.0  # of warps
    loads: int = 0  # bytes whose way hides behind nothing: they come before the FLOPs

    @property
    def bytes(self) -> int:
        return sum(self.reads.values()) + sum(self.writes.values())

    def seconds(self, copy: float) -> float:
        """How long it takes on a card with such a copy rate."""
        if self.kind == "draw":
            return DRAW
        if self.instructions:
            last = 2e-6 if self.kind == "loss" else 0.0  # the last block adds up the others' sums
            return self.instructions / ISSUED + OWN_LAUNCH + last
        if self.kind == "attention":
            inside = self.flops / ATTENTION + self.loads / copy
            return max(inside, self.bytes / (SHORT * copy)) + OWN_LAUNCH
        if self.kind == "loss":
            return self.bytes / (SHORT * copy) + OWN_LAUNCH
        if self.kind == "optimizer":
            return self.bytes / (STREAMS * copy) + 2 * OWN_LAUNCH + 3e-6
        return max(self.flops / (PRODUCTS * MATRIX), self.bytes / (STREAMS * copy)) + self.launches * LAUNCH


class Recorder(TorchDispatchMode):
    """Writes down the work of all that runs inside; views and allocations are none."""

    def __init__(self) -> None:
        super().__init__()
        self.work: list[Work] = []
        self.kept: list[Any] = []  # so that no storage's number is given away again

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        taken, given = list(tensors((args, kwargs))), list(tensors(result))
        self.kept += [taken, given]
        name, mutates = function._schema.name.split("::")[1], function._schema.is_mutable
        sources = {storage(tensor) for tensor in taken}
        if name in ALLOCATES or not mutates and given and all(storage(tensor) in sources for tensor in given):
            return result
        reads, writes = by_storage(taken), by_storage(given)
        if mutates and name not in OURS:
            writes |= {key: reads[key] for key in reads if key in by_storage(taken[:1])}
        named = dict(zip((argument.name for argument in function._schema.arguments), args, strict=False))
        self.work.append(self.described(name, named, reads, writes))
        return result

    def described(self, name: str, named: dict[str, Any], reads: dict[int, int], writes: dict[int, int]) -> Work:
        work = Work(name, OURS.get(name, "elementwise"), LAUNCHES.get(name, 1), reads, writes)
        if name in PRODUCT:
            left, right = list(tensors(named))[-2:]
            work.kind, work.flops = "products", 2.0 * left.numel() * right.shape[-1]
        elif name == "native_layer_norm_backward":  # weights' and biases' gradients: a second pass over both inputs
            again = sorted(reads.values())[-2:]
            work.reads = reads | {-1 - len(self.work): sum(again)}
        elif name in ("attention", "attention_backward"):
            qkv = named["qkv"]
            work.flops = attention_flops(qkv, 4 if name == "attention" else 14)
            if ONE_BLOCK < qkv.shape[1] <= ON_CHIP:
                work.loads = qkv.nbytes + (named["grad_out"].nbytes if "grad_out" in named else 0)
        elif name in ("noisy_patches", "denoising_loss"):
            work.instructions = instructions(name, named["keep_ids"], named["patches"])
        elif name == "adamw_ema":
            averages = (1 + (named["ema2"] is not None)) / named["ema_every"]  # in the mean over updates
            numbers = round((3 + averages) * named["master"].nbytes)  # masters, both moments, averages
            gradients = sum(grad.nbytes for grad in named["grads"])  # read twice: squares come first
            work.reads, work.writes = {0: numbers, 1: 2 * gradients}, {0: numbers, 2: named["low"].nbytes}
        return work


def attention_flops(qkv: Tensor, factor: int) -> float:  # qkv [B, L, 3, H, d]
    """What the tiles compute: CUDA's of 16 rows to 288 tokens, Triton's of 64 beyond."""
    batch, length, _, heads, width = qkv.shape
    tile = 16 if length <= ON_CHIP else 64
    rows = -(-length // tile) * tile
    return float(factor) * rows * rows * width * batch * heads


def instructions(
    name: str,
    keep_ids: Tensor,  # [B, K]
    patches: Tensor,  # [N, n, P*P*C]
) -> float:
    """Of warps: so many for 32 quads of elements, and for a thread's start and end (the page says whence)."""
    for_quads, for_thread, blocks = (480, 280, 1024) if name == "denoising_loss" else (420, 180, 2048)
    batch, per_sample = keep_ids.shape[0], keep_ids.shape[1] * -(-patches.shape[2] // 4)
    most = 64 if name == "denoising_loss" else 65535
    parts = min(-(-blocks // batch), most)  # parts_of in csrc/cuda/visible.cuh
    turns = -(-per_sample // (parts * 256))
    parts = -(-per_sample // (turns * 256))
    return batch * (per_sample / 32 * for_quads + parts * 256 / 32 * for_thread)


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors(part)


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def by_storage(taken: list[Tensor]) -> dict[int, int]:
    """Bytes of each storage that tensors touch; what is expanded is touched once."""
    found: dict[int, int] = {}
    for tensor in taken:
        size = min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
        found[storage(tensor)] = max(found.get(storage(tensor), 0), size)
    return found


def recorded(stand: Bench, mask: str) -> list[Work]:
    """The work of one of our steps, as the code stands; attention by the op, not by SDPA under autograd."""
    with mk.using(attention="reference"), Recorder() as recorder:
        stand.ours(stand.mask(mask))()
    return with_pixels_alone(recorder.work, stand, mask)


def with_pixels_alone(work: list[Work], stand: Bench, mask: str) -> list[Work]:
    """The ops that gather read the visible pixels, not the whole store."""
    patches = stand.source.store.patches
    visible = stand.batch * round(sum(stand.mask(mask).counts) / len(stand.mask(mask).counts)) * patches.shape[2]
    for item in work:
        if item.name in ("noisy_patches", "denoising_loss"):
            item.reads[storage(patches)] = visible
    return work


def fused(work: list[Work]) -> list[Work]:
    """The same with every run of elementwise operations as one launch, as a compiler makes of it.

    It reads what comes from outside once and writes what is read outside later. Sums over rows (biases' gradients) and
    scattered additions stay launches of their own.
    """
    alone = ("sum", "embedding_dense_backward")
    groups: list[list[Work]] = []
    for item in work:
        joins = item.kind == "elementwise" and item.name not in alone
        if joins and groups and groups[-1][0].kind == "elementwise" and groups[-1][0].name not in alone:
            groups[-1].append(item)
        else:
            groups.append([item])
    needed: set[int] = set()  # storages that later groups read
    found = []
    for group in reversed(groups):
        made: set[int] = set()
        reads: dict[int, int] = {}
        writes: dict[int, int] = {}
        for item in group:
            reads |= {key: size for key, size in item.reads.items() if key not in made}
            made |= item.writes.keys()
            writes |= item.writes
        if len(group) > 1:
            kept = {key: size for key, size in writes.items() if key in needed}
            launches = 1 + sum(item.launches - 1 for item in group)  # gradients of norms' weights stay apart
            found.append(Work("fused", "elementwise", launches, reads, kept))
        else:
            found += group
        needed |= reads.keys()
    return found[::-1]


@dataclass(frozen=True)
class Point:
    """A mask on one model, as it stands and fused."""

    mask: str
    ideal: float
    step_flops: float
    plain: list[Work]
    fused: list[Work]


def points(model: str, batch: int) -> list[Point]:
    config = gpu_step.configs(torch.device("cuda"))[model]
    stand = Bench(config, batch, torch.device("meta"), torch.bfloat16)
    found = []
    for mask in MASKS:
        row, work = stand.row(mask, "maskdiff"), recorded(stand, mask)
        found.append(
            Point(mask, flops.ideal(config.model, stand.mask(mask).counts), row["step_flops"], work, fused(work))
        )
    return found


def milliseconds(work: list[Work], card: str, *kinds: str) -> float:
    """Of a step's work, or of some kinds of it."""
    return 1e3 * sum(item.seconds(COPY[card]) for item in work if not kinds or item.kind in kinds)


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def counted(model: str, batch: int, found: list[Point]) -> list[str]:
    """The table of a step's bytes, FLOPs and launches."""

    def gigabytes(work: list[Work], *kinds: str) -> str:
        return f"{sum(item.bytes for item in work if item.kind in kinds) / 1e9:.2f}"

    rows = [
        [
            shown(point.mask),
            f"{point.step_flops / 1e12:.2f}",
            f"{sum(item.flops for item in point.plain) / 1e12:.2f}",
            gigabytes(point.plain, "products"),
            gigabytes(point.plain, "attention"),
            f"{gigabytes(point.plain, 'elementwise')} / {gigabytes(point.fused, 'elementwise')}",
            gigabytes(point.plain, "draw", "gather and noise", "loss"),
            gigabytes(point.plain, "optimizer"),
            f"{sum(item.launches for item in point.plain)} / {sum(item.launches for item in point.fused)}",
        ]
        for point in found
    ]
    head = ["mask", "TFLOP counted", "TFLOP computed", "GB: products", "attention", "elementwise", "noise, loss"]
    return [f"{model}, batch {batch}:", "", *table([*head, "optimizer", "launches"], rows)]


def timed(model: str, batch: int, found: list[Point]) -> list[str]:
    """The table of expected times."""
    rows = []
    for card in COPY:
        for form in ("as it stands", "fused"):
            work = [point.plain if form == "as it stands" else point.fused for point in found]
            dense = milliseconds(work[0], card)
            for point, items in zip(found, work, strict=True):
                step = milliseconds(items, card)
                outside = milliseconds(items, card, "draw", "gather and noise", "loss", "optimizer")
                cells = (milliseconds(items, card, kind) for kind in ("products", "attention", "elementwise"))
                rows.append(
                    [
                        f"{card}, {form}",
                        shown(point.mask),
                        f"**{step:.2f}**",
                        *(f"{cell:.2f}" for cell in cells),
                        f"{outside:.2f} ({outside / step:.1%})",
                        f"{dense / step:.2f}x of {point.ideal:.2f}x",
                        f"{dense / step / point.ideal:.2f}",
                        f"{point.step_flops / (1e-3 * step) / MATRIX:.0%}",
                    ]
                )
    head = ["card, step", "mask", "ms a step", "products", "attention", "elementwise", "all else"]
    return [f"{model}, batch {batch}, expected:", "", *table([*head, "speed-up", "retained", "MFU"], rows)]


def shown(mask: str) -> str:
    return "0" if mask == "dense" else f"{float(mask.split(':')[1]):.0%}".replace("%", " %")


def text() -> str:
    """The section of the page."""
    lines: list[str] = []
    for model, batch in PLACES:
        found = points(model, batch)
        lines += [*counted(model, batch, found), "", *timed(model, batch, found), ""]
    return "\n".join(lines)


def on_page(page: str) -> str:
    """What the page holds between the markers."""
    return page.split(BEGIN)[1].split(END)[0].strip()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python benchmarks/predict.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--write", action="store_true", help="put the tables into docs/performance.md")
    options = parser.parse_args()
    found = text()
    print(found)
    if options.write:
        page = PAGE.read_text()
        PAGE.write_text(page.replace(on_page(page), found.strip()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
