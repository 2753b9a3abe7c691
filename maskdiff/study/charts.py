"""The charts of a study's report, made with Altair."""

from collections.abc import Sequence
from typing import Any

from .drawing import AXIS_TITLES, DASHES, DISTINCT, INK, Figure, Key, altair, coloured, keys_of, unit_of
from .results import AXES, Group, Study, front, speed_ups
from .verdict import Interval, mean_interval


def curves(
    name: str,
    title: str,
    groups: Sequence[Group],
    value: str,  # "frechet", "heldout_loss"
    says: str,  # what the value is called
    axis: str = "seconds",  # of AXES
    note: str = "",
    height: int = 300,
    keys: Sequence[Key] | None = None,
) -> Figure | None:
    """A value along the way of each group, its interval over seeds as a band. None where it was measured but once."""
    assert axis in AXES
    alt = altair()
    points = [(group, point) for group in groups for point in group.points() if value in point.values]
    if len(points) == len({group.name for group, _ in points}):
        return None
    keys = keys or keys_of(groups)
    unit, size = unit_of(max(point.seconds for _, point in points)) if axis == "seconds" else ("", 1.0)
    data = []
    for group, point in points:
        here = point.values[value]
        data.append(
            {
                "group": group.name,
                "x": point.at(axis) / size,
                "y": here.mean,
                "low": here.low,
                "high": here.high,
                "seeds": point.seeds,
                "stage": group.about["stages"][point.stage]["mask"],
            }
        )
    means = [row["y"] for row in data]
    log = min(means) > 0 and max(means) > 4 * min(means)
    least, most = (0.9 * min(means), 1.1 * max(means)) if log else _around(means)
    x = alt.X(
        "x:Q",
        title=f"training time, {unit}" if unit else AXIS_TITLES[axis],
        scale=alt.Scale(zero=True, nice=False),
        axis=alt.Axis(grid=False, tickCount=5, format="~s" if axis != "seconds" else "~f"),
    )
    y_scale = alt.Scale(type="log" if log else "linear", domain=[least, most], nice=False, clamp=True)
    y = alt.Y("y:Q", title=says, scale=y_scale, axis=alt.Axis(tickCount=5))
    scales = coloured(alt, keys)
    base = alt.Chart(alt.Data(values=data))
    tips = [
        alt.Tooltip("group:N"),
        alt.Tooltip("x:Q", title=unit or AXIS_TITLES[axis], format=".4~s" if axis != "seconds" else ".3~f"),
        *_interval_tips(alt, says),
        alt.Tooltip("stage:N", title="training on"),
        alt.Tooltip("seeds:Q"),
    ]
    banded = base.transform_filter("isValid(datum.low)").mark_area(opacity=0.13)
    band = banded.encode(x=x, y=alt.Y("low:Q", title=says, scale=y_scale), y2="high:Q", color=scales["color"])
    line = base.mark_line(strokeWidth=2.2, clip=True).encode(x=x, y=y, **scales)
    dots = base.mark_point(filled=True, size=34, opacity=1).encode(x=x, y=y, color=scales["color"], tooltip=tips)
    return Figure(name, title, note, band + line + dots, height, tuple(keys))


def _around(values: Sequence[float], ends: Sequence[float | None] = ()) -> tuple[float, float]:
    """Ends of an axis a little beyond the values; and beyond the ends of their intervals, as far as is reasonable."""
    least, most = min(values), max(values)
    reach = 0.75 * (most - least)
    known = [end for end in ends if end is not None]
    least, most = (max(min([least, *known]), least - reach), min(max([most, *known]), most + reach))
    more = 0.08 * (most - least) or 0.05 * abs(most) or 1.0
    return least - more, most + more


def speed(study: Study) -> Figure | None:
    """What a masked step buys: images a second over the dense step's, with the ideal."""
    alt = altair()
    found = [one for one in speed_ups(study)]
    masked = [one for one in found if one["kind"] != "dense"]
    if not masked:
        return None
    kinds = list(dict.fromkeys(one["kind"] for one in masked))
    data = [
        {**one, "percent": 100 * one["rate"], "line": kind, "series": "measured"}
        for kind in kinds
        for one in found
        if one["kind"] in (kind, "dense")
    ]
    keys = _kind_keys(kinds)
    scales = coloured(alt, keys, "line")
    most = max(max(one["ideal"], one["high"]) for one in found)
    least = min(1.0, min(one["low"] for one in found))
    ticks = [tick for tick in (0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24) if least <= tick <= 1.1 * most]
    x = alt.X(
        "percent:Q",
        title="patches masked, %",
        scale=alt.Scale(domain=[0, 100]),
        axis=alt.Axis(grid=False, tickCount=10),
    )
    y_scale = alt.Scale(type="log", domain=[0.93 * least, 1.1 * most], nice=False)
    y_axis = alt.Axis(values=ticks, labelExpr="datum.value + 'x'")
    title = "images/s, the dense step's = 1"
    base = alt.Chart(alt.Data(values=data))
    fixed = base.transform_filter("!datum.range")
    ideal = fixed.mark_line(strokeDash=[3, 3], color="#77777f", strokeWidth=1.5).encode(
        x=x, y=alt.Y("ideal:Q", title=title, scale=y_scale, axis=y_axis), detail="line:N"
    )
    line = fixed.mark_line(strokeWidth=2.2).encode(x=x, y=alt.Y("speed_up:Q", title=title, scale=y_scale), **scales)
    ends = base.mark_rule().encode(
        x=x, y=alt.Y("low:Q", title=title, scale=y_scale), y2="high:Q", color=scales["color"]
    )
    tips = [
        alt.Tooltip("mask:N"),
        alt.Tooltip("speed_up:Q", title="speed-up", format=".2f"),
        alt.Tooltip("ideal:Q", format=".2f"),
        alt.Tooltip("images_per_s:Q", title="images/s", format=".1f"),
        alt.Tooltip("step_ms:Q", title="ms a step", format=".1f"),
        alt.Tooltip("batch:Q", title="images a step"),
    ]
    dots = base.mark_point(filled=True, size=55, opacity=1).encode(
        x=x, y=alt.Y("speed_up:Q", title=title, scale=y_scale), color=scales["color"], tooltip=tips
    )
    note = "Equal tokens a step. Dashed: the ideal, by counted FLOPs an image. Bars: 20% to 80% of the measured steps."
    return Figure("speed", "What a masked step buys", note, ideal + line + ends + dots, keys=keys)


def _percent(alt: Any, title: str) -> Any:
    axis = alt.Axis(grid=False, tickCount=10)
    return alt.X("percent:Q", title=title, scale=alt.Scale(domain=[0, 100]), axis=axis)


def _kind_keys(kinds: Sequence[str]) -> tuple[Key, ...]:
    return tuple(
        Key(kind, DISTINCT[number % len(DISTINCT)], DASHES[number % len(DASHES)]) for number, kind in enumerate(kinds)
    )


def final(study: Study) -> Figure | None:
    """Quality at the end of equal time against the rate: every seed a dot, means with intervals, dense as a band."""
    alt = altair()
    groups = [one for one in study.plain() if one.final("frechet")]
    if not groups:
        return None
    kinds = list(dict.fromkeys(one.about["kind"] for one in groups))
    means, seeds = [], []
    for one in groups:
        values = one.final("frechet")
        about = {"line": one.about["kind"], "group": one.name, "percent": 100 * one.rate}
        here = mean_interval(values)
        means.append({**about, "y": here.mean, "low": here.low, "high": here.high, "seeds": len(values)})
        seeds += [{**about, "y": value} for value in values]
    keys = _kind_keys(kinds)
    scales = coloured(alt, keys, "line")
    dense = study.dense()
    base_values = dense.final("frechet") if dense is not None else []
    shown = [row["y"] for row in seeds] + base_values
    ends = [row[end] for row in means for end in ("low", "high")]
    y_scale = alt.Scale(domain=list(_around(shown, ends)), nice=False, clamp=True)
    x = _percent(alt, "patches masked in pre-training, %")
    y = alt.Y("y:Q", title=study.title, scale=y_scale, axis=alt.Axis(tickCount=5))
    layers = []
    if base_values:
        here = mean_interval(base_values)
        row = {"y": here.mean, "low": here.low, "high": here.high, "says": "dense", "percent": 0}
        flat = alt.Chart(alt.Data(values=[row]))
        if here.low is not None:
            layers.append(
                flat.mark_rect(color=INK, opacity=0.1).encode(
                    y=alt.Y("low:Q", title=study.title, scale=y_scale), y2="high:Q"
                )
            )
        layers.append(flat.mark_rule(color=INK, strokeWidth=1.8).encode(y=y))
        text = flat.mark_text(align="left", dx=4, dy=-7, color=INK, fontSize=12)
        layers.append(text.encode(x=x, y=y, text="says:N"))
    base = alt.Chart(alt.Data(values=means))
    tips = [
        alt.Tooltip("group:N"),
        *_interval_tips(alt, study.title),
        alt.Tooltip("seeds:Q"),
    ]
    banded = base.transform_filter("isValid(datum.low)").mark_rule(strokeWidth=1.6)
    layers.append(base.mark_line(strokeWidth=2).encode(x=x, y=y, **scales))
    layers.append(
        banded.encode(x=x, y=alt.Y("low:Q", title=study.title, scale=y_scale), y2="high:Q", color=scales["color"])
    )
    layers.append(
        alt.Chart(alt.Data(values=seeds)).mark_point(size=26, opacity=0.55).encode(x=x, y=y, color=scales["color"])
    )
    layers.append(
        base.mark_point(filled=True, size=60, opacity=1).encode(x=x, y=y, color=scales["color"], tooltip=tips)
    )
    note = "Lower is better. Rings: seeds; dots and bars: means with 95% intervals; the band is dense training's."
    return Figure("final", "Quality after equal training time", note, alt.layer(*layers), keys=keys)


def differences(title: str, gaps: dict[str, Interval]) -> Figure | None:
    """Each group's difference from dense, with the interval by which it is judged."""
    if not gaps:
        return None
    alt = altair()
    order = list(gaps)
    colour = {True: "#0072b2", False: "#d55e00"}
    data = [
        {
            "group": key,
            "gap": gap.mean,
            "low": gap.low,
            "high": gap.high,
            "colour": colour[gap.mean < 0] if gap.told_apart else "#77777f",
        }
        for key, gap in gaps.items()
    ]
    base = alt.Chart(alt.Data(values=data))
    ends = [end for gap in gaps.values() for end in (gap.low, gap.mean, gap.high) if end is not None]
    domain = _around([0.0, *ends])  # whole intervals: whether they hold 0 is what is read here
    scale = alt.Scale(domain=list(domain), nice=False, clamp=True)
    axis = alt.Axis(tickCount=4)
    y = _names_axis(alt, order)
    own = alt.Color("colour:N", scale=None)
    zero = alt.Chart(alt.Data(values=[{"zero": 0}])).mark_rule(color=INK, strokeWidth=1.5).encode(x="zero:Q")
    bars = base.transform_filter("isValid(datum.low)").mark_rule(strokeWidth=2)
    tips = [
        alt.Tooltip("group:N"),
        alt.Tooltip("gap:Q", title="difference", format="+.4~g"),
        alt.Tooltip("low:Q", title="from", format="+.4~g"),
        alt.Tooltip("high:Q", title="to", format="+.4~g"),
    ]
    line = bars.encode(y=y, x=alt.X("low:Q", scale=scale, axis=axis, title="difference"), x2="high:Q", color=own)
    dots = base.mark_point(filled=True, size=60, opacity=1).encode(
        y=y, x=alt.X("gap:Q", scale=scale, axis=axis, title="difference"), color=own, tooltip=tips
    )
    note = (
        "Left of the line is better. Blue: better and told apart; orange: worse and told apart; grey: not told apart."
    )
    return Figure("differences", title, note, zero + line + dots, _height(order))


def _names_axis(alt: Any, names: Sequence[str]) -> Any:
    """Groups one below the other, long names in several lines."""
    lines = "split(datum.label, regexp(', | > '))"
    axis = alt.Axis(grid=False, ticks=False, domain=False, labelPadding=6, labelExpr=lines, labelOverlap=False)
    return alt.Y("group:N", sort=list(names), title=None, axis=axis)


def _height(names: Sequence[str]) -> int:
    lines = max(1 + name.count(", ") + name.count(" > ") for name in names)
    return 40 + len(names) * (12 + 14 * lines)


def trade_off(study: Study) -> Figure | None:
    """Quality at the end against the speed of the whole run; the front drawn through what nothing else beats."""
    alt = altair()
    found = front(study)
    if len(found) < 2:
        return None
    by_name = {key.name: key for key in keys_of([one for one in study.usual()])}
    keys = tuple(by_name[one["group"]] for one in found)
    scales = coloured(alt, keys)
    x = alt.X(
        "speed_up:Q",
        title="images/s over the whole run, dense = 1",
        scale=alt.Scale(domain=list(_around([one["speed_up"] for one in found])), nice=False),
        axis=alt.Axis(tickCount=5),
    )
    y = alt.Y(
        "frechet:Q",
        title=study.title,
        scale=alt.Scale(domain=list(_around([one["frechet"] for one in found])), nice=False),
        axis=alt.Axis(tickCount=5),
    )
    names = [key.name for key in keys]
    shape = alt.Shape("group:N", sort=None, scale=alt.Scale(domain=names, range=[key.shape for key in keys]))
    tips = [alt.Tooltip("group:N"), alt.Tooltip("frechet:Q", format=".4~g"), alt.Tooltip("speed_up:Q", format=".3~g")]
    base = alt.Chart(alt.Data(values=found))
    best = base.transform_filter("datum.best")
    line = best.mark_line(color="#77777f", strokeDash=[3, 3], strokeWidth=1.5).encode(x=x, y=y)
    ring = best.mark_point(size=230, color=INK, strokeWidth=1.3).encode(x=x, y=y)
    dots = base.mark_point(filled=True, size=75, opacity=1).encode(
        x=x, y=y, color=scales["color"], shape=shape, tooltip=tips
    )
    note = "Ringed: nothing else is both faster and better. Lower and further right is better."
    return Figure("front", "The trade-off", note, line + ring + dots, keys=keys, dots=True)


def heat(study: Study) -> Figure | None:
    """Mean Frechet distance by kind and rate, where the two were crossed."""
    alt = altair()
    groups = [one for one in study.plain() if one.final("frechet")]
    kinds = list(dict.fromkeys(one.about["kind"] for one in groups))
    rates = {one.rate for one in groups}
    if len(kinds) < 2 or len(rates) < 2:
        return None
    data = [
        {"kind": one.about["kind"], "rate": f"{100 * one.rate:g}%", "order": one.rate, "y": here, "says": f"{here:.4g}"}
        for one in groups
        if (here := sum(one.final("frechet")) / len(one.final("frechet"))) is not None
    ]
    values = sorted(row["y"] for row in data)
    middle = (values[0] + values[-1]) / 2
    base = alt.Chart(alt.Data(values=data)).encode(
        x=alt.X("rate:N", sort=alt.SortField("order"), title="patches masked", axis=alt.Axis(labelAngle=0)),
        y=alt.Y("kind:N", sort=kinds, title=None),
    )
    colour = alt.Color("y:Q", legend=None, scale=alt.Scale(scheme="blues", domain=[values[-1], values[0]]))
    cells = base.mark_rect().encode(color=colour, tooltip=[alt.Tooltip("kind:N"), alt.Tooltip("rate:N"), "says:N"])
    text = base.mark_text(fontSize=13).encode(
        text="says:N", color=alt.condition(f"datum.y < {middle}", alt.value("white"), alt.value(INK))
    )
    note = "Darker is better."
    return Figure("heat", f"{study.title} by kind and rate", note, cells + text, 46 * len(kinds))


def longer(study: Study) -> Figure | None:
    """Final quality against the length of the runs, of the groups that were trained for longer too."""
    alt = altair()
    rows = [
        {"line": name_at_length(one), "x": one.about["length"], "y": value, "seed": seed}
        for one in study.groups
        for seed, value in enumerate(one.final("frechet"))
    ]
    lines = list(dict.fromkeys(row["line"] for row in rows if row["x"] != 1))
    if not lines:
        return None
    data = [row for row in rows if row["line"] in lines]
    lengths = sorted({row["x"] for row in data})
    masked = [line for line in lines if line != "dense"]
    colours = {line: DISTINCT[number % len(DISTINCT)] for number, line in enumerate(masked)}
    keys = tuple(Key(line, colours.get(line, INK)) for line in lines)
    x = alt.X(
        "x:Q",
        title="length of the run, times",
        scale=alt.Scale(type="log", domain=[0.9 * min(lengths), 1.12 * max(lengths)], nice=False),
        axis=alt.Axis(values=lengths, grid=False, format="~g"),
    )
    scale = alt.Scale(domain=list(_around([row["y"] for row in data])), nice=False)
    axis = alt.Axis(tickCount=5)
    scales = coloured(alt, keys, "line")
    base = alt.Chart(alt.Data(values=data))
    mean = base.mark_line(strokeWidth=2.2).encode(
        x=x, y=alt.Y("mean(y):Q", scale=scale, axis=axis, title=study.title), **scales
    )
    tips = [alt.Tooltip("line:N"), alt.Tooltip("x:Q", title="length"), alt.Tooltip("y:Q", format=".4~g")]
    dots = base.mark_point(filled=True, size=50, opacity=0.8).encode(
        x=x, y=alt.Y("y:Q", scale=scale, axis=axis, title=study.title), color=scales["color"], tooltip=tips
    )
    return Figure("longer", "Does the gap close?", "Dots: seeds; lines: their means.", mean + dots, keys=keys)


def name_at_length(group: Group) -> str:
    """A group's name without its length: "dense, 4x as long" is "dense"."""
    return group.name.removesuffix(f", {group.about['length']:g}x as long")


def reached(rows: Sequence[dict[str, Any]], total: float) -> Figure | None:
    """How long each group took to the dense run's final value: bars; words where it never came there."""
    if not rows:
        return None
    alt = altair()
    unit, size = unit_of(total)
    order = [row["group"] for row in rows]
    data = [
        {
            "group": row["group"],
            "x": 0 if row["seconds"] is None else row["seconds"] / size,
            "colour": row["colour"],
            "says": row["says"],
        }
        for row in rows
    ]
    y = _names_axis(alt, order)
    scale = alt.Scale(domain=[0, 1.3 * total / size], nice=False)
    axis = alt.Axis(tickCount=4)
    x = alt.X("x:Q", title=f"training time, {unit}", scale=scale, axis=axis)
    base = alt.Chart(alt.Data(values=data))
    bars = base.mark_bar(height=14).encode(x=x, y=y, color=alt.Color("colour:N", scale=None))
    text = base.mark_text(align="left", dx=5, fontSize=12, color=INK).encode(x=x, y=y, text="says:N")
    end = alt.Chart(alt.Data(values=[{"x": total / size}])).mark_rule(color=INK, strokeDash=[3, 3]).encode(x="x:Q")
    note = "The dashed line is the dense run's whole time. Linear between measurements, a mean over seeds."
    title = "Time to the dense run's final quality"
    return Figure("reached", title, note, bars + end + text, _height(order))


def by_share(
    name: str,
    title: str,
    rows: Sequence[tuple[str, float, Sequence[float]]],  # label, share of the images, final values
    says: str,
    look: dict[str, Key],
) -> Figure | None:
    """Final quality against the share of a target's images, a line for each label. None where nothing is finished."""
    alt = altair()
    data: list[dict[str, Any]] = []
    for line, share, values in rows:
        if values:
            here = mean_interval(values)
            seeds = len(values)
            data.append(
                {"line": line, "x": 100 * share, "y": here.mean, "low": here.low, "high": here.high, "seeds": seeds}
            )
    if not data:
        return None
    shares = sorted({row["x"] for row in data})
    keys = tuple(look[line] for line in dict.fromkeys(row["line"] for row in data))
    scales = coloured(alt, keys, "line")
    x = alt.X(
        "x:Q",
        title="share of the target's images, %",
        scale=alt.Scale(type="log", domain=[0.8 * min(shares), 1.25 * max(shares)], nice=False),
        axis=alt.Axis(values=shares, grid=False),
    )
    means = [row["y"] for row in data]
    scale = alt.Scale(
        domain=list(_around(means, [row[end] for row in data for end in ("low", "high")])), nice=False, clamp=True
    )
    axis = alt.Axis(tickCount=5)
    y = alt.Y("y:Q", title=says, scale=scale, axis=axis)
    tips = [alt.Tooltip("line:N"), *_interval_tips(alt, says), alt.Tooltip("seeds:Q")]
    base = alt.Chart(alt.Data(values=data))
    bars = base.transform_filter("isValid(datum.low)").mark_rule(strokeWidth=1.6)
    bar = bars.encode(x=x, y=alt.Y("low:Q", title=says, scale=scale), y2="high:Q", color=scales["color"])
    dots = base.mark_point(filled=True, size=55, opacity=1).encode(x=x, y=y, color=scales["color"], tooltip=tips)
    line = base.mark_line(strokeWidth=2.2).encode(x=x, y=y, **scales)
    return Figure(name, title, "Lower is better. Bars: 95% intervals over seeds.", line + bar + dots, keys=keys)


def _interval_tips(alt: Any, says: str) -> list[Any]:
    """What a pointer shows of a mean."""
    return [
        alt.Tooltip("y:Q", title=says, format=".4~g"),
        alt.Tooltip("low:Q", title="95% from", format=".4~g"),
        alt.Tooltip("high:Q", title="to", format=".4~g"),
    ]
