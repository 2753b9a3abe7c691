"""Every code block of README.md and docs/ is run; generated parts are those of the code; what is public is listed.

Pages are read in one workspace that has what a reader has: pictures in photos/, a trained run in runs/first, a MaskDM
checkpoint. README comes first; every page of docs/ goes on from what README left. Commands run as they stand, with the
few words of TINY behind them that make training and sampling short.
"""

import ast
import contextlib
import importlib
import os
import re
import shlex
import shutil
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pages
import public_archives
import pytest
import torch
from PIL import Image

from maskdiff import presets, stages, training
from maskdiff.diffusion import SCHEDULES, TARGETS

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))

SMALL = "--max-steps 2 --probe-steps 1 --model.width 32 --model.blocks 3 --model.heads 1 --heldout-every 0 --device cpu"
SAMPLES = "--sample-count 4 --sample-steps 2"
TINY = {"train": f"{SMALL} {SAMPLES}", "resume": "--max-steps 3", "sample": "--steps 2", "watch": "--once"}
STUDY = "--seconds 0.01s --count 8 --points 1 --steps 2 --rounds 3 --seeds 1 --tokens 260 --threads 1 --device cpu "
STUDY += "--model.width 32 --model.blocks 3 --model.heads 1 --sample-steps 2"
PLANNED = (
    "celeba64-kinds",
    "celeba64-course",
    "small-to-celebahq64",
    "rates-noto-emoji",
    "transfer-emoji",
)  # studies: their cells are as those of others
TINY |= {"sweep": STUDY, "transfer": STUDY, "evaluate": "--count 8 --steps 2"}

# What is not run here, and why: the first words of commands.
NOT_RUN = {
    "make": "sets up an environment of its own, or needs a GPU; that there is such a target is tested",
    "pip install": "needs the internet; that the package is a dependency or an extra of ours is tested",
    "python -m maskdiff.bench": "measures for minutes; tests/trainer/test_bench.py runs it",
    "python benchmarks/": "measures for minutes; that there is such a script is tested",
    "python -m pytest benchmarks/": "measures for minutes; that there is such a file is tested",
}
PLACEHOLDERS = {"SOURCE": "photos", "OUT": "packed/of-page", "RUN": "runs/first", "[options]": ""}
PLACEHOLDERS |= {"inception-2015-12-05.pt": "stand-in.pt", "squeezenet-features.pt": "builtin"}
PLACEHOLDERS |= {"noto-emoji-128.zip": "photos.tar", "emojitwo-128.zip": "faces:100"}


@dataclass(frozen=True)
class Block:
    """A code block of a page."""

    page: str
    line: int
    kind: str  # "python" | "shell" | "" for what is shown and not run: output
    text: str


def blocks_of(path: Path) -> list[Block]:
    """Fenced blocks, and indented ones, which are shell commands."""
    found: list[Block] = []
    lines = path.read_text().splitlines()
    at = 0
    while at < len(lines):
        start = at
        if fence := re.fullmatch(r" *```(\w*)", lines[at]):
            while not re.fullmatch(r" *```", lines[at := at + 1]):
                pass
            kind = {"sh": "shell", "bash": "shell", "console": "shell"}.get(fence[1], fence[1])
            found.append(Block(path.name, start + 2, kind, "\n".join(lines[start + 1 : at])))
        elif lines[at].startswith("    ") and (at == 0 or not lines[at - 1].strip()):
            while at + 1 < len(lines) and lines[at + 1].startswith("    "):
                at += 1
            text = "\n".join(line[4:] for line in lines[start : at + 1])
            found.append(Block(path.name, start + 1, "shell", text))
        at += 1
    return found


def commands_of(block: Block) -> list[str]:
    return [line for line in re.sub(r"\\\n", " ", block.text).splitlines() if shlex.split(line, comments=True)]


def dependencies() -> set[str]:
    listed = re.findall(r'^ +"([\w-]+)|^\w+ = \["([\w-]+)', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    return {name for pair in listed for name in pair if name} | {"."}


def check_unrun(words: list[str]) -> bool:
    """Whether a command is one that is not run here; then that what it names is there."""
    text = " ".join(words)
    first = next((start for start in NOT_RUN if text.startswith(start)), None)
    if first is None:
        return False
    if first == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert [word for word in words[1:] if "=" not in word and word not in targets] == [], text
    elif first == "pip install":
        named = [re.split(r"[\[<>=]", word)[0] for word in words[2:] if not word.startswith("-")]
        assert [name for name in named if name not in dependencies() | {"maskdiff"}] == [], text
    elif "benchmarks/" in first:
        (script,) = (word for word in words if word.startswith("benchmarks/"))
        assert (ROOT / script).is_file(), text
    return True


def run_command(line: str) -> None:
    words = shlex.split(line, comments=True)
    if check_unrun(words):
        return
    words = [PLACEHOLDERS.get(word, word) for word in words if PLACEHOLDERS.get(word, word)]
    words, out = (words[: words.index(">")], words[-1]) if ">" in words else (words, None)
    if words[0] == "maskdiff":
        words = ["python", "-m", f"maskdiff.{words[1]}", *words[2:]]
    assert words[:2] == ["python", "-m"], f"{line!r}: say in test_docs.py how it is run, or in NOT_RUN why it is not"
    command = words[2].removeprefix("maskdiff.")
    short = "resume" if "--resume" in words else command
    more = TINY.get(short, "") + (" --count 4" if command == "sample" and "--count" in words else "")
    if short in ("train", "sweep") and not {"--data", "--config", "--report"} & set(words):
        more += " --data faces:100"
    if Path(words[3] if len(words) > 3 else "").name in PLANNED:
        more += " --dry-run"
    if "--print-config" in words or "--help" in words or "list" in words:
        more = more.replace(TINY["train"], "")
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        patch.setattr(sys, "argv", [command, *words[3:], *more.split()])
        if out is not None:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(out, "w"))))
        importlib.import_module(words[2]).main()


def run_block(block: Block, namespace: dict[str, object]) -> None:
    try:
        if block.kind == "python":
            exec(compile(block.text, f"{block.page}:{block.line}", "exec"), namespace)
        elif block.kind == "shell":
            for line in commands_of(block):
                run_command(line)
    except (Exception, SystemExit) as error:
        raise AssertionError(f"{block.page}, line {block.line}: {type(error).__name__}: {error}") from error


@contextlib.contextmanager
def inside(folder: Path):
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield folder
    finally:
        os.chdir(before)


def pictures(folder: Path, count: int = 24) -> None:
    """Soft, coloured, all different, in two sub-folders."""
    down, across = np.mgrid[0:72, 0:72] / 72
    for number in range(count):
        file = folder / ("cats", "dogs")[number % 2] / f"{number:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        waves = [np.sin(2 * np.pi * (down * (number % 5) + across * (number % 7)) + channel) for channel in range(3)]
        Image.fromarray(np.uint8(127 + 100 * np.stack(waves, 2) * (0.5 + number / count / 2))).save(file)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    from test_pretrained import authors_state, save

    folder = tmp_path_factory.mktemp("reader") / "workspace"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASKDIFF_CACHE", str(folder.parent / "cache"))
        pictures(folder / "photos")
        with tarfile.open(folder / "photos.tar", "w") as archive:
            archive.add(folder / "photos", ".")
        save(folder / "checkpoint.pt", authors_state(1), authors_state(2))
        with inside(folder):
            run_command("python -m maskdiff.train --data faces:100 --out runs/first")
        yield folder


@pytest.fixture(scope="module")
def after_readme(workspace):
    """What README's commands left, and what its Python defined."""
    namespace: dict[str, object] = {}
    torch.manual_seed(0)
    with inside(workspace):
        for block in blocks_of(ROOT / "README.md"):
            run_block(block, namespace)
    return namespace


def test_the_readme_runs(after_readme, workspace):
    assert (workspace / "grid.png").is_file() and (workspace / "packed" / "photos").is_dir()


def test_the_readers_own_vit_learns(after_readme):
    """The section takes 40 lines at most, and its model ends below the loss of predicting nothing."""
    section = (ROOT / "README.md").read_text().split("## Masked pre-training of your own model")[1].split("\n## ")[0]
    assert len(section.strip().splitlines()) + 1 <= 40
    first = after_readme["denoising_loss"](
        torch.zeros(64, 16, 48),
        after_readme["packed"].store,
        *(after_readme[name] for name in ("batch", "table", "seed")),
        target="v",
    )[0]
    assert after_readme["loss"] < 0.9 * first


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_a_page_runs(path, after_readme, workspace, tmp_path, monkeypatch):
    blocks = [block for block in blocks_of(path) if block.kind in ("python", "shell")]
    if not blocks:
        return
    folder = tmp_path / "workspace"
    shutil.copytree(workspace, folder)
    if path.name == "reproduce.md":
        public_archives.write(folder)
    monkeypatch.setattr(training, "HELDOUT_SAMPLES", 8)
    namespace: dict[str, object] = {}
    with inside(folder):
        for block in blocks:
            run_block(block, namespace)


def test_every_block_is_of_a_kind_that_is_run():
    """What is fenced without a language is output, and holds no command."""
    for block in [block for path in (ROOT / "README.md", *DOCS) for block in blocks_of(path)]:
        assert block.kind in ("", "python", "shell"), f"{block.page}, line {block.line}: a block of {block.kind!r}"
        if not block.kind:
            hidden = [line for line in block.text.splitlines() if re.match(r"(\$ )?(python|pip|make|maskdiff) ", line)]
            assert not hidden, f"{block.page}, line {block.line}: mark it as ```sh: {hidden[0]}"


# ---- pages that follow from the code


@pytest.mark.parametrize("name", pages.PAGES)
def test_generated_pages_are_up_to_date(name):
    """`python tests/pages.py --write` where keys or public names changed: look at what changes."""
    assert pages.on_page((pages.DOCS / name).read_text()) == pages.PAGES[name]()


def test_docs_import_public_names_alone():
    public = {(module, name) for module in pages.PUBLIC for name in pages.names_of(module)}
    public |= {tuple(module.rsplit(".", 1)) for module in pages.PUBLIC if "." in module}
    for block in [block for path in (ROOT / "README.md", *DOCS) for block in blocks_of(path)]:
        if block.kind != "python":
            continue
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("maskdiff"):
                wrong = [alias.name for alias in node.names if (node.module, alias.name) not in public]
                assert not wrong, f"{block.page}: {node.module}.{wrong[0]} is not in tests/pages.py"


def test_packages_say_what_they_define():
    """What `maskdiff` and `maskdiff_kernels` give is in their __all__."""
    for module in ("maskdiff", "maskdiff_kernels"):
        assert sorted(pages.names_of(module)) == sorted(importlib.import_module(module).__all__)


def test_the_stages_of_the_page_are_those_that_are_read():
    page = (ROOT / "docs" / "configuration.md").read_text()
    words = [
        word for cell in re.findall(r"^\| (`.*?) \|", page, re.MULTILINE) for word in re.findall(r"`([^`]*)`", cell)
    ]
    for word in [word for word in words if stages._match(word) or stages._is_mask(word)]:
        length = "" if re.fullmatch(r"x\d+|[\d.]+[mh]", word) else "x1"
        assert stages.parse_stages(f"{word} {length}" if stages._is_mask(word) else f"dense {word} {length}")
    assert {found[0] for word in words if (found := stages._match(word))} == set(stages._EXAMPLES)


def test_the_method_names_every_choice():
    page = (ROOT / "docs" / "method.md").read_text()
    for word in (*SCHEDULES, *TARGETS, "min_snr", "v_loss", "patch:r", "block4:r", "crop5", "dense"):
        assert f"`{word}`" in page, word
    shown = page.split("$$")[1::2]  # GitHub may take a backslash before punctuation for Markdown's own
    assert len(shown) >= 6 and page.count("$$") % 2 == 0 and not re.search(r"\\[^A-Za-z]", "".join(shown))
    preset = presets.get("celeba64")
    assert [stage.batch for stage in preset.stages] == [256, 128] and preset.optim.weight_decay == 0.03
