"""How measured figures are shown: the table on the terminal and the picture of the speed-up curve."""

from pathlib import Path
from typing import Any

LABELS = {
    "maskdiff": "maskdiff",
    "maskdiff-own": "maskdiff, own kernels throughout",
    "maskdiff-overlap": "maskdiff, own kernels, updates overlapped",
    "maskdiff-fused": "maskdiff, own kernels, blocks compiled",
    "strong": "plain PyTorch, strong",
    "compiled": "plain PyTorch, strong, compiled",
    "published": "as published",
}


FIXED = ("draw", "gather and noise", "loss", "loss backward", "optimizer")  # parts that are not the transformer


def named(mask: str) -> str:
    """A mask as a table's line begins: "patch:0.5" is "patch 50%", "patch:0.5-0.9" is "patch 50-90%"."""
    kind, _, rate = mask.partition(":")
    return f"{kind} {'-'.join(f'{100 * float(end):g}' for end in rate.split('-'))}%" if rate else kind


def table(result: dict[str, Any]) -> str:
    """The bench result as text: a line per contestant, then where our step's time goes, then whatever else is there."""
    machine = result["machine"]
    where = machine.get("card") or f"{machine['processor']}, {machine['threads']} threads, {machine['capability']}"
    lines = [
        f"{result['preset']}, batch {result['batch']}, {result['precision']}, {where}, torch {machine['torch']}",
        f"matrix rate {result['matrix_gflops']:.0f} GFLOP/s, copy rate {result['copy_gbs']:.1f} GB/s, "
        f"medians of {result['rounds']} {result['turns']}",
        "",
        *contestants(result["rows"], result["precision"]),
    ]
    for title, section in (
        ("our step by part, ms; the last column: all that is not the transformer", _parts(result["parts_ms"])),
        ("at equal tokens a step", _equal_tokens(result["equal_tokens"])),
        ("our step with another implementation, over the step as chosen", _choices(result.get("kernels", []))),
        *(
            (f"beyond the ideal at {named(mask)}, ms by kernel", _by_kernel(rows))
            for mask, rows in result.get("by_kernel", {}).items()
        ),
    ):
        if section:
            lines += ["", title, *section]
    return "\n".join(lines)


def contestants(rows: list[dict[str, Any]], precision: str) -> list[str]:
    """A line for each contestant at each mask."""
    head = ("mask", "tokens", "", "ms a step", "images/s", "speed-up", "ideal", "retained", "share", "MFU", "peak MB")
    launches = len({row["launches"] for row in rows}) > 1  # said where they differ
    body = [
        (
            named(row["mask"]),
            f"{row['tokens']:g}",
            row["implementation"]
            + (" (fp32)" if row["precision"] != precision else "")
            + (f" ({row['launches']})" if launches else ""),
            f"{row['step_ms']:.1f}" if row["step_ms"] >= 100 else f"{row['step_ms']:.2f}",
            f"{row['images_per_s']:.1f}",
            "" if row["speedup"] is None else f"{row['speedup']:.2f}x",
            f"{row['ideal']:.2f}x",
            "" if row["retained"] is None else f"{row['retained']:.1%}",
            "" if row["share"] is None else f"{row['share']:.1%}",
            f"{row['mfu']:.1%}",
            "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}",
        )
        for row in rows
    ]
    return _columns([head, *body])


def outside(parts: dict[str, float]) -> float:
    """The share of a step that is not the transformer: draw, gather and noise, loss both ways, optimizer."""
    return sum(parts[name] for name in FIXED) / sum(parts.values())


def _parts(parts_ms: dict[str, dict[str, float]]) -> list[str]:
    names = list(dict.fromkeys(name for parts in parts_ms.values() for name in parts))
    rows = [(named(mask), *(f"{p[name]:.2f}" for name in names), f"{outside(p):.1%}") for mask, p in parts_ms.items()]
    return _columns([("mask", *names, "outside"), *rows]) if rows else []


def _equal_tokens(rows: list[dict[str, Any]]) -> list[str]:
    shown = [(named(row["mask"]), str(row["batch"]), f"{row['images_per_s']:.1f}") for row in rows]
    return _columns([("mask", "batch", "images/s"), *shown]) if shown else []


def _choices(rows: list[dict[str, Any]]) -> list[str]:
    shown = [
        (
            named(row["mask"]),
            f"{row['op']}={row['implementation']}" if row["op"] else "as chosen",
            "" if row["error"] else f"{row['step_ms']:.2f}",
            "" if row["error"] else f"{row['ratio']:.3f}",
            "" if row["error"] or row["launches"] == rows[0]["launches"] else row["launches"],
        )
        for row in rows
    ]
    failed = [
        f"{row['op']}={row['implementation']} at {named(row['mask'])}: {row['error']}" for row in rows if row["error"]
    ]
    return _columns([("mask", "", "ms", "ratio", ""), *shown]) + failed if shown else []


def _by_kernel(rows: list[dict[str, Any]]) -> list[str]:
    shown = [
        (row["kernel"][:60], str(row["calls"]), *(f"{row[key]:.2f}" for key in ("dense_ms", "ms", "excess_ms")))
        for row in rows
    ]
    return _columns([("kernel", "calls", "dense", "here", "beyond"), *shown])


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    """Aligns: the first and any column of names to the left, figures to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    left = [i == 0 or rows[0][i] == "" for i in range(len(widths))]
    return [
        "  ".join(
            cell.ljust(width) if to_left else cell.rjust(width)
            for cell, width, to_left in zip(row, widths, left, strict=True)
        ).rstrip()
        for row in rows
    ]


def picture(result: dict[str, Any], path: Path) -> None:
    """Draws speed-up over the best dense step, and the retained share of the ideal, against the mask rate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in result["rows"] if row["kind"] in ("dense", "patch") and row["retained"] is not None]
    colours = {
        "maskdiff": "#d1495b",
        "maskdiff-own": "#8c1c2e",
        "maskdiff-overlap": "#b07aa1",
        "maskdiff-fused": "#e08e45",
        "strong": "#00798c",
        "compiled": "#66a182",
        "published": "#8d96a3",
    }
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4.2), constrained_layout=True)
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    ours = [row for row in rows if row["implementation"] == names[0] and not row["range"]]
    ragged = [row for row in rows if row["range"]]
    hidden = [100 * row["effective_rate"] for row in ours]
    left.plot(hidden, [row["ideal"] for row in ours], "k--", lw=1, label="ideal (FLOPs)")
    for name in names:
        own = [row for row in rows if row["implementation"] == name and not row["range"]]
        at = [100 * row["effective_rate"] for row in own]
        style = {"color": colours.get(name), "marker": "o", "ms": 4, "label": LABELS.get(name, name)}
        left.plot(at, [row["retained"] * row["ideal"] for row in own], **style)
        right.plot(at, [100 * row["retained"] for row in own], **style)
    if ragged:
        at = [100 * row["effective_rate"] for row in ragged]
        style = {"color": colours[names[0]], "marker": "D", "ms": 6, "mfc": "none", "ls": "", "label": "mixed rates"}
        left.plot(at, [row["retained"] * row["ideal"] for row in ragged], **style)
        right.plot(at, [100 * row["retained"] for row in ragged], **style)
    left.set(yscale="log", ylabel="speed-up over the best dense step", xlabel="patches masked, %")
    ticks = [tick for tick in (0.5, 1, 2, 3, 5, 10, 20) if tick <= 1.3 * max(row["ideal"] for row in ours)]
    left.set_yticks(ticks, [f"{tick:g}x" for tick in ticks])
    left.minorticks_off()
    right.axhline(100, color="k", ls="--", lw=1)
    right.set(ylim=(0, 125), ylabel="retained share of the ideal speed-up, %", xlabel="patches masked, %")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    left.legend(loc="best", fontsize=9, framealpha=0.85, edgecolor="none")
    machine = result["machine"]
    where = machine.get("card") or f"{machine['threads']} CPU threads, {machine['capability']}"
    figure.suptitle(
        f"One training step, {result['preset']} (width {result['model']['width']}, {result['model']['blocks']} blocks, "
        f"{result['model']['image_size']} px), batch {result['batch']}, {result['precision']}, {where}",
        fontsize=10,
    )
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
