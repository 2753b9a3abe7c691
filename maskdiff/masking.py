"""Which patches a training stage shows: 'patch:0.75', 'block4:0.9', 'crop:0.9', 'crop5', 'dense' and ranges of rates.

Counts are floored as in the authors' code (MaskDM, arXiv 2306.11363, datasets/masking_generator.py), so any rate in
[0, 1) works on any grid unless it hides nothing or everything; `effective_rate` says what a mask really hides.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import TypeVar

from torch import Tensor

from maskdiff_kernels import Mask

from .errors import UserError

ACCEPTED = "patch:RATE, block4:RATE (a side in patches), crop:RATE, crop5 (a side) or dense; RATE is 0.75 or 0.5-0.9"
SMALLEST_GROUP = 16  # samples among which a range of rates is spread evenly

_NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_KIND = re.compile(r"([a-z]+)(\d*)")
_RATE = re.compile(rf"({_NUMBER})(?:-({_NUMBER}))?")


@dataclass(frozen=True)
class MaskPlan:
    """What a stage asks for, before the grid is known. `str(plan)` is the text that `parse_mask` reads."""

    kind: str  # "dense" | "patch" | "block" | "crop"
    size: int = 0  # block: its side; crop: the visible square's side where that is given, else 0. In patches
    lo: float = 0.0  # lowest rate of a range, or the rate
    hi: float = 0.0  # highest rate of a range, or the rate

    @property
    def is_range(self) -> bool:
        return self.lo < self.hi

    @property
    def is_dense(self) -> bool:
        return self.kind == "dense" or (self.hi == 0 and not self._fixed_crop)

    @property
    def _fixed_crop(self) -> bool:
        return self.kind == "crop" and self.size > 0

    def __str__(self) -> str:
        kind = f"{self.kind}{self.size or ''}"
        if self.kind == "dense" or self._fixed_crop:
            return kind
        return f"{kind}:{number_text(self.lo)}" + (f"-{number_text(self.hi)}" if self.is_range else "")


def parse_mask(text: str) -> MaskPlan:
    """Reads KIND:RATE. Rates from 0 to 1 are taken; whether one hides nothing or all, the grid decides (`resolve`).

    Raises UserError for an unknown kind (with the nearest), a missing or foreign rate, a side that is missing or 0.
    """
    name, colon, rate = text.strip().partition(":")
    kind, size = parse_kind(name, text)
    if kind == "dense" or (kind == "crop" and size):
        if colon:
            raise UserError(f"mask {text!r}: {name} takes no rate; write {name!r}, or crop:{rate or '0.9'} for a rate")
        return MaskPlan(kind, size)
    match = _RATE.fullmatch(rate)
    if match is None:
        got = f"the rate {rate!r} is not a number or a range" if rate else "the rate is missing"
        raise UserError(f"mask {text!r}: {got}; write {name}:0.75, or {name}:0.5-0.9 for a range")
    lo = float(match[1])
    hi = lo if match[2] is None else float(match[2])
    for value in (lo, hi):
        if value > 1:
            hint = f"; did you mean {value / 100:g}?" if value < 100 else ""
            raise UserError(f"mask {text!r}: a rate is the share of hidden patches, from 0 to below 1{hint}")
    if lo > hi:
        raise UserError(f"mask {text!r}: a range runs from low to high; write {MaskPlan(kind, size, hi, lo)}")
    return MaskPlan(kind, size, lo, hi)


def parse_kind(name: str, text: str) -> tuple[str, int]:
    """'block4' -> ("block", 4), 'crop' -> ("crop", 0). `text` is what a UserError quotes."""
    match = _KIND.fullmatch(name)
    kind, digits = match.groups() if match else (name, "")
    if kind not in ("dense", "patch", "block", "crop"):
        near = get_close_matches(kind, ("dense", "patch", "block", "crop"), 1, 0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"mask {text!r}: no kind {name!r}; {hint}accepted: {ACCEPTED}")
    if kind in ("dense", "patch") and digits:
        raise UserError(f"mask {text!r}: {kind} takes no size; write {kind!r}, or block{digits}")
    if kind == "block" and not digits:
        raise UserError(f"mask {text!r}: block takes its side in patches; write block2 or block4")
    if digits and int(digits) == 0:
        raise UserError(f"mask {text!r}: a side of 0 patches; write {kind}2 or more")
    return kind, int(digits or 0)


def with_mask(mask: str, kind: str | None = None, rate: str | None = None) -> str:
    """The mask text with another kind, another rate, or both (what --mask.kind and --mask.rate do).

    Raises UserError where the new kind needs a rate that `mask` does not have, or fixes one that is given too.
    """
    old = parse_mask(mask)
    name, size = (old.kind, old.size) if kind is None else parse_kind(kind, kind)
    if name == "crop" and kind is None and rate is not None:
        size = 0  # the rate now decides the side
    if rate is not None:
        return str(parse_mask(f"{name}{size or ''}:{rate}"))
    if name == "dense" or (name == "crop" and size):
        return str(MaskPlan(name, size))
    if old.hi == 0:
        raise UserError(f"mask {mask!r} has no rate that {kind} could take over; give --mask.rate as well")
    return str(replace(old, kind=name, size=size))


def resolve(
    plan: MaskPlan,
    grid: tuple[int, int],  # patches down, across
    batch: int = 1,  # images a step: the number of samples that a range of rates is spread over depends on it
) -> Mask:
    """The mask of a stage: how many patches each sample shows.

    Raises UserError for a rate above 0 that hides nothing, one that hides everything, and blocks or squares that do not
    fit the grid; each names what would work.
    """
    n = grid[0] * grid[1]
    if plan.is_dense:
        return Mask("dense", 0, (n,))
    if n == 1:
        raise UserError(f"mask {str(plan)!r}: images of one patch cannot be masked; use dense, or smaller patches")
    _check_size(plan, grid)
    counts = tuple(_visible(plan, grid, rate) for rate in _rates(plan, batch))
    if max(counts) > n or min(counts) < 1 or min(counts) == n:
        raise UserError(_does_not_fit(plan, grid, counts))
    return Mask(plan.kind, plan.size if plan.kind == "block" else 0, counts)


def mean_visible(mask: Mask) -> float:
    """Patches that a sample shows, the mean over a group."""
    return sum(mask.counts) / len(mask.counts)


def effective_rate(mask: Mask, n: int) -> float:
    """The share of n patches that a mask hides, over the samples of its group."""
    return 1 - mean_visible(mask) / n


Count = TypeVar("Count", int, Tensor)


def rate_tenth(visible: Count, n: int) -> Count:
    """t where `visible` of n patches are a mask rate from t / 10 to below (t + 1) / 10, in whole numbers throughout."""
    return 10 * (n - visible) // n


def group_size(batch: int) -> int:
    """Samples of a group: the batch's smallest divisor from 16 on, else the batch itself."""
    return next((g for g in range(SMALLEST_GROUP, batch + 1) if batch % g == 0), batch)


def _rates(plan: MaskPlan, batch: int) -> list[float]:
    if not plan.is_range:
        return [plan.lo]
    group = group_size(batch)
    return [plan.lo + (plan.hi - plan.lo) * (i + 0.5) / group for i in range(group)]


def _visible(plan: MaskPlan, grid: tuple[int, int], rate: float) -> int:
    """Visible patches at a rate. A crop that is larger than the grid gives more than there are."""
    n = grid[0] * grid[1]
    if plan.kind == "patch":
        return n - int(rate * n)
    if plan.kind == "block":
        area = plan.size**2
        return n - int(rate * n) // area * area
    side = plan.size or round(math.sqrt((1 - rate) * n))
    return side * side if side <= min(grid) else n + 1


def _check_size(plan: MaskPlan, grid: tuple[int, int]) -> None:
    where = f"mask {str(plan)!r} on a grid of {grid[0]} x {grid[1]} patches"
    if plan.kind == "block" and (grid[0] % plan.size or grid[1] % plan.size or grid == (plan.size, plan.size)):
        fits = [b for b in range(2, min(grid) + 1) if not (grid[0] % b or grid[1] % b or grid == (b, b))]
        near = sorted(sorted(fits, key=lambda b: abs(b - plan.size))[:2])
        use = " or ".join([f"block{b}" for b in near] or ["patch"])
        why = "one block covers it all" if grid == (plan.size, plan.size) else f"{plan.size} does not divide it"
        raise UserError(f"{where}: {why}; use {use}")
    if plan.kind == "crop" and plan.size:
        if plan.size > min(grid):
            raise UserError(
                f"{where}: the square does not fit; the largest that hides something is crop{_largest(grid)}"
            )
        if grid == (plan.size, plan.size):
            raise UserError(f"{where}: it hides nothing; use crop{_largest(grid)}, or dense")


def _largest(grid: tuple[int, int]) -> int:
    """Side of the largest square that hides something."""
    return min(grid) if grid[0] != grid[1] else grid[0] - 1


def _does_not_fit(plan: MaskPlan, grid: tuple[int, int], counts: tuple[int, ...]) -> str:
    n = grid[0] * grid[1]
    area = plan.size**2 if plan.kind == "block" else 1
    most = _largest(grid) ** 2 if plan.kind == "crop" else n - area  # visible patches of the lowest rate that works
    low = _rate_text(1 - most / n, lambda rate: _visible(plan, grid, rate) == most)
    high = _rate_text(1 - area / n, lambda rate: _visible(plan, grid, rate) == area)
    if min(counts) < 1:
        what, use = "it hides everything", f"the nearest rate that works is {high}"
    elif max(counts) > n:
        what, use = "no square shows that much", f"the nearest rates that work are 0 and {low}"
    else:
        what, use = "it hides nothing", f"the nearest rates that work are 0 (dense) and {low}"
    return f"mask {str(plan)!r} on a grid of {grid[0]} x {grid[1]} patches: {what}; {use}"


def _rate_text(rate: float, works: Callable[[float], bool]) -> str:
    """The shortest decimal at or just above `rate` that works."""
    for digits in range(2, 12):
        for step in (0, 1):
            shown = (math.floor(rate * 10**digits) + step) / 10**digits
            if 0 < shown < 1 and works(shown):
                return number_text(shown)
    return number_text(rate)


def number_text(value: float) -> str:
    """The shortest text that reads back as the same number."""
    return repr(float(value)).removesuffix(".0")
