"""How measured figures are shown: the table on the terminal and the picture of the speed-up curve."""

from pathlib import Path
from typing import Any

LABELS = {
    "maskdiff": "maskdiff",
    "strong": "plain PyTorch, strong",
    "compiled": "plain PyTorch, strong, compiled",
    "published": "as published",
}


def table(result: dict[str, Any]) -> str:
    """The bench result as text: a line per contestant, then where our step's time goes, then equal tokens."""
    machine = result["machine"]
    where = machine.get("card") or f"{machine['processor']}, {machine['threads']} threads, {machine['capability']}"
    lines = [
        f"{result['preset']}, batch {result['batch']}, {result['precision']}, {where}, torch {machine['torch']}",
        f"matrix rate {result['matrix_gflops']:.0f} GFLOP/s, copy rate {result['copy_gbs']:.1f} GB/s, "
        f"medians of {result['rounds']} interleaved rounds",
        "",
    ]
    head = ("mask", "tokens", "", "ms a step", "images/s", "speed-up", "ideal", "retained", "share", "MFU", "peak MB")
    body = [
        (
            "dense" if not row["rate"] else f"{row['kind']} {row['rate']:.0%}",
            str(row["tokens"]),
            row["implementation"] + (" (fp32)" if row["precision"] != result["precision"] else ""),
            f"{row['step_ms']:.1f}",
            f"{row['images_per_s']:.1f}",
            f"{row['speedup']:.2f}x",
            f"{row['ideal']:.2f}x",
            f"{row['retained']:.1%}",
            "" if row["share"] is None else f"{row['share']:.1%}",
            f"{row['mfu']:.1%}",
            "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}",
        )
        for row in result["rows"]
    ]
    lines += _columns([head, *body])
    names = list(dict.fromkeys(name for parts in result["parts_ms"].values() for name in parts))
    lines += ["", "our step by part, ms"]
    lines += _columns(
        [
            ("mask", *names),
            *((mask, *(f"{parts[name]:.2f}" for name in names)) for mask, parts in result["parts_ms"].items()),
        ]
    )
    lines += ["", "at equal tokens a step"]
    lines += _columns(
        [
            ("mask", "batch", "images/s"),
            *(
                (
                    "dense" if not row["rate"] else f"{row['kind']} {row['rate']:.0%}",
                    str(row["batch"]),
                    f"{row['images_per_s']:.1f}",
                )
                for row in result["equal_tokens"]
            ),
        ]
    )
    return "\n".join(lines)


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

    rows = [row for row in result["rows"] if row["kind"] in ("dense", "patch")]
    best = min(row["step_ms"] for row in rows if not row["rate"] and row["implementation"] != "published")
    colours = {"maskdiff": "#d1495b", "strong": "#00798c", "compiled": "#66a182", "published": "#8d96a3"}
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4.2), constrained_layout=True)
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    ours = [row for row in rows if row["implementation"] == names[0]]
    hidden = [100 * row["effective_rate"] for row in ours]
    left.plot(hidden, [row["ideal"] for row in ours], "k--", lw=1, label="ideal (FLOPs)")
    for name in names:
        own = [row for row in rows if row["implementation"] == name]
        at = [100 * row["effective_rate"] for row in own]
        style = {"color": colours.get(name), "marker": "o", "ms": 4, "label": LABELS.get(name, name)}
        left.plot(at, [best / row["step_ms"] for row in own], **style)
        right.plot(at, [100 * row["retained"] for row in own], **style)
    left.set(yscale="log", ylabel="speed-up over the best dense step", xlabel="patches masked, %")
    ticks = [tick for tick in (0.5, 1, 2, 3, 5, 10, 20) if tick <= 1.3 * max(row["ideal"] for row in ours)]
    left.set_yticks(ticks, [f"{tick:g}x" for tick in ticks])
    left.minorticks_off()
    right.axhline(100, color="k", ls="--", lw=1)
    right.set(ylim=(0, 125), ylabel="retained share of the ideal speed-up, %", xlabel="patches masked, %")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    left.legend(frameon=False, loc="upper left")
    machine = result["machine"]
    where = machine.get("card") or f"{machine['threads']} CPU threads, {machine['capability']}"
    figure.suptitle(
        f"One training step, {result['preset']} (width {result['model']['width']}, {result['model']['blocks']} blocks, "
        f"{result['model']['image_size']} px), batch {result['batch']}, {result['precision']}, {where}",
        fontsize=10,
    )
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
