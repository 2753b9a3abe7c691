"""What a study may claim: differences from dense training with intervals over seeds, and one plain sentence."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LEVEL = 0.95  # of all intervals of a family together
METHOD = (
    "Welch's t over seeds; {count} comparisons with dense, each interval widened by Šidák's correction so that all of "
    "them hold together with 95% confidence"
)


@dataclass(frozen=True)
class Interval:
    """A mean over seeds, or a difference of two. The ends are None where seeds are too few to tell."""

    mean: float
    low: float | None
    high: float | None

    @property
    def told_apart(self) -> bool:
        """Whether 0 lies outside."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class Verdict:
    """What can be said of groups against a baseline by one measure of which less is better."""

    outcome: str  # "better": a group is; "none" can be told apart; "dense" is better than all; "open": too few seeds
    best: str | None  # the group that is meant; None where there is nothing to compare
    differences: dict[str, Interval]  # from the baseline, by group; below 0: better than it
    near: list[str]  # groups that cannot be told apart from the best, itself not among them
    worse: list[str]  # groups that are told apart from the baseline and worse
    method: str
    sentence: str


def mean_interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """Student's interval of a mean. Without ends for a single value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean, None, None)
    half = _quantile((1 + level) / 2, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def difference(values: Sequence[float], others: Sequence[float], tails: float = 1 - LEVEL) -> Interval:
    """Welch's interval of mean(values) - mean(others); `tails` is the probability that it leaves out, both ends."""
    mean = statistics.fmean(values) - statistics.fmean(others)
    if min(len(values), len(others)) < 2:
        return Interval(mean, None, None)
    parts = [statistics.variance(each) / len(each) for each in (values, others)]
    total = sum(parts)
    if total == 0:
        return Interval(mean, mean, mean)
    freedom = total**2 / sum(part**2 / (len(each) - 1) for part, each in zip(parts, (values, others), strict=True))
    half = _quantile(1 - tails / 2, freedom) * math.sqrt(total)
    return Interval(mean, mean - half, mean + half)


def compare(baseline: Sequence[float], groups: Mapping[str, Sequence[float]]) -> dict[str, Interval]:
    """Each group's difference from the baseline; all intervals hold together at LEVEL (Šidák 1967; Dunnett's T3)."""
    comparable = sum(len(values) > 1 for values in groups.values())
    tails = _shared(comparable)
    return {name: difference(values, baseline, tails) for name, values in groups.items()}


def near_best(groups: Mapping[str, Sequence[float]]) -> list[str]:
    """The groups that may be the best one: those that no other group beats (Hsu 1981: one-sided, as many as others).

    A group of a single seed is never ruled out, and rules none out.
    """
    tails = 2 * _shared(len(groups) - 1)  # one-sided
    kept = []
    for name, values in groups.items():
        others = (difference(values, other, tails) for key, other in groups.items() if key != name)
        if not any(gap.low is not None and gap.low > 0 for gap in others):
            kept.append(name)
    return kept


def decide(
    baseline: Sequence[float],  # a value for each seed, of what less is better
    groups: Mapping[str, Sequence[float]],  # the same of every group that is compared; none empty
    measure: str,  # how the sentence names the value: "Frechet distance (builtin)"
    name: str = "dense training",  # how it names the baseline
) -> Verdict:
    """The verdict after equal training time."""
    if not groups or not baseline:
        missing = name if not baseline else "a masked run"
        sentence = f"No verdict yet: {missing} has not finished with any seed."
        return Verdict("open", None, {}, [], [], "", sentence)
    gaps = compare(baseline, groups)
    told = {key: gap for key, gap in gaps.items() if gap.low is not None}
    method = METHOD.format(count=len(told)) if told else ""
    best = min(gaps, key=lambda key: gaps[key].mean)
    base = statistics.fmean(baseline)
    if not told:
        lowest = f"{best} ({number(statistics.fmean(groups[best]))} against {number(base)} of {name})"
        sentence = (
            f"No verdict: a single seed cannot tell a difference from chance. The lowest {measure} of a masked run so "
            f"far is that of {lowest}; give --seeds 3 or more."
        )
        return Verdict("open", best, gaps, [], [], method, sentence)
    worse = [key for key, gap in told.items() if gap.told_apart and gap.mean > 0]
    better = {key: gap for key, gap in told.items() if gap.told_apart and gap.mean < 0}
    if better:
        best = min(better, key=lambda key: better[key].mean)
        gap = better[best]
        near = [key for key in near_best({**groups, name: baseline}) if key not in (best, name)]
        sentence = (
            f"On these images and this machine, pre-train at {best}: after equal training time its {measure} is "
            f"{number(-gap.mean)} ({-gap.mean / abs(base):.0%}) below that of {name} "
            f"({_ends(-_end(gap.high), -_end(gap.low))}). "
            + (f"It cannot be told apart from {_list(near)}." if near else "It is told apart from all others as well.")
        )
        return Verdict("better", best, gaps, near, worse, method, sentence + _worse(worse, name))
    best = min(told, key=lambda key: told[key].mean)
    gap = told[best]
    if len(worse) == len(gaps):
        sentence = (
            f"Masking does not pay here: {name} is better. After equal training time the {measure} of the best masked "
            f"run, {best}, is {number(gap.mean)} above ({_ends(_end(gap.low), _end(gap.high))})."
        )
        return Verdict("dense", best, gaps, [], worse, method, sentence)
    way = "below" if gap.mean < 0 else "above"
    ends = (_end(gap.low), _end(gap.high))
    sentence = (
        f"No rate can be told apart from {name} for the better: after equal training time the {measure} of the best "
        f"one, {best}, is {number(abs(gap.mean))} {way} "
        f"({LEVEL:.0%} interval of the difference {signed(ends[0])} to {signed(ends[1])})."
    )
    near = [key for key in near_best({**groups, name: baseline}) if key not in (best, name)]
    return Verdict("none", best, gaps, near, worse, method, sentence + _worse(worse, name))


def number(value: float) -> str:
    """Three digits that count, and never fewer than are before the point: 171, 17.1, 0.0171."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:.{min(6, max(0, 2 - math.floor(math.log10(abs(value)))))}f}"


def signed(value: float) -> str:
    return ("+" if value > 0 else "") + number(value).replace("-", "−")


def _ends(low: float, high: float) -> str:
    return f"{LEVEL:.0%} interval {number(low)} to {number(high)}"


def _end(value: float | None) -> float:
    assert value is not None
    return value


def _worse(worse: list[str], name: str) -> str:
    return f" Worse than {name}: {_list(worse)}." if worse else ""


def _list(names: Sequence[str]) -> str:
    comma = "; " if any("," in name for name in names) else ", "  # names may have commas of their own
    return names[0] if len(names) == 1 else f"{comma.join(names[:-1])}{comma[0] * (comma[0] == ';')} and {names[-1]}"


def _shared(count: int) -> float:
    """The probability that one of so many intervals may leave out, such that all hold together at LEVEL."""
    return 1 - LEVEL ** (1 / max(1, count))


def _quantile(share: float, freedom: float) -> float:
    from scipy import special  # imported where it is used: it is an extra

    return float(special.stdtrit(freedom, share))
