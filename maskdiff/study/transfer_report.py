"""What the report of a transfer study says and shows: pre-trained on another set against from scratch, equal time."""

from dataclasses import dataclass

from . import charts, page, results, verdict
from .drawing import DASHES, DISTINCT, INK, Figure, Key
from .results import Group, Study
from .verdict import Interval, Verdict

LOSS, SCRATCH = "held-out loss on whole images", "training from scratch"
CURVES = "Bands: 95% intervals over seeds. Curves of pre-trained models begin where their pre-training ends."


@dataclass(frozen=True)
class Pair:
    """What is compared: a target set at a share of its images, from scratch and from each source."""

    target: str
    share: float
    groups: list[Group]

    @property
    def says(self) -> str:
        """As the page names it."""
        return f"{self.target}, {100 * self.share:g}% of the images"

    def scratch(self) -> Group | None:
        """The row to beat: from scratch for as long."""
        return next((one for one in self.groups if one.baseline), None)

    def short(self) -> Group | None:
        """From scratch in the fine-tuning's time alone."""
        return next((one for one in self.groups if one.about.get("source") is None and not one.baseline), None)

    def tuned(self) -> list[Group]:
        """What was pre-trained."""
        return [one for one in self.groups if one.about.get("source") is not None]


def pairs(study: Study) -> list[Pair]:
    """Target sets and shares in order of the plan. Cells that others start from are not among them."""
    first = {cell["name"] for cell in study.plan.get("pretraining", [])}
    found: dict[tuple[str, float], list[Group]] = {}
    for group in study.groups:
        if group.cells[0]["name"] not in first:
            found.setdefault((group.about["target"], float(group.about["share"])), []).append(group)
    targets = list(dict.fromkeys(target for target, _ in found))
    return [Pair(*key, found[key]) for key in sorted(found, key=lambda key: (targets.index(key[0]), -key[1]))]


def label(group: Group) -> str:
    """How a curve is called: from what it starts."""
    source = group.about.get("source")
    if source is None:
        return "from scratch" if group.baseline else "from scratch, the fine-tuning's time"
    return f"pre-trained on {source}"


def said(study: Study) -> tuple[dict[str, Verdict], list[str]]:
    """A verdict for each target and share, by both measures, and the sentences: a headline first."""
    cases = pairs(study)
    found = {pair.says: decided(cases, pair, "frechet", study.title, pair.scratch()) for pair in cases}
    losses = {pair.says: decided(cases, pair, "heldout_loss", LOSS, pair.scratch()) for pair in cases}
    sentences = []
    for pair in cases:
        one, loss = found[pair.says], losses[pair.says]
        sentences.append(f"{pair.says}: {_short(one, study.title)}")
        free = decided(cases, pair, "frechet", study.title, pair.short())
        if free.best is not None:
            sentences[-1] += f" Against from scratch in the fine-tuning's time alone: {_sure(free)}."
        if loss.best is not None:
            best = "" if loss.best == one.best else f" of {loss.best}"
            sentences[-1] += f" The held-out loss{best}: {_sure(loss)}."
    headline = (
        f"Pre-training on another set is told apart as better than training from scratch, at equal time, in "
        f"{_count(found, 'better')} of {len(found)} cases (a target set and a share of its images each) by the "
        f"Frechet distance, in {_count(losses, 'better')} by the held-out loss."
    )
    if _count(found, "open") == len(found):
        headline = "No verdict: seeds are too few, or cells not finished, to tell any difference from chance."
    method = (
        "How sure: seeds are blocks (cells of a seed share the order of images and the noise), residuals are pooled "
        "over the cases, 95% intervals, widened by Šidák's correction where a case has several."
    )
    verdicts = found | {f"{case}: {LOSS}": one for case, one in losses.items()}
    return verdicts, [headline, *sentences, method]


def decided(cases: list[Pair], pair: Pair, key: str, measure: str, base: Group | None) -> Verdict:
    """What is pre-trained against `base` in one of the cases; all cases say how far seeds spread."""
    beside = [layout for other in cases if other is not pair and (layout := _layout(other, key)) is not None]
    return verdict.decide(_ends(base, key), _tuned(pair, key), measure, SCRATCH, beside)


def _layout(pair: Pair, key: str) -> verdict.Layout | None:
    return verdict.Layout.of({**_tuned(pair, key), "": _ends(pair.scratch(), key)})


def _count(verdicts: dict[str, Verdict], outcome: str) -> int:
    return sum(one.outcome == outcome for one in verdicts.values())


def _tuned(pair: Pair, key: str = "frechet") -> dict[str, verdict.Values]:
    return {label(one): each for one in pair.tuned() if (each := one.by_seed(key))}


def _ends(group: Group | None, key: str = "frechet") -> verdict.Values:
    return {} if group is None else group.by_seed(key)


def _short(one: Verdict, measure: str) -> str:
    if one.best is None:
        return one.sentence
    return f"{one.best}, the {measure} against training from scratch: {_sure(one)}."


def _sure(one: Verdict) -> str:
    gap = one.differences[one.best or ""]
    ends = ""
    if gap.low is not None and gap.high is not None:
        ends = f" (95% interval of the difference {verdict.signed(gap.low)} to {verdict.signed(gap.high)})"
    sure = {
        "better": "told apart as better",
        "none": "not told apart as better",
        "dense": "told apart as worse",
        "open": "seeds are too few to tell that from chance",
    }[one.outcome]
    return f"{verdict.number(abs(gap.mean))} {'below' if gap.mean < 0 else 'above'}{ends}, {sure}"


def keys(groups: list[Group]) -> dict[str, Key]:
    """The look of every label; from scratch is black."""
    labels = list(dict.fromkeys(map(label, groups)))
    scratch = [one for one in labels if one.startswith("from scratch")]
    others = [one for one in labels if one not in scratch]
    found = {one: Key(one, INK, DASHES[number % len(DASHES)]) for number, one in enumerate(scratch)}
    for number, one in enumerate(others):
        found[one] = Key(one, DISTINCT[number % len(DISTINCT)], DASHES[number // len(DISTINCT) % len(DASHES)])
    return found


def gaps(study: Study) -> dict[str, Interval]:
    """Each group's difference from training from scratch on the same images."""
    found: dict[str, Interval] = {}
    cases = pairs(study)
    for pair in cases:
        names = {label(one): one.name for one in pair.tuned()}
        differences = decided(cases, pair, "frechet", study.title, pair.scratch()).differences
        found |= {names[one]: gap for one, gap in differences.items()}
    return found


def sections(study: Study) -> list[page.Section]:
    """What a transfer's page shows, in order."""
    found = pairs(study)
    look = keys([group for pair in found for group in pair.groups])
    along: list[Figure | None] = []
    losses: list[Figure | None] = []
    for number, pair in enumerate(found):
        named = [results.renamed(group, label(group)) for group in pair.groups]
        own = [look[one.name] for one in named]
        along.append(charts.curves(f"frechet-{number}", pair.says, named, "frechet", study.title, keys=own))
        losses.append(charts.curves(f"loss-{number}", pair.says, named, "heldout_loss", "held-out loss", keys=own))
    ends = [
        charts.by_share(
            f"share-{number}",
            f"{target}: quality by share of its images",
            [(label(group), pair.share, group.final("frechet")) for pair in of_target for group in pair.groups],
            study.title,
            look,
        )
        for number, target in enumerate(dict.fromkeys(pair.target for pair in found))
        if (of_target := [pair for pair in found if pair.target == target])
    ]
    differences = charts.differences(f"{study.title}: difference from training from scratch", gaps(study))
    return [
        page.Section(
            "After equal wall-clock time",
            "Pre-training and fine-tuning together take as long as training from scratch, with the same images of the "
            "target; drawing and judging samples is not counted.",
            page.these(*ends, differences),
        ),
        page.Section(f"Along the way: {study.title}", CURVES, page.these(*along)),
        page.Section("Along the way: held-out loss", "", page.these(*losses)),
        page.Section("Samples", "The first samples of each group's first seed.", grids=page.grids(study, study.groups)),
        page.Section("All groups", "", tables=[page.group_table(study, gaps(study), "from scratch")]),
        page.Section(
            "Where the time goes", "Of one cell of each group.", tables=[page.time_table(study.groups)], folded=True
        ),
    ]
