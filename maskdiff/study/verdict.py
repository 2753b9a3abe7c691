"""What a study may claim: differences from dense training with intervals over seeds, and one plain sentence."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LEVEL = 0.95  # of all intervals of a family together
METHOD = (
    "seeds are blocks (cells of a seed share first weights, the order of images and the noise), residuals are pooled "
    "over all groups ({freedom} degrees of freedom); {count} comparisons with {name}, each interval widened by Šidák's "
    "correction so that all of them hold together with 95% confidence"
)
Values = Mapping[int, float]  # by seed


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


@dataclass(frozen=True)
class Layout:
    """Groups whose seeds are blocks: a value is its group's mean, plus its seed's, plus a residual."""

    seeds: list[int]  # that all of the groups have
    variance: float  # of the residuals
    freedom: int

    @classmethod
    def of(cls, groups: Mapping[str, Values]) -> "Layout | None":
        """The groups of two seeds or more; None where fewer than two of them share two seeds."""
        counted = [values for values in groups.values() if len(values) > 1]
        seeds = sorted(set.intersection(*(set(values) for values in counted))) if counted else []
        if len(counted) < 2 or len(seeds) < 2:
            return None
        rows = [[values[seed] for seed in seeds] for values in counted]
        blocks = [statistics.fmean(column) for column in zip(*rows, strict=True)]
        whole = statistics.fmean(blocks)
        squares = sum(
            (value - statistics.fmean(row) - block + whole) ** 2
            for row in rows
            for value, block in zip(row, blocks, strict=True)
        )
        freedom = (len(rows) - 1) * (len(seeds) - 1)
        return cls(seeds, squares / freedom, freedom)

    def pooled(self, others: "Sequence[Layout]") -> "Layout":
        """The same with the residuals of other layouts, in which seeds spread alike, taken into the variance."""
        layouts = [self, *others]
        freedom = sum(one.freedom for one in layouts)
        return Layout(self.seeds, sum(one.variance * one.freedom for one in layouts) / freedom, freedom)

    def difference(self, values: Values, others: Values, tails: float) -> Interval:
        """The interval of mean(values) - mean(others); `tails` is the probability that it leaves out, both ends."""
        mean = statistics.fmean(values[seed] - others[seed] for seed in self.seeds)
        half = _quantile(1 - tails / 2, self.freedom) * math.sqrt(2 * self.variance / len(self.seeds))
        return Interval(mean, mean - half, mean + half)


def compare(baseline: Values, groups: Mapping[str, Values], beside: Sequence[Layout] = ()) -> dict[str, Interval]:
    """Each group's difference from the baseline; all intervals hold together at LEVEL (Šidák 1967, with Dunnett's
    pooled variance in a two-way layout). Two groups alone: Student's paired t. A group of one seed has no ends.
    `beside`: layouts of other comparisons whose residuals are pooled with these."""
    layout = _layout(baseline, groups, beside)
    tails = _shared(sum(len(values) > 1 for values in groups.values()))
    found = {}
    for name, values in groups.items():
        if layout is not None and len(values) > 1 and len(baseline) > 1:
            found[name] = layout.difference(values, baseline, tails)
        else:
            both = sorted(values.keys() & baseline.keys())
            pairs = [(values[seed], baseline[seed]) for seed in both] or [(_mean(values), _mean(baseline))]
            found[name] = Interval(statistics.fmean(one - other for one, other in pairs), None, None)
    return found


def _layout(baseline: Values, groups: Mapping[str, Values], beside: Sequence[Layout]) -> Layout | None:
    layout = Layout.of({**groups, "": baseline})
    return layout and layout.pooled(beside)


def near_best(groups: Mapping[str, Values]) -> list[str]:
    """The groups that may be the best one: those that no other group beats (Hsu 1981: one-sided, as many as others).

    A group of a single seed is never ruled out, and rules none out.
    """
    layout = Layout.of(groups)
    if layout is None:
        return list(groups)
    several = {name: values for name, values in groups.items() if len(values) > 1}
    tails = 2 * _shared(len(groups) - 1)  # one-sided

    def beaten(name: str) -> bool:
        gaps = (layout.difference(several[name], other, tails) for key, other in several.items() if key != name)
        return any(gap.low is not None and gap.low > 0 for gap in gaps)

    return [name for name in groups if name not in several or not beaten(name)]


def _mean(values: Values) -> float:
    return statistics.fmean(values.values())


def decide(
    baseline: Values,  # of what less is better
    groups: Mapping[str, Values],  # the same of every group that is compared; none empty
    measure: str,  # how the sentence names the value: "Frechet distance (builtin)"
    name: str = "dense training",  # how it names the baseline
    beside: Sequence[Layout] = (),  # see `compare`
) -> Verdict:
    """The verdict after equal training time."""
    if not groups or not baseline:
        missing = name if not baseline else "a masked run"
        sentence = f"No verdict yet: {missing} has not finished with any seed."
        return Verdict("open", None, {}, [], [], "", sentence)
    gaps = compare(baseline, groups, beside)
    told = {key: gap for key, gap in gaps.items() if gap.low is not None}
    layout = _layout(baseline, groups, beside)
    method = METHOD.format(count=len(told), freedom=layout.freedom, name=name) if told and layout else ""
    best = min(gaps, key=lambda key: gaps[key].mean)
    base = _mean(baseline)
    if not told:
        lowest = f"{best} ({number(_mean(groups[best]))} against {number(base)} of {name})"
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
    """Three digits that count, and to a million never fewer than are before the point: 171, 17.1, 0.0171, 1.23e+07."""
    if value == 0 or not math.isfinite(value) or abs(value) >= 1e6:
        return f"{value:.3g}"
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
