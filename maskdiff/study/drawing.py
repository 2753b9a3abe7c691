"""What a chart is, for the page and for the picture alike: colours, scales, legends; and what draws it."""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from ..errors import UserError
from .results import Group

INK, RULE, ACCENT = "#1b1b1f", "#d9d9de", "#41208f"
RAMP = ((240, 168, 60), (224, 97, 79), (168, 50, 125), (65, 32, 143))  # low rates to high ones: ever darker
DISTINCT = ("#41208f", "#d55e00", "#009e73", "#0072b2", "#cc79a7", "#8a6d00")  # told apart by the colour-blind too
DASHES = ((1, 0), (6, 3), (2, 2), (8, 3, 2, 3))
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right", "triangle-left")
AXIS_TITLES = {"steps": "steps", "images": "images seen", "flops": "training FLOPs"}
CONFIG: dict[str, Any] = {
    "font": "Helvetica Neue, Helvetica, Arial, Liberation Sans, DejaVu Sans, sans-serif",
    "background": "white",
    "view": {"stroke": None},
    "axis": {
        "gridColor": "#ececf0",
        "domainColor": "#8b8b93",
        "tickColor": "#8b8b93",
        "labelColor": "#3c3c43",
        "titleColor": "#3c3c43",
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "labelLimit": 190,
        "labelOverlap": True,
    },
    "legend": {
        "labelLimit": 400,
        "orient": "bottom",
        "columns": 4,
        "title": None,
        "labelFontSize": 11,
        "symbolStrokeWidth": 2.5,
        "symbolType": "stroke",
        "symbolOpacity": 1,
    },
    "title": {"anchor": "start", "fontSize": 14, "color": INK, "offset": 10},
}


@dataclass(frozen=True)
class Key:
    """What a legend says of one line."""

    name: str
    colour: str
    dash: tuple[int, ...] = (1, 0)
    shape: str = "circle"


@dataclass(frozen=True)
class Figure:
    """A chart, what stands above and below it, and its legend."""

    name: str
    title: str
    note: str
    chart: Any  # an altair chart without size
    height: int = 300
    keys: tuple[Key, ...] = ()
    dots: bool = False  # drawn as dots, not as lines

    @cached_property
    def _drawn(self) -> dict[str, Any]:
        return dict(self.chart.to_dict())

    def spec(self) -> dict[str, Any]:
        """The Vega-Lite specification for the page: as wide as its place, legend left to the page."""
        size = {"width": "container", "height": self.height}
        return {**self._drawn, **size, "config": {**CONFIG, "legend": {"disable": True}}}

    def part(self) -> dict[str, Any]:
        """The same as a part of a picture: of a size of its own, titled, without a legend of one line."""
        kept = {key: value for key, value in self._drawn.items() if key not in ("$schema", "config", "datasets")}
        if len(self.keys) == 1:
            kept["layer"] = [
                {**layer, "encoding": {key: _mute(value) for key, value in layer["encoding"].items()}}
                for layer in kept["layer"]
            ]
        return {**kept, "width": 430, "height": self.height, "title": self.title}

    def data(self) -> dict[str, Any]:
        """What it draws, by the names that its specification has for it."""
        return dict(self._drawn.get("datasets", {}))


def _mute(channel: Any) -> Any:
    """An encoding channel without its legend."""
    coloured = isinstance(channel, dict) and "range" in (channel.get("scale") or {})
    return {**channel, "legend": None} if coloured else channel


def altair() -> Any:
    try:
        import altair
        import vl_convert  # noqa: F401
        from scipy import special  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"the report needs {error.name}: pip install 'maskdiff[report]', then the same command with --report"
        ) from None
    return altair


def check() -> None:
    """Raises UserError where what draws the charts is not installed."""
    altair()


@lru_cache(maxsize=1)
def javascript() -> str:
    """All JavaScript that the charts of a page need, in one piece: window.vegaEmbed."""
    import vl_convert

    return str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"))


def picture(figures: Sequence[Figure], title: Sequence[str], across: int = 2) -> bytes:
    """The charts side by side with a title of so many lines, as PNG."""
    import vl_convert
    from PIL import Image

    heading = {"text": title[0], "subtitle": list(title[1:]), "fontSize": 19, "subtitleFontSize": 14}
    whole = {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "title": {**heading, "subtitleColor": INK},
        "concat": [one.part() for one in figures],
        "datasets": {key: value for one in figures for key, value in one.data().items()},
        "columns": across,
        "spacing": 40,
        "padding": 24,
        "resolve": {"scale": dict.fromkeys(("color", "strokeDash", "shape"), "independent")},
        "config": CONFIG,
    }
    drawn = vl_convert.vegalite_to_png(json.dumps(whole), scale=1.5)
    small = io.BytesIO()
    Image.open(io.BytesIO(drawn)).convert("RGB").quantize(256).save(small, "PNG", optimize=True)
    return small.getvalue()


def keys_of(groups: Sequence[Group]) -> list[Key]:
    """Colours by rate, dashes and shapes by kind and by whatever else differs; dense is black."""
    kinds = list(dict.fromkeys(one.about["kind"] for one in groups if not one.baseline))
    rates = sorted({one.rate for one in groups if not one.baseline})
    found: list[Key] = []
    alike: dict[tuple[str, float], int] = {}  # groups of a kind and rate that differ in something else
    for one in groups:
        if one.baseline:
            found.append(Key(one.name, INK))
            continue
        place = rates.index(one.rate) / max(1, len(rates) - 1)
        same = one.about["kind"], one.rate
        alike[same] = alike.get(same, -1) + 1
        number = kinds.index(one.about["kind"]) if alike[same] == 0 else len(kinds) - 1 + alike[same]
        found.append(Key(one.name, ramp(place), DASHES[number % len(DASHES)], SHAPES[number % len(SHAPES)]))
    return found


def ramp(place: float) -> str:
    """A colour between the first (0) and the last (1) of RAMP."""
    at = min(max(place, 0.0), 1.0) * (len(RAMP) - 1)
    number = min(int(at), len(RAMP) - 2)
    mixed = (a + (at - number) * (b - a) for a, b in zip(RAMP[number], RAMP[number + 1], strict=True))
    return "#" + "".join(f"{round(part):02x}" for part in mixed)


def coloured(alt: Any, keys: Sequence[Key], field: str = "group") -> dict[str, Any]:
    """Colour and dash of lines, one legend for both."""
    names = [key.name for key in keys]
    colour = alt.Color(f"{field}:N", sort=None, scale=alt.Scale(domain=names, range=[key.colour for key in keys]))
    dash = alt.StrokeDash(
        f"{field}:N", sort=None, scale=alt.Scale(domain=names, range=[list(key.dash) for key in keys])
    )
    return {"color": colour, "strokeDash": dash}


def unit_of(seconds: float) -> tuple[str, float]:
    """In what a time axis up to so many seconds is best read, and how many seconds that is."""
    return ("s", 1.0) if seconds < 180 else ("min", 60.0) if seconds < 3 * 3600 else ("h", 3600.0)
