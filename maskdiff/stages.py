"""Training stages and the string that describes them: 'block4:0.9 x5000 b256 lr2e-4 w500, dense 10m b64 cosine'."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any, Literal

from maskdiff_kernels import Mask

from . import durations
from .errors import UserError
from .masking import SMALLEST_GROUP, mean_visible, number_text, parse_mask, resolve, with_mask

GRAMMAR = (
    "first KIND:RATE (patch, block4, crop; 0.75 or 0.5-0.9) or dense or crop5, then in any order "
    "x5000 (steps) or 10m or 1.5h (time), b64 (images a step; b64/16: 16 at a time, b64/auto: as many as fit in "
    "memory) or t8192 (tokens a step), lr2e-4, "
    "w500 (warm-up steps), c1.0 (clip), const or cosine or cool0.3, fresh"
)

Decay = Literal["const", "cosine"]


@dataclass(frozen=True)
class Stage:
    """One part of a run: a mask, a length, a batch and a learning rate."""

    mask: str = "dense"
    """patch:0.75, block4:0.9, crop:0.9, crop5 or dense; a range of rates is patch:0.5-0.9"""
    steps: int | None = None
    """length in steps; or give minutes"""
    minutes: float | None = None
    """length in minutes of training time; or give steps"""
    batch: int | None = 64
    """images a step; or give tokens"""
    tokens: int | None = None
    """tokens a step, from which the images a step follow; or give batch"""
    micro_batch: int | Literal["auto"] | None = None
    """most images at a time, their gradients added up over the batch; auto: as many as fit in memory; none: all"""
    lr: float = 2e-4
    """learning rate"""
    warmup: int = 0
    """steps over which the learning rate rises linearly from 0"""
    clip: float | None = None
    """largest gradient norm"""
    decay: Decay = "const"
    """course of the learning rate after the warm-up"""
    cool: float = 0.0
    """share of the stage, at its end, over which a constant learning rate falls linearly to 0"""
    fresh: bool = False
    """starts with zero moments and a new EMA, as a run of its own would"""

    def steps_at(self, step_ms: float) -> int:
        """Its length in steps, of so many milliseconds each where it is given in minutes."""
        if self.steps is not None:
            return self.steps
        assert self.minutes is not None  # a stage has one length or the other
        return max(1, math.ceil(self.minutes * 60e3 / step_ms))


def minutes_of(time: float | str) -> float:
    """Minutes of a time budget: 90s, 30m, 1h30m, or a number of minutes. Raises UserError for what is none."""
    minutes = durations.seconds(time, "time_budget") / 60 if isinstance(time, str) else time
    if not 0 < minutes <= 2**40:
        raise UserError(f"time_budget is {time}; give a time above 0: 2h, 30m, 90s, or minutes")
    return minutes


def share_time(
    stages: Sequence[Stage],
    step_ms: Sequence[float],  # what a step of each takes
    minutes: float,  # for all
) -> list[int]:
    """Lengths in steps with which all stages end in time. Each keeps its share of the time: the longer it says to be,
    in steps times what a step takes or in minutes, the more it has.

    Raises UserError where a stage would have no step after its warm-up; it says what time it takes.
    """
    said = [
        stage.steps * ms if stage.steps is not None else 60e3 * (stage.minutes or 0.0)
        for stage, ms in zip(stages, step_ms, strict=True)
    ]
    lengths = [60e3 * minutes * time / sum(said) / ms for time, ms in zip(said, step_ms, strict=True)]
    missing = [(stage.warmup + 1) / length for stage, length in zip(stages, lengths, strict=True)]
    if (factor := max(missing)) > 1:
        number = missing.index(factor)
        least = math.ceil(100 * minutes * factor) / 100
        raise UserError(
            f"time_budget is too short: {int(lengths[number])} steps would be left to {called(number)} "
            f"'{stages[number].mask}', of {step_ms[number]:.1f} ms, and its warm-up alone has "
            f"{stages[number].warmup}; give {least:g}m or more, or shorter warm-ups"
        )
    return [int(length) for length in lengths]


def fit(
    stage: Stage,
    grid: tuple[int, int],  # patches down, across
    extras: int,  # tokens of an image beside its patches: the time's (and the label's)
) -> tuple[int, Mask]:
    """Images a step, and what is visible of them. A token budget is not exceeded.

    Raises UserError for a mask that does not fit the grid, a budget that does not hold one image, a range of rates for
    a single image.
    """
    plan = parse_mask(stage.mask)
    batch = stage.batch
    if batch is None:
        batch = _images_in(stage, mean_visible(resolve(plan, grid, SMALLEST_GROUP)) + extras)
        # another number of images may take the range at other rates, and so other tokens an image
        while batch > 1 and tokens_of(resolve(plan, grid, batch), batch, extras) > (stage.tokens or 0):
            batch -= 1
    if plan.is_range and batch == 1:
        middle = number_text(round((plan.lo + plan.hi) / 2, 6))
        raise UserError(
            f"stage {stage.mask!r}: a range of rates is spread over the images of a step, and this one has a single "
            f"image; give b{SMALLEST_GROUP} or more, or one rate such as {with_mask(stage.mask, rate=middle)}"
        )
    return batch, resolve(plan, grid, batch)


def called(number: int) -> str:
    """A stage's name, `number` from 0, as it is told and as options have it."""
    return f"stage {number + 1} (--stages.{number})"


def cut_short(
    stages: Sequence[Stage],
    lengths: Sequence[int | None],  # of each in steps; None: not known yet
    most: int,  # steps of the run
) -> str | None:
    """What a bound on the steps of a run leaves out of its stages, in words; None where that is nothing."""
    left = most
    for number, (stage, length) in enumerate(zip(stages, lengths, strict=True)):
        if length is None:
            return f"the run ends after {most} steps, or with its last stage: {called(number)} is given by time"
        if left < length:
            rest = len(stages) - number - 1
            others = f"; {rest} stage{'s' * (rest > 1)} after it will not begin" if rest else ""
            done = f"after {left} of the {length} steps of" if left else "before"
            return f"the run ends {done} {called(number)}, {stage.mask}{others}"
        left -= length
    return None


def warmup_too_long(number: int, stage: Stage, steps: int) -> str | None:
    """A line where a stage of so many steps never reaches its learning rate; None where it does."""
    if stage.warmup <= steps:
        return None
    reached = learning_rate(stage, steps - 1, steps)
    return (
        f"{called(number)} has {steps} steps and a warm-up of {stage.warmup}: its learning rate ends at {reached:.3g} "
        f"and never is {stage.lr:g}; give a warm-up of at most {steps}, as w{steps // 10}"
    )


def length_notes(
    stages: Sequence[Stage],
    lengths: Sequence[int | None],  # of each in steps; None: not known yet
    begun: int,  # the stages before this one are over
    most: int | None,  # --max-steps
) -> list[str]:
    """What --max-steps and warm-ups make of the stages, as far as their lengths are known: a line each."""
    cut = None if most is None else cut_short(stages, lengths, most)
    notes = [] if cut is None else [f"by --max-steps {most} {cut}"]
    for number, (stage, length) in enumerate(zip(stages, lengths, strict=True)):
        if number >= begun and length is not None and (told := warmup_too_long(number, stage, length)):
            notes.append(told)
    return notes


def tokens_of(mask: Mask, batch: int, extras: int) -> int:
    """Tokens of a step, counted exactly: `batch` holds whole groups."""
    return batch // len(mask.counts) * sum(mask.counts) + batch * extras


def micro_batches(batch: int, mask: Mask) -> list[int]:
    """Images that micro-batches of such steps may have, ascending: equal parts of the batch, of whole groups."""
    group = len(mask.counts)
    return [size for size in range(group, batch + 1, group) if batch % size == 0]


def micro_batch(stage: Stage, batch: int, mask: Mask) -> int | None:
    """Images that a step of the stage takes at a time: at most as many as it says. None: what fits is to be found.

    Raises UserError where that is less than a group of a range of rates.
    """
    if stage.micro_batch is None or stage.micro_batch == "auto":
        return batch if stage.micro_batch is None else None
    sizes = [size for size in micro_batches(batch, mask) if size <= stage.micro_batch]
    if not sizes:
        group = len(mask.counts)
        smaller = "" if group <= SMALLEST_GROUP else f", or a batch that {SMALLEST_GROUP} divides"
        raise UserError(
            f"stage {stage.mask!r}: its range of rates is spread over every {group} images, which a micro-batch holds "
            f"together; {stage.micro_batch} at a time are too few, give {group} or more{smaller}"
        )
    return sizes[-1]


def _images_in(stage: Stage, tokens_per_image: float) -> int:
    if stage.tokens is None or stage.tokens < tokens_per_image:
        least = math.ceil(tokens_per_image)
        raise UserError(
            f"stage '{stage.mask}': {stage.tokens} tokens a step do not hold an image of {least} tokens; "
            f"give t{least} or more"
        )
    return int(stage.tokens // tokens_per_image)


def learning_rate(
    stage: Stage,
    step: int,  # of the stage, from 0
    steps: int,  # length of the stage
) -> float:
    """The learning rate of a step: a function of the step alone, so that a resumed run continues it exactly.

    The warm-up's first step has lr / warmup and its last one lr, so no step is spent at rate 0.
    """
    if step < stage.warmup:
        return stage.lr * (step + 1) / stage.warmup
    if stage.decay == "cosine":
        done = (step - stage.warmup) / max(1, steps - stage.warmup)
        return stage.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    if stage.cool > 0:
        return stage.lr * min(1.0, max(0, steps - step) / (stage.cool * steps))
    return stage.lr


# Word -> the fields it sets. One entry a word; two words that set one field exclude each other.
_INT = r"(\d+)"
_SIZE = r"(auto|\d+(?:/(?:auto|\d+))?)"
_FLOAT = r"((?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)"
_WORDS: tuple[tuple[str, re.Pattern[str], str], ...] = (
    ("x", re.compile("x" + _INT), "length"),
    ("m", re.compile(_FLOAT + "m"), "length"),
    ("h", re.compile(_FLOAT + "h"), "length"),
    ("b", re.compile("b" + _SIZE), "batch"),
    ("t", re.compile("t" + _SIZE), "batch"),
    ("lr", re.compile("lr" + _FLOAT), "learning rate"),
    ("w", re.compile("w" + _INT), "warm-up"),
    ("c", re.compile("c" + _FLOAT), "clip"),
    ("const", re.compile("const"), "decay"),
    ("cosine", re.compile("cosine"), "decay"),
    ("cool", re.compile("cool" + _FLOAT), "decay"),
    ("fresh", re.compile("fresh"), "fresh"),
)
_EXAMPLES = {
    "x": "x5000", "m": "10m", "h": "1.5h", "b": "b64", "t": "t8192", "lr": "lr2e-4", "w": "w500", "c": "c1.0",
    "const": "const", "cosine": "cosine", "cool": "cool0.3", "fresh": "fresh",
}  # fmt: skip
_MEANT = {
    "step": "x", "steps": "x", "minutes": "m", "min": "m", "hours": "h", "bs": "b", "batch": "b", "tokens": "t",
    "warmup": "w", "warm": "w", "clip": "c", "constant": "const", "cos": "cosine", "linear": "cool", "l": "lr",
}  # fmt: skip


def parse_stages(
    text: str,
    masked: Stage = Stage(),  # noqa: B008 - frozen. What a masked stage takes where its words do not say
    dense: Stage = Stage(),  # noqa: B008 - frozen. The same for a dense stage
) -> tuple[Stage, ...]:
    """Reads the stages of a run. The length is always said; the rest falls back to `masked` and `dense`.

    Raises UserError with the stage, the word and its position (in characters, from 1), and what is accepted.
    """
    stages = []
    start = 0
    parts = text.split(",")
    for number, part in enumerate(parts):
        words = [(match.group(), start + match.start() + 1) for match in re.finditer(r"\S+", part)]
        if not words:
            where = f"stages {text!r}: {called(number)} is empty" if len(parts) > 1 else "stages: the text is empty"
            raise UserError(f"{where}; a stage is {GRAMMAR}")
        stages.append(_parse_stage(number, words, masked, dense))
        start += len(part) + 1
    return tuple(stages)


def _parse_stage(number: int, words: Sequence[tuple[str, int]], masked: Stage, dense: Stage) -> Stage:
    first, position = words[0]
    if _match(first) is not None:
        raise UserError(
            f"{called(number)}: {first!r} (character {position}) stands where the mask does; start with dense"
        )
    try:
        plan = parse_mask(first)
    except UserError as error:
        raise UserError(f"{called(number)}, character {position}: {error}") from None
    stage = replace(dense if plan.is_dense else masked, mask=first, steps=None, minutes=None, fresh=False)
    said: dict[str, str] = {}
    for word, position in words[1:]:
        found = _match(word)
        if found is None:
            raise UserError(
                f"{called(number)}: {word!r} (character {position}): {_unknown(word)}; a stage is {GRAMMAR}"
            )
        name, value, what = found
        if what in said:
            raise UserError(
                f"{called(number)}: {word!r} (character {position}) says the {what} again, "
                f"after {said[what]!r}; keep one"
            )
        said[what] = word
        try:
            stage = replace(stage, **_fields(name, value))
        except UserError as error:
            raise UserError(f"{called(number)}: {word!r} (character {position}): {error}") from None
    if "length" not in said:
        line = " ".join(word for word, _ in words)
        raise UserError(f"{called(number)} '{line}' has no length; add steps (x5000) or time (10m, 1.5h)")
    return stage


def _match(word: str) -> tuple[str, str, str] | None:
    for name, pattern, what in _WORDS:
        match = pattern.fullmatch(word)
        if match:
            return name, match.group(match.lastindex or 0), what
    return None


def _fields(name: str, value: str) -> dict[str, Any]:
    micro: int | str | None = None
    if name in ("b", "t"):
        if value == "auto":
            return {"micro_batch": "auto"}
        value, _, at_once = value.partition("/")
        micro = int(at_once) if at_once.isdigit() else at_once or None
    number = float(value) if name not in ("const", "cosine", "fresh") else 0.0
    if micro == 0:
        raise UserError(f"takes more than 0 at a time, such as '{name}{value}/16'")
    if name in ("x", "m", "h", "b", "t", "lr") and not number > 0:
        raise UserError(f"takes more than 0, such as {_EXAMPLES[name]!r}")
    if not math.isfinite(number):
        raise UserError(f"is too large; write for example {_EXAMPLES[name]!r}")
    if name == "cool":
        if not 0 < number <= 1:
            raise UserError("takes the share of the stage over which the rate falls, above 0 and up to 1")
        return {"decay": "const", "cool": number}
    fields: dict[str, dict[str, Any]] = {
        "x": {"steps": int(number)},
        "m": {"minutes": number},
        "h": {"minutes": number * 60},
        "b": {"batch": int(number), "tokens": None, "micro_batch": micro},
        "t": {"tokens": int(number), "batch": None, "micro_batch": micro},
        "lr": {"lr": number},
        "w": {"warmup": int(number)},
        "c": {"clip": number or None},
        "const": {"decay": "const", "cool": 0.0},
        "cosine": {"decay": "cosine", "cool": 0.0},
        "fresh": {"fresh": True},
    }
    return fields[name]


def _unknown(word: str) -> str:
    """What is wrong with a word, and the word that was probably meant."""
    if re.match(r"[bt]\d+/", word):
        return f"not of the form '{word.partition('/')[0]}/16' or '{word.partition('/')[0]}/auto'"
    letters = "".join(re.findall(r"[A-Za-z]+", re.sub(r"(?<=\d)[eE](?=[-+\d])", "", word))).lower()
    name = letters if letters in _EXAMPLES else _MEANT.get(letters)
    if name is None:
        if _is_mask(word):
            return "a mask stands first in its stage; put a comma before it"
        near = get_close_matches(letters, [*_EXAMPLES, *_MEANT], 1, 0.6)
        name = _MEANT.get(near[0], near[0]) if near else None
    if name is None:
        return "no such word"
    if name == letters:
        return f"not of the form {_EXAMPLES[name]!r}"
    return f"no such word, did you mean {_EXAMPLES[name]!r}?"


def templates(stages: Sequence[Stage]) -> tuple[Stage, Stage]:
    """What a new masked and a new dense stage take over from `stages`: the first of their kind, else the first."""
    first = stages[0] if stages else Stage()
    masked = next((stage for stage in stages if not parse_mask(stage.mask).is_dense), first)
    dense = next((stage for stage in stages if parse_mask(stage.mask).is_dense), first)
    return masked, dense


def _is_mask(word: str) -> bool:
    """Whether a word is a valid mask."""
    try:
        parse_mask(word)
    except UserError:
        return False
    return True


def format_stages(stages: Sequence[Stage]) -> str:
    """The text that `parse_stages` reads back as the same stages, whatever its defaults."""
    return ", ".join(_format_stage(stage) for stage in stages)


def _format_stage(stage: Stage) -> str:
    words = [stage.mask]
    if stage.steps is not None:
        words.append(f"x{stage.steps}")
    if stage.minutes is not None:
        words.append(f"{number_text(stage.minutes)}m")
    micro = "" if stage.micro_batch is None else f"/{stage.micro_batch}"
    words.append((f"t{stage.tokens}" if stage.batch is None else f"b{stage.batch}") + micro)
    words.append(f"lr{number_text(stage.lr)}")
    words.append(f"w{stage.warmup}")
    words.append(f"c{number_text(stage.clip or 0)}")
    words.append(f"cool{number_text(stage.cool)}" if stage.cool else stage.decay)
    if stage.fresh:
        words.append("fresh")
    return " ".join(words)
