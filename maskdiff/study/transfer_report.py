"""What the report of a transfer study says and shows: pre-trained on another set against from scratch, equal time."""

from dataclasses import dataclass

from . import charts, page, results, verdict
from .charts import DASHES, DISTINCT, INK, Figure, Key
from .results import Group, Study
from .verdict import Interval, Verdict


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
        """The row to beat; a dense one where there are several."""
        own = [one for one in self.groups if one.about.get("source") is None]
        return next((one for one in own if one.baseline), own[0] if own else None)

    def others(self) -> list[Group]:
        """The rest."""
        scratch = self.scratch()
        return [one for one in self.groups if one is not scratch]


def pairs(study: Study) -> list[Pair]:
    """Target sets in order of the plan, large shares first. Cells that others start from are not compared."""
    sources = {cell.get("pretrain") for group in study.groups for cell in group.cells} - {None}
    found: dict[tuple[str, float], list[Group]] = {}
    for group in study.usual():
        if group.about.get("target") is None or any(cell["name"] in sources for cell in group.cells):
            continue
        found.setdefault((group.about["target"], float(group.about["share"])), []).append(group)
    targets = list(dict.fromkeys(cell.get("target") for cell in study.plan["cells"]))
    order = sorted(found, key=lambda one: (targets.index(one[0]), -one[1]))
    return [Pair(*one, found[one]) for one in order]


def label(group: Group) -> str:
    """How a curve is called, target and share aside: from what it starts and what it trains."""
    about = group.about
    source = "from scratch" if about.get("source") is None else f"pre-trained on {about['source']}"
    if about.get("source") is not None and about.get("weights") not in (None, "ema"):
        source += f", {about['weights']} weights"
    masks = [stage["mask"] for stage in about["stages"] if stage["mask"] != "dense"]
    return source + (f", {masks[0]}" if masks and about.get("source") is None else "")


def said(study: Study) -> tuple[dict[str, Verdict], list[str]]:
    """A verdict for each target and share, and the sentences: a headline first."""
    found, sentences = {}, []
    for pair in pairs(study):
        scratch, others = pair.scratch(), pair.others()
        base = scratch.final("frechet") if scratch is not None else []
        values = {label(one): each for one in others if (each := one.final("frechet"))}
        one = verdict.decide(base, values, study.title, "training from scratch")
        found[pair.says] = one
        sentences.append(f"{pair.says}: {_short(one, study.title)}")
    helped = sum(one.outcome == "better" for one in found.values())
    open_ones = sum(one.outcome == "open" for one in found.values())
    headline = (
        f"Pre-training on another set is told apart as better than training from scratch, at equal time, in {helped} "
        f"of {len(found)} cases (a target set and a share of its images each)."
    )
    if open_ones == len(found):
        headline = "No verdict: seeds are too few, or cells not finished, to tell any difference from chance."
    method = "How sure: Welch's t over seeds, 95% intervals, widened by Šidák's correction where a case has several."
    return found, [headline, *sentences, method]


def _short(one: Verdict, measure: str) -> str:
    if one.best is None:
        return one.sentence
    gap = one.differences[one.best]
    amount = f"{verdict.number(abs(gap.mean))} {'below' if gap.mean < 0 else 'above'} training from scratch"
    ends = ""
    if gap.low is not None and gap.high is not None:
        ends = f" (95% interval of the difference {verdict.signed(gap.low)} to {verdict.signed(gap.high)})"
    sure = {
        "better": "told apart as better",
        "none": "not told apart as better",
        "dense": "training from scratch is better",
        "open": "seeds are too few to tell that from chance",
    }[one.outcome]
    return f"the {measure} of the model {one.best} is {amount}{ends}: {sure}."


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
    for pair in pairs(study):
        scratch = pair.scratch()
        if scratch is not None and scratch.final("frechet"):
            found |= verdict.compare(scratch.final("frechet"), results.each_of(pair.others(), "frechet"))
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
            "Every run ends after the same training time; drawing and judging samples is not counted.",
            page.these(*ends, differences),
        ),
        page.Section(f"Along the way: {study.title}", "Bands: 95% intervals over seeds.", page.these(*along)),
        page.Section("Along the way: held-out loss", "", page.these(*losses)),
        page.Section("Samples", "The first samples of each group's first seed.", grids=page.grids(study, study.groups)),
        page.Section("All groups", "", tables=[page.group_table(study, gaps(study), "from scratch")]),
        page.Section(
            "Where the time goes", "Of one cell of each group.", tables=[page.time_table(study.groups)], folded=True
        ),
    ]
