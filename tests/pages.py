"""`python tests/pages.py --write` brings docs/configuration.md, library.md and results.md up to date.

The pages are written by hand, but for what stands between their markers: every key of a configuration, from the
dataclasses and the texts below their fields; the public names with their signatures, as they stand in the source; and
the tables of the studies in benchmarks/results/.
"""

import ast
import dataclasses
import importlib
import inspect
import json
import statistics
import sys
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

from maskdiff import options
from maskdiff.config import Config, DataConfig, DiffusionConfig, ModelConfig, OptimConfig, describe
from maskdiff.stages import Stage
from maskdiff.study.transfer_report import LOSS

DOCS = Path(__file__).resolve().parents[1] / "docs"
BEGIN, END = "<!-- pages.py begins -->", "<!-- pages.py ends -->"

SECTIONS = {"": Config, "data.": DataConfig, "model.": ModelConfig, "diffusion.": DiffusionConfig}
SECTIONS |= {"optim.": OptimConfig, "stages.N.": Stage}

# What is public: all of the two packages' own names, and these of the trainer's modules.
PUBLIC: dict[str, tuple[str, ...]] = {
    "maskdiff": (),
    "maskdiff.training": ("run", "Run"),
    "maskdiff.presets": ("get",),
    "maskdiff.config": ("Config", "load_config", "config_from_dict", "config_to_dict", "validate"),
    "maskdiff.stages": ("parse_stages", "Stage"),
    "maskdiff.pretrained": ("load_run", "LoadedRun"),
    "maskdiff.model": ("UViT", "ModelConfig", "patchify", "unpatchify"),
    "maskdiff.diffusion": ("Diffusion", "DiffusionConfig"),
    "maskdiff.sampling": ("sample", "random_labels", "grid", "to_image"),
    "maskdiff.data": ("prepare", "open_packed", "PackedSet"),
    "maskdiff.features": ("load", "Extractor"),
    "maskdiff.metrics": ("Reference", "Scores", "frechet_distance", "moments", "kernel_distance", "neighbourhoods"),
    "maskdiff.errors": ("UserError",),
    "maskdiff_kernels": (),
}
METHODS = {"UViT": ("forward", "predict", "compile_blocks")}  # where not all without an underscore are


def names_of(module: str) -> list[str]:
    """The public names of a module."""
    found = importlib.import_module(module)
    names = [*(PUBLIC[module] or found.__all__)]
    if not PUBLIC[module]:  # a package's own names: those that it defines or gives on, without its modules
        names += [
            name for name, value in vars(found).items()
            if not name.startswith("_") and not isinstance(value, ModuleType) and name not in names
            and getattr(value, "__module__", "").split(".")[0] == module
        ]  # fmt: skip
    return names


# ---- configuration


def field_texts(kind: type) -> dict[str, str]:
    """The text below each field of a dataclass."""
    body = _tree(kind).body
    return {
        field.target.id: text.value.value
        for field, text in zip(body, body[1:], strict=False)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }  # fmt: skip


def configuration() -> str:
    """Every key of a configuration, a table a section."""
    parts = []
    for prefix, kind in SECTIONS.items():
        texts, hints = field_texts(kind), get_type_hints(kind)
        title = (inspect.getdoc(kind) or "").split("\n")[0].split(". ")[0].rstrip(".")
        lines = [f"### {title}", "", "| key | takes | default | |", "|---|---|---|---|"]
        for field in dataclasses.fields(kind):
            if not dataclasses.is_dataclass(hints[field.name]) and (prefix or field.name != "stages"):
                key, text = f"{prefix}{field.name}", texts[field.name].replace("|", "\\|")
                lines.append(f"| `{key}` | {describe(hints[field.name])} | {_default(field)} | {text} |")
        parts.append("\n".join(lines))
    free = ", ".join(f"`{key}`" for key in sorted(options.FREE_ON_RESUME))
    stages = "The last stage that has begun may become longer, and those behind it are free: `--stages.1.steps 9000`."
    return "\n\n".join([*parts, f"A resumed run may change {free}. {stages}"])


def _default(field: Any) -> str:
    return "none" if field.default in (None, ()) else f"`{json.dumps(field.default)}`"


# ---- the public names


def library() -> str:
    """The public names, module by module, with their signatures and first lines."""
    parts = []
    for module in PUBLIC:
        found = importlib.import_module(module)
        parts.append(
            "\n".join([f"### {module}", "", *(_entry(name, getattr(found, name)) for name in names_of(module))])
        )
    return "\n\n".join(parts)


def _entry(name: str, value: Any) -> str:
    if isinstance(value, ModuleType):
        defined = [word for word, what in vars(value).items() if getattr(what, "__module__", "") == value.__name__]
        return f"- `{name}`: {_first(value)} " + ", ".join(f"`{word}`" for word in defined if word[0] != "_")
    if inspect.isclass(value):
        methods = [
            f"  - {_signature(member, method)}"
            for member, method in vars(value).items()
            if not member.startswith("_") and member in METHODS.get(name, (member,))
            and (inspect.isfunction(method) or isinstance(method, (property, classmethod, staticmethod)))
        ]  # fmt: skip
        return "\n".join([f"- `{name}{_constructor(value)}`: {_first(value)}", *methods])
    if callable(value):
        return f"- {_signature(name, value)}"
    return f"- `{name}`: {type(value).__name__}" + (f", `{value!r}`" if isinstance(value, (str, tuple)) else "")


def _signature(name: str, function: Any) -> str:
    if isinstance(function, property):
        return f"`{name}`: {_first(function)}"
    node = _tree(getattr(function, "__func__", function))
    result = "" if node.returns is None else f" -> {ast.unparse(node.returns)}"
    return f"`{name}({_arguments(node)}){result}`: {_first(function)}"


def _arguments(node: ast.FunctionDef) -> str:
    if node.args.args and node.args.args[0].arg in ("self", "cls"):
        del node.args.args[0]
    return ast.unparse(node.args)


def _constructor(kind: type) -> str:
    if kind in SECTIONS.values():
        return "(...)"  # its keys stand in configuration.md
    if "__init__" in vars(kind) and not dataclasses.is_dataclass(kind):
        return f"({_arguments(_tree(vars(kind)['__init__']))})"
    fields = [ast.unparse(node) for node in _tree(kind).body if isinstance(node, ast.AnnAssign)]
    return f"({', '.join(fields)})" if fields else ""


def _first(value: Any) -> str:
    paragraph = (inspect.getdoc(value) or "").split("\n\n")[0]
    return " ".join(paragraph.split())


def _tree(value: Any) -> Any:
    return ast.parse(textwrap.dedent(inspect.getsource(value))).body[0]


# ---- studies

STUDIES = Path(__file__).resolve().parents[1] / "benchmarks" / "results"


def results() -> str:
    """The tables of docs/results.md, from the reports of the studies that stand in benchmarks/results/."""
    return "\n\n".join([_rates("rates-noto-emoji"), _transfer("transfer-emoji")])


def _report(name: str) -> dict[str, Any]:
    return json.loads((STUDIES / name / "report.json").read_text())


def _rates(name: str) -> str:
    told = _report(name)
    speed = {row["mask"]: row for row in told["speed_ups"]}
    gaps = {key: told["verdicts"][key]["differences"] for key in ("frechet", "heldout_loss")}
    head = ("first half", "images/s of a masked step", "ideal", "images seen", "Frechet distance of each seed", "mean")
    head += ("against dense, 95 %", "held-out loss", "against dense, 95 %")
    lines = [*map(_quoted, told["sentences"]), f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for group in [group for group in told["groups"] if group["seeds"]]:
        row = speed[group["time"][0]["mask"]]
        ends, loss = (group["final"][key] for key in ("frechet", "heldout_loss"))
        cells = [
            group["name"],
            f"{row['speed_up']:.2f}x",
            f"{row['ideal']:.2f}x",
            f"{sum(part['images'] for part in group['time']) / 1000:.0f} k",
            ", ".join(f"{value:,.0f}" for value in ends),
            f"{statistics.fmean(ends):,.0f}",
            _gap(gaps["frechet"].get(group["name"]), ",.0f"),
            f"{statistics.fmean(loss):.4f}",
            _gap(gaps["heldout_loss"].get(group["name"]), ".4f"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "### Mask rates\n\n" + "\n".join(lines)


def _transfer(name: str) -> str:
    told = _report(name)
    base = {(group["target"], group["share"]): group for group in told["groups"] if group["baseline"]}
    head = ("target, share of its images", "from scratch: Frechet distance of each seed", "pre-trained")
    head += ("difference, 95 %", "held-out loss: from scratch", "pre-trained", "difference, 95 %")
    lines = [*map(_quoted, told["sentences"]), f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for tuned in [group for group in told["groups"] if group["source"] is not None]:
        case = f"{tuned['target']}, {100 * tuned['share']:g}% of the images"
        cells = [case.removesuffix(" of the images")]
        for key, form, verdict in (("frechet", ",.0f", case), ("heldout_loss", ".4f", f"{case}: {LOSS}")):
            for group in (base[tuned["target"], tuned["share"]], tuned):
                cells.append(", ".join(f"{value:{form}}" for value in group["final"][key]))
            gaps = told["verdicts"][verdict]["differences"]
            cells.append(_gap(gaps.get(f"pre-trained on {tuned['source']}"), form))
        lines.append(f"| {' | '.join(cells)} |")
    return "### Pre-training on another set\n\n" + "\n".join(lines)


def _quoted(sentence: str) -> str:
    return f"> {sentence}\n"


def _gap(gap: dict[str, Any] | None, form: str) -> str:
    if gap is None:
        return ""
    if gap["low"] is None:
        return f"{gap['mean']:+{form}}"
    return f"{gap['mean']:+{form}} ({gap['low']:+{form}} to {gap['high']:+{form}})"


# ---- the pages

PAGES = {"configuration.md": configuration, "library.md": library, "results.md": results}


def on_page(page: str) -> str:
    """What a page holds between its markers."""
    return page.split(BEGIN)[1].split(END)[0].strip()


def main() -> int:
    if sys.argv[1:] not in ([], ["--write"]):
        print("usage: python tests/pages.py [--write]", file=sys.stderr)
        return 2
    stale = 0
    for name, made in PAGES.items():
        page, now = (DOCS / name).read_text(), made()
        if on_page(page) != now:
            stale += 1
            if sys.argv[1:]:
                before, _, rest = page.partition(BEGIN)
                (DOCS / name).write_text(f"{before}{BEGIN}\n\n{now}\n\n{END}{rest.partition(END)[2]}")
            print(f"docs/{name} {'written' if sys.argv[1:] else 'is not up to date'}")
    return 0 if sys.argv[1:] or not stale else 1


if __name__ == "__main__":
    sys.exit(main())
