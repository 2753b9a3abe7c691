"""The report of a study: a page that needs no network, a picture, a table for spreadsheets, and all of it as JSON."""

import csv
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..durable import write_json
from ..durations import words
from . import charts, drawing, page, results, transfer_report, verdict
from .drawing import Figure
from .results import SCORES, Group, Study
from .verdict import Verdict


@dataclass(frozen=True)
class Said:
    """What a report says before it shows: the verdict and what stands beside it, a sentence each."""

    verdicts: dict[str, Verdict]  # by what was compared
    sentences: list[str]  # the first one is the headline


def write(folder: Path) -> list[Path]:
    """Writes report.html, report.png, report.csv and report.json into a study's folder, finished or not.

    Raises UserError for what is no study, and where the charting library is not installed.
    """
    drawing.check()
    study = results.read(folder)
    told = said(study) if study.plan["kind"] == "sweep" else Said(*transfer_report.said(study))
    missing = study.missing
    if missing:
        cells = sum(len(group.cells) for group in study.groups)
        told.sentences.insert(1, f"Not finished: {cells - len(missing)} of {cells} cells are there so far.")
    sections = _sections(study) if study.plan["kind"] == "sweep" else transfer_report.sections(study)
    paths = [folder / f"report.{ending}" for ending in ("html", "png", "csv", "json")]
    paths[0].write_text(page.html(study, told.sentences, sections), encoding="utf-8")
    figures = [figure for section in sections for figure in section.figures if figure.name not in page.PAGE_ONLY]
    heading = [study.plan["title"], *(line for text in told.sentences[:2] for line in textwrap.wrap(text, 125))]
    paths[1].write_bytes(drawing.picture(figures, heading))
    with paths[2].open("w", newline="", encoding="utf-8") as file:
        lines = list(table(study))
        writer = csv.DictWriter(file, list(lines[0]) if lines else ["group"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    write_json(paths[3], results.plain_values(_everything(study, told)))
    return paths


def compared(study: Study) -> list[Group]:
    """The groups that a sweep's verdict chooses among: of the usual length, with nothing else changed."""
    return [one for one in study.usual() if not one.baseline and not one.about["overrides"]]


def said(study: Study) -> Said:
    """A sweep's verdict: by the Frechet distance, which decides, and by the held-out loss."""
    dense = study.dense()
    found = {}
    for key, says in (("frechet", study.title), ("heldout_loss", "held-out loss on whole images")):
        base = dense.by_seed(key) if dense is not None else {}
        found[key] = verdict.decide(base, results.each_of(compared(study), key), says)
    sentences = [found["frechet"].sentence, _also(found["heldout_loss"])]
    seeds = sorted({len(one.rows) for one in study.usual() if one.rows})
    if found["frechet"].method:
        sentences.append(f"How sure: {found['frechet'].method}. {_counted(seeds, 'seed')} of each group.")
    return Said(found, [sentence for sentence in sentences if sentence])


def _also(found: Verdict) -> str:
    """What the second measure says, in short."""
    if not found.best:
        return ""
    gap = found.differences[found.best]
    amount = f"{verdict.number(abs(gap.mean))} {'below' if gap.mean < 0 else 'above'} dense training"
    says = {
        "better": f"{found.best} is best, {amount}, told apart from it.",
        "none": f"no masked run is told apart from dense training for the better; {found.best} is {amount}.",
        "dense": f"dense training is better than all; the best masked run, {found.best}, is {amount}.",
        "open": f"{found.best} is lowest, {amount}; seeds are too few to tell that from chance.",
    }
    return f"By the held-out loss on whole images: {says[found.outcome]}"


def _counted(counts: list[int], what: str) -> str:
    if not counts:
        return f"No {what}"
    low, high = counts[0], counts[-1]
    return f"{low if low == high else f'{low} to {high}'} {what}{'' if high == 1 else 's'}"


def _sections(study: Study) -> list[page.Section]:
    """What a sweep's page shows, in order."""
    plain = study.plain()
    dense = study.dense()
    main = [dense] if dense is not None else []
    kinds = list(dict.fromkeys(one.about["kind"] for one in plain))
    keys = drawing.keys_of([*main, *plain])
    by_kind = {kind: [*main, *(one for one in plain if one.about["kind"] == kind)] for kind in kinds} or {"": main}
    several = len(by_kind) > 1
    along: list[Figure | None] = []
    for kind, groups in by_kind.items():
        own = [key for key in keys if key.name in {one.name for one in groups}]
        more = f", {kind}" if several else ""
        for value, says in (("frechet", study.title), ("heldout_loss", "held-out loss")):
            name, title = f"{value}-{kind}", f"{says[0].upper()}{says[1:]} along the way{more}"
            note = "Bands: 95% intervals over seeds. The second half of a masked run's time is its dense fine-tune."
            if any(one.about["finetune"] != 0.5 for one in groups if not one.baseline):
                note = "Bands: 95% intervals over seeds."
            along.append(charts.curves(name, title, groups, value, says, note=note, keys=own))
    first = next(iter(by_kind.values()))
    own = [key for key in keys if key.name in {one.name for one in first}]
    other = [
        charts.curves(f"by-{axis}", f"At equal {says}", first, "frechet", study.title, axis, height=230, keys=own)
        for axis, says in (("steps", "steps"), ("images", "images seen"), ("flops", "FLOPs"))
    ]
    gaps = all_gaps(study)
    difference = charts.differences(f"{study.title}: difference from dense training", gaps)
    reached, rows = _reached(study)
    steps = results.speed_ups(study)
    return [
        page.Section(
            "What a step buys",
            "",
            page.these(charts.speed(study)),
            tables=[page.speed_table(steps)] if steps else [],
        ),
        page.Section(
            "What it buys in the end: equal wall-clock time",
            "Every run has the same training time, pre-training and fine-tuning both counted; drawing and judging "
            "samples is not. This is the comparison that decides.",
            page.these(charts.final(study), difference, charts.heat(study)),
        ),
        page.Section("Along the way", "", page.these(*along)),
        page.Section(
            "Time to the dense run's quality, and the trade-off", "", page.these(reached, charts.trade_off(study)), rows
        ),
        page.Section(
            "Counted in other ways",
            "The same runs at equal steps, images and FLOPs. They say why a mask pays or not; wall-clock time decides.",
            page.these(*other),
            small=True,
        ),
        page.Section("Longer runs: does the gap close?", _closes(study), page.these(charts.longer(study))),
        page.Section("Samples", _sampling(study), grids=page.grids(study, study.groups)),
        page.Section("All groups", "", tables=[page.group_table(study, gaps)]),
        page.Section(
            "Where the time goes", "Of one cell of each group.", tables=[page.time_table(study.groups)], folded=True
        ),
    ]


def all_gaps(study: Study) -> dict[str, verdict.Interval]:
    """Each usual group's difference from dense by the Frechet distance; groups with another key changed apart."""
    dense = study.dense()
    base = dense.by_seed("frechet") if dense is not None else {}
    if not base:
        return {}
    varied = [one for one in study.usual() if one.about["overrides"]]
    families = (compared(study), varied)
    return {
        key: gap
        for family in families
        for key, gap in verdict.compare(base, results.each_of(family, "frechet")).items()
    }


def reach_rows(study: Study) -> list[dict[str, Any]]:
    """When each usual group reached the final values of the dense run of the same seed."""
    dense = study.dense()
    found = []
    for one in study.usual():
        if dense is None or not one.rows or one.baseline:
            continue
        row: dict[str, Any] = {"group": one.name}
        for key in ("frechet", "heldout_loss"):
            ends = dense.by_seed(key)
            row[key] = results.time_to(one, key, ends) if ends.keys() & one.rows.keys() else None
        found.append(row)
    return found


def _reached(study: Study) -> tuple[Figure | None, list[page.Table]]:
    dense = study.dense()
    rows = [row for row in reach_rows(study) if row["frechet"] is not None]
    if dense is None or not rows:
        return None, []
    total = dense.points()[-1].seconds
    colours = {key.name: key.colour for key in drawing.keys_of(study.usual())}
    shown = [
        {
            "group": row["group"],
            "seconds": row["frechet"].seconds,
            "colour": colours[row["group"]],
            "says": page.reached_says(row["frechet"], total),
        }
        for row in rows
    ]
    head = ["group", f"{study.title} of dense", "held-out loss of dense"]
    cells = [
        [
            row["group"],
            *(
                "" if row[key] is None else page.reached_says(row[key], total, True)
                for key in ("frechet", "heldout_loss")
            ),
        ]
        for row in rows
    ]
    note = (
        f"Times until the values were reached that the dense run of the same seed had after {words(total)}; in "
        "brackets, how many times sooner."
    )
    return charts.reached(shown, total), [page.Table(head, cells, note)]


def _closes(study: Study) -> str:
    """Whether the difference between masked and dense runs grows smaller with time; "" where none was longer."""
    said = []
    for length in sorted({one.about["length"] for one in study.groups} - {1.0}):
        there = [one for one in study.groups if one.about["length"] == length and one.final("frechet")]
        dense = next((one for one in there if one.baseline), None)
        usual = study.dense()
        for one in there:
            short = next((each for each in study.usual() if each.name == charts.name_at_length(one)), None)
            if one.baseline or dense is None or usual is None or short is None or not short.final("frechet"):
                continue
            gap = _gap(one, dense)
            before = _gap(short, usual)
            both = f"{_way(gap.mean)} ({_seeds(gap, one, dense)}), after the usual time {_way(before.mean)}"
            said.append(f"{length:g} times as long: {charts.name_at_length(one)} is {both}.")
    if not said and any(one.about["length"] != 1 for one in study.groups):
        return "The longer runs are not finished."
    return " ".join(said)


def _gap(one: Group, dense: Group) -> verdict.Interval:
    return verdict.compare(dense.by_seed("frechet"), {"": one.by_seed("frechet")})[""]


def _way(gap: float) -> str:
    return f"{verdict.number(abs(gap))} {'below' if gap < 0 else 'above'} dense"


def _seeds(gap: verdict.Interval, one: Group, dense: Group) -> str:
    if gap.low is None or gap.high is None:
        return f"{min(len(one.rows), len(dense.rows))} seed: chance cannot be told"
    return f"95% interval of the difference {verdict.signed(gap.low)} to {verdict.signed(gap.high)}"


def _sampling(study: Study) -> str:
    sampler = study.plan["sampler"]
    return (
        f"The first samples of each group's first seed, all from the same noise, as they come: {sampler['name']}, "
        f"{sampler['steps']} steps, averaged weights."
    )


def table(study: Study) -> Iterator[dict[str, Any]]:
    """The CSV: a row for each point of each group, means over seeds with their 95% intervals."""
    more = ("source", "target", "share", "weights") if study.plan["kind"] == "transfer" else ()
    for group in study.groups:
        about = group.about
        for point in group.points():
            row: dict[str, Any] = {
                "group": group.name,
                **{key: about.get(key) for key in ("kind", "rate", "finetune", "length", *more)},
                "overrides": " ".join(f"{key}={value}" for key, value in about["overrides"].items()),
                **{key: getattr(point, key) for key in ("stage", "step", "images", "tokens", "flops", "seconds")},
                "seeds": point.seeds,
            }
            for key in ("loss", "heldout_loss", *SCORES):
                here = point.values.get(key)
                row[key] = None if here is None else here.mean
                row[f"{key}_low"] = None if here is None else here.low
                row[f"{key}_high"] = None if here is None else here.high
            yield row


def _everything(study: Study, said: Said) -> dict[str, Any]:
    """The JSON: the verdict and all that the page draws."""
    sweep = study.plan["kind"] == "sweep"
    return {
        "format": 1,
        "kind": study.plan["kind"],
        "title": study.plan["title"],
        "sentences": said.sentences,
        "verdicts": said.verdicts,
        "facts": dict(page.facts(study)),
        "missing": study.missing,
        "speed_ups": results.speed_ups(study),
        "front": results.front(study) if sweep else [],
        "differences": all_gaps(study) if sweep else {},
        "reached": reach_rows(study) if sweep else [],
        "groups": [
            {
                "name": group.name,
                **{key: value for key, value in group.about.items() if key not in ("name", "group", "seed", "stages")},
                "seeds": sorted(group.rows),
                "final": {key: group.final(key) for key in ("loss", "heldout_loss", *SCORES)},
                "time": results.account(group),
                "points": group.points(),
            }
            for group in study.groups
        ],
    }
