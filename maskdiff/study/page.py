"""The page of a report: one HTML file with its charts, tables and pictures inside; nothing is fetched."""

import base64
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from ..durations import words
from ..report import named
from . import drawing
from .drawing import Figure, Key
from .results import Group, Reached, Study, account, run_speed
from .verdict import Interval, mean_interval, number, signed

PAGE_ONLY = ("by-steps", "by-images", "by-flops")  # figures that the picture leaves out
MARKS = {  # the shapes of charts, in a box of 14 pixels
    "circle": "M2 7a5 5 0 1 0 10 0a5 5 0 1 0-10 0",
    "square": "M2.5 2.5h9v9h-9z",
    "triangle-up": "M7 2l5.5 10h-11z",
    "diamond": "M7 1l4.5 6l-4.5 6l-4.5-6z",
    "cross": "M5 2h4v3h3v4h-3v3h-4v-3h-3v-4h3z",
    "triangle-down": "M7 12l5.5-10h-11z",
    "triangle-right": "M12 7l-10 5.5v-11z",
    "triangle-left": "M2 7l10 5.5v-11z",
}
SHARES = ("precision", "recall", "density", "coverage")


@dataclass(frozen=True)
class Table:
    """Rows of words and figures under a head; the first column is a name."""

    head: list[str]
    rows: list[list[str]]
    note: str = ""
    strong: tuple[int, ...] = ()  # rows that stand out


@dataclass(frozen=True)
class Picture:
    """A grid of samples."""

    name: str
    note: str
    data: str  # a data URI
    width: int  # pixels


@dataclass(frozen=True)
class Section:
    """A part of the page. It is left out where it holds nothing."""

    title: str
    text: str = ""
    figures: list[Figure] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    grids: list[Picture] = field(default_factory=list)
    folded: bool = False
    small: bool = False  # figures three abreast


def these(*figures: Figure | None) -> list[Figure]:
    """Those that have something to show."""
    return [figure for figure in figures if figure is not None]


def html(study: Study, sentences: Sequence[str], sections: Sequence[Section]) -> str:
    """The whole page."""
    shown = [one for one in sections if one.figures or one.tables or one.grids]
    specs = {figure.name: figure.spec() for section in shown for figure in section.figures}
    title = escape(study.plan["title"])
    body = "".join(_section(one) for one in shown)
    missing = _missing(study.missing)
    about = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in facts(study))
    said = f'<p class="verdict">{escape(sentences[0])}</p>' + "".join(f"<p>{escape(one)}</p>" for one in sentences[1:])
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n'
        f"<h1>{title}</h1>\n<div class=said>{said}</div>\n{missing}"
        "<noscript><p>The charts need JavaScript; report.png beside this page shows them without.</p></noscript>\n"
        f"{body}<section><h2>What was fixed</h2><dl>{about}</dl></section>\n</main>\n"
        f'<script type="application/json" id="specs">{_inside(specs)}</script>\n'
        f"<script>{drawing.javascript()}</script>\n<script>{DRAW}</script>\n</body>\n</html>\n"
    )


def _inside(value: Any) -> str:
    """JSON that may stand in a script element: no name can end it."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def _section(one: Section) -> str:
    parts = [f"<p>{escape(one.text)}</p>"] if one.text else []
    kind = " small" if one.small else " single" if len(one.figures) == 1 else ""
    if one.figures:
        parts.append(f'<div class="figures{kind}">{"".join(map(_figure, one.figures))}</div>')
    parts += [_table(each) for each in one.tables]
    if one.grids:
        parts.append(f"<div class=grids>{''.join(map(_picture, one.grids))}</div>")
    inner = "\n".join(parts)
    if one.folded:
        return f"<section><details><summary><h2>{escape(one.title)}</h2></summary>{inner}</details></section>\n"
    return f"<section><h2>{escape(one.title)}</h2>{inner}</section>\n"


def _figure(figure: Figure) -> str:
    names = "".join(_key(key, figure.dots) for key in figure.keys)
    legend = f"<ul class=legend>{names}</ul>" if len(figure.keys) > 1 else ""
    note = f"<figcaption>{escape(figure.note)}</figcaption>" if figure.note else ""
    return (
        f'<figure><h3>{escape(figure.title)}</h3>{legend}<div class=chart data-chart="{escape(figure.name)}" '
        f'style="min-height:{figure.height}px"></div>{note}</figure>'
    )


def _key(key: Key, dot: bool) -> str:
    if dot:
        path = f'<path d="{MARKS[key.shape]}" fill="{key.colour}"/>'
        return f'<li><svg width="14" height="14" aria-hidden="true">{path}</svg>{escape(key.name)}</li>'
    dash = "" if key.dash == (1, 0) else f' stroke-dasharray="{" ".join(map(str, key.dash))}"'
    return (
        f'<li><svg width="22" height="10" aria-hidden="true"><line x1="0" y1="5" x2="22" y2="5" stroke="{key.colour}" '
        f'stroke-width="3"{dash}/></svg>{escape(key.name)}</li>'
    )


def _table(table: Table) -> str:
    head = "".join(f"<th scope=col>{escape(name)}</th>" for name in table.head)
    rows = "".join(
        f"<tr{' class=strong' if place in table.strong else ''}><th scope=row>{escape(row[0])}</th>"
        + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for place, row in enumerate(table.rows)
    )
    note = f"<p class=note>{escape(table.note)}</p>" if table.note else ""
    return (
        f'<div class=wide tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>{note}'
    )


def _picture(picture: Picture) -> str:
    note = f"<span>{escape(picture.note)}</span>" if picture.note else ""
    return (
        f'<figure><img src="{picture.data}" alt="Samples: {escape(picture.name)}" width="{picture.width}">'
        f"<figcaption>{escape(picture.name)}{note}</figcaption></figure>"
    )


def _missing(names: Sequence[str]) -> str:
    if not names:
        return ""
    listed = ", ".join(names)
    return f"<details class=missing><summary>Cells missing: {len(names)}</summary>{escape(listed)}</details>\n"


def grids(study: Study, groups: Sequence[Group]) -> list[Picture]:
    """The samples of each group's first finished seed, real images before them."""
    others = sorted(study.folder.glob("real-*.png"))  # of further sets
    found = [("Real images", "", study.folder / "real.png")]
    found += [(f"Real images: {place.stem.removeprefix('real-')}", "", place) for place in others]
    for group in groups:
        for seed in sorted(group.rows):
            name = next(cell["name"] for cell in group.cells if cell["seed"] == seed)
            place = study.folder / "cells" / f"{name}.png"
            if place.exists():
                ends = group.final("frechet")
                found.append((group.name, number(mean_interval(ends).mean) if ends else "", place))
                break
    return [_small(name, note, place) for name, note, place in found if place.exists()]


def _small(name: str, note: str, path: Path) -> Picture:
    """A picture file as WebP inside the page."""
    from PIL import Image

    image = Image.open(path).convert("RGB")
    image.thumbnail((480, 480))
    held = io.BytesIO()
    image.save(held, "WEBP", quality=85, method=6)
    return Picture(name, note, f"data:image/webp;base64,{base64.b64encode(held.getvalue()).decode()}", image.width)


def speed_table(steps: Sequence[dict[str, Any]]) -> Table:
    """Every measured mask."""
    head = ["mask", "patches masked", "images a step", "ms a step", "images/s", "speed-up", "ideal", "of the ideal"]
    rows = [
        [
            named(one["mask"]),
            f"{one['rate']:.1%}",
            f"{one['batch']}",
            number(one["step_ms"]),
            number(one["images_per_s"]),
            f"{one['speed_up']:.2f}x",
            f"{one['ideal']:.2f}x",
            f"{one['speed_up'] / one['ideal']:.0%}",
        ]
        for one in steps
    ]
    return Table(head, rows, "Medians, all masks measured in turn on one machine, at equal tokens a step.")


def group_table(study: Study, gaps: dict[str, Interval], beaten: str = "dense") -> Table:
    """All groups with all that was measured at their ends; `beaten`: what the differences are from."""
    dense = study.dense() if study.plan["kind"] == "sweep" else None
    head = ["group", "seeds", study.title, f"against {beaten}", "held-out loss", "KID x 1000", *SHARES, "speed"]
    rows = []
    for one in study.groups:
        gap = gaps.get(one.name)
        speed = run_speed(one, dense) if dense is not None else None
        kid = [1e3 * value for value in one.final("kid")]
        rows.append(
            [
                one.name,
                f"{len(one.rows)} of {len(one.cells)}",
                with_ends(one.final("frechet")),
                "" if gap is None else gap_says(gap),
                with_ends(one.final("heldout_loss")),
                with_ends(kid),
                *(with_ends(one.final(key)) for key in SHARES),
                "" if speed is None else f"{speed:.2f}x",
            ]
        )
    strong = tuple(place for place, one in enumerate(study.groups) if one.baseline)
    note = (
        f"Means ± half of the 95% interval over seeds. Against {beaten}: the difference with its interval, widened for "
        "the number of comparisons."
    )
    if dense is not None:
        note += " Speed: images/s over the whole run, fine-tune included."
    kept = [place for place in range(len(head)) if place == 0 or any(row[place] not in ("", "–") for row in rows)]
    return Table([head[place] for place in kept], [[row[place] for place in kept] for row in rows], note, strong)


def time_table(groups: Sequence[Group]) -> Table:
    """Where the time goes: a line for each stage of each group."""
    head = ["group", "stage", "steps", "images a step", "tokens a step", "ms a step", "time", "images"]
    rows = []
    for group in groups:
        for place, stage in enumerate(account(group)):
            rows.append(
                [
                    group.name if place == 0 else "",
                    named(stage["mask"]),
                    *("" if stage[key] is None else f"{stage[key]:,}" for key in ("steps", "batch")),
                    "" if place == 0 and stage["batch"] is None else f"{stage['tokens']:,}",
                    "" if stage["step_ms"] is None else number(stage["step_ms"]),
                    f"{stage['seconds']:,.0f} s",
                    f"{stage['images']:,}",
                ]
            )
    return Table(head, rows, "Times are steps times the measured step, so a busy machine does not change them.")


def with_ends(values: Sequence[float]) -> str:
    """A mean and half of its interval: "171.0 ± 4.2"."""
    if not values:
        return "–"
    here = mean_interval(values)
    half = 0.0 if here.high is None else here.high - here.mean
    if half == 0:
        return number(here.mean)
    if abs(here.mean) >= 1e6:
        return f"{number(here.mean)} ± {number(half)}"
    places = min(6, max(0, 1 - math.floor(math.log10(half))))
    return f"{here.mean:.{places}f} ± {half:.{places}f}"


def gap_says(gap: Interval) -> str:
    """A difference with its interval."""
    ends = "" if gap.low is None or gap.high is None else f" ({signed(gap.low)} to {signed(gap.high)})"
    return signed(gap.mean) + ends


def reached_says(found: Reached, total: float, long: bool = False) -> str:
    """When a value was reached, in words."""
    if found.reached == 0:
        return "not reached"
    if found.seconds is None:
        return f"by {found.reached} of {found.seeds} seeds"
    unit, size = drawing.unit_of(total)
    says = f"{'at most ' if found.bound else ''}{number(found.seconds / size)} {unit}"
    return f"{says} ({total / found.seconds:.2f}x)" if long else says


def facts(study: Study) -> list[tuple[str, str]]:
    """What was the same for all cells."""
    plan, machine = study.plan, study.machine
    sets = plan["data"] if plan["kind"] == "transfer" else {plan["data"]["name"]: plan["data"]}
    data = "; ".join(
        f"{name}: {one['train']:,} training images, {one['heldout']:,} held out, hash {one['hash'][:12]}"
        for name, one in sets.items()
    )
    model, sampler = plan["model"], plan["sampler"]
    shape = f"{model['image_size']} px, patch {model['patch']}, width {model['width']}, {model['blocks']} blocks"
    threads = f"{plan['threads']} thread{'' if plan['threads'] == 1 else 's'} a cell"
    where = machine.get("card") or " ".join(
        str(part) for part in (machine.get("processor"), machine.get("capability")) if part
    )
    seeds = sorted({cell["seed"] for cell in plan["cells"]})
    found = [
        ("data", data),
        ("model", f"{plan['preset']}: {shape}"),
        ("a cell's training time", words(plan["seconds"])),
        ("tokens a step", f"{plan['tokens']:,}, the same for all masks"),
        ("precision", plan["precision"]),
        (
            "machine",
            f"{where}; {threads}; torch {machine.get('torch', 'unknown')}",
        ),
        ("commit", plan["commit"] or "unknown"),
        ("judged by", f"{study.title}, extractor {plan['extractor']['name']} {plan['extractor']['digest']}"),
        ("samples judged", f"{plan['count']:,} against the training images"),
        ("sampler", f"{sampler['name']}, {sampler['steps']} steps, guidance {sampler['guidance']:g}"),
        ("weights", f"their average, decay {plan['ema']}"),
        ("seeds", f"{', '.join(map(str, seeds))}; of samples {plan['sample_seed']}"),
    ]
    real = plan.get("real_frechets", plan.get("real_frechet"))
    if real is not None:
        says = (
            "; ".join(f"{name} {number(one)}" for name, one in real.items() if one is not None)
            if isinstance(real, dict)
            else number(real)
        )
        found.append(("half of the real images against the other half", says))
    return found


STYLE = """
:root{color-scheme:light;--ink:#1b1b1f;--soft:#5b5b66;--line:#dcdce2;--accent:#41208f}
*{box-sizing:border-box}
body{margin:0;background:#fff;color:var(--ink);font:16px/1.5 "Helvetica Neue",Helvetica,Arial,"Liberation Sans",
"DejaVu Sans",sans-serif;-webkit-text-size-adjust:100%}
main{overflow-wrap:anywhere;max-width:1180px;margin:0 auto;padding:24px 20px 60px}
h1{font-size:1.7rem;line-height:1.2;margin:.3em 0 .6em}
h2{font-size:1.25rem;margin:0 0 .4em;display:inline-block}
h3{font-size:1rem;margin:0 0 .3em}
p{margin:.4em 0;max-width:75ch}
section{margin-top:2.4em;border-top:1px solid var(--line);padding-top:1.2em}
summary{cursor:pointer}
.said{border-left:5px solid var(--accent);padding:.1em 0 .1em 16px}
.verdict{font-size:1.2rem;line-height:1.4}
.missing{margin:1em 0;color:var(--soft);overflow-wrap:anywhere}
.figures{display:grid;gap:28px 36px;grid-template-columns:repeat(auto-fit,minmax(min(100%,460px),1fr))}
.figures.small{grid-template-columns:repeat(auto-fit,minmax(min(100%,330px),1fr))}
.figures.single{max-width:720px}
.figures figure{margin:.8em 0 0;min-width:0}
.chart{width:100%}
figcaption,.note{font-size:.85rem;color:var(--soft);max-width:75ch}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:2px 14px;margin:0 0 .4em;padding:0;font-size:.85rem}
.legend svg{margin-right:6px;vertical-align:middle}
.wide{overflow-x:auto;overflow-wrap:normal;margin-top:1em}
table{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums}
th,td{padding:5px 9px 5px 0;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
thead th{vertical-align:bottom;color:var(--soft);font-weight:normal;white-space:normal;min-width:4.5em}
tbody th{font-weight:normal}
th:first-child{text-align:left;position:sticky;left:0;background:#fff;padding-right:16px}
.strong th,.strong td{font-weight:bold}
.grids{display:grid;gap:18px;grid-template-columns:repeat(auto-fill,minmax(min(45%,240px),1fr));margin-top:.8em}
.grids figure{margin:0}
.grids img{width:100%;height:auto;display:block}
.grids figcaption{display:flex;justify-content:space-between;gap:8px;color:var(--ink)}
.grids span{flex:none}
dl{display:grid;grid-template-columns:minmax(9em,max-content) 1fr;gap:4px 20px;font-size:.92rem;margin:.6em 0}
dt{color:var(--soft)}
dd{margin:0;overflow-wrap:anywhere}
@media (max-width:600px){main{padding:14px 14px 40px}h1{font-size:1.4rem}.verdict{font-size:1.08rem}
dl{grid-template-columns:1fr}dd{margin-bottom:.5em}.grids{gap:10px}}
"""

DRAW = """
const specs = JSON.parse(document.getElementById("specs").textContent);
const places = [...document.querySelectorAll("[data-chart]")];
Promise.all(places.map(place => vegaEmbed(place, specs[place.dataset.chart], {actions: false, renderer: "svg"})))
  .then(drawn => { document.body.dataset.drawn = drawn.length; });
"""
