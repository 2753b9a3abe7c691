"""Bad input to the commands: one clear line that says what to do, no traceback, exit status 2, nothing lost."""

import json
import os
import pickle
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maskdiff import checkpoint, precision, sample, train
from maskdiff.errors import run_command

TINY = shlex.split(
    "--stages 'patch:0.75 x2 b16 lr1e-3, dense x2 b4 lr1e-3' --model.width 16 --model.heads 1 --model.blocks 3 "
    "--probe-steps 1 --checkpoint-every 1 --keep-checkpoints 9 --heldout-every 0 --sample-count 0 "
    "--device cpu --precision fp32"
)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASKDIFF_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def fails(capfd, monkeypatch):
    """Runs the command in this process; gives the one line that it ends with."""

    def fails(*argv, command=train.main) -> str:
        monkeypatch.setattr(sys, "argv", ["maskdiff", *map(str, argv)])
        with pytest.raises(SystemExit) as ended:
            run_command(command)
        return the_error(ended.value.code, capfd.readouterr().err)

    return fails


def the_error(status: int, stderr: str) -> str:
    assert status == 2
    assert "Traceback" not in stderr
    lines = [line for line in stderr.splitlines() if "error: " in line]
    assert len(lines) == 1 and lines[0].startswith("error: ") and stderr.endswith(lines[0] + "\n"), stderr
    return lines[0]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """A folder of a few pictures."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for number in range(24):
        Image.fromarray(random.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory, images, cache) -> Path:
    """A run that is over."""
    run = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sys, "argv", ["maskdiff train", "--preset", "emoji32", "--data", str(images), "--out", str(run), *TINY]
        )
        train.main()
    return run


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of that run, to be spoiled."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ---- the command line


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--preset", "face32"], ["no preset 'face32'", "did you mean 'faces32'?"]),
        (["--model.widht", "64"], ["no option --model.widht", "did you mean --model.width?"]),
        (
            ["--stages", "patch:0.75 x100 b64 cosin"],
            ["stage 1 (--stages.0)", "'cosin' (character 21)", "did you mean 'cosine'?"],
        ),
        (["--mask.rate", "0.001"], ["8 x 8", "hides nothing", "the nearest rates that work are 0 (dense) and 0.02"]),
        (["--mask.rate", "1"], ["hides everything", "the nearest rate that works is 0.99"]),
        (["--mask.kind", "block3"], ["8 x 8", "3 does not divide it", "use block2 or block4"]),
        (["--stages", "block2:0.5-0.9 x9 b1"], ["a range of rates", "give b16 or more", "such as block2:0.7"]),
        (["--model.image-size", "30"], ["30", "patches of 4", "choose a patch size that divides 30"]),
        (["--preset", "emoji32"], ["has no images of its own", "--data"]),
        (["--resume", "absent"], ["no run", "no such folder", "--out"]),
    ],
)
def test_command_line(fails, tmp_path, argv, words):
    message = fails(*argv, "--out", "new") if "--resume" not in argv else fails(*argv)
    for word in words:
        assert word in message
    assert list(tmp_path.iterdir()) == []


def test_unknown_key_of_a_file(fails, tmp_path):
    (tmp_path / "c.json").write_text('{"optim": {"weight_deccay": 0.1}}')
    assert "c.json: no key 'optim.weight_deccay'; did you mean 'optim.weight_decay'?" in fails("--config", "c.json")


def test_real_process():
    """As a user runs it: the exit status and nothing but the line."""
    command = [sys.executable, "-m", "maskdiff.train", "--preset", "face32"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.stdout == "" and ended.stderr == the_error(ended.returncode, ended.stderr) + "\n"


# ---- data


def test_missing_data(fails):
    assert "no data at 'absent'" in fails("--preset", "emoji32", "--data", "absent")


def test_empty_data(fails, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no picture in the folder" in fails("--preset", "emoji32", "--data", "empty")
    (tmp_path / "empty.zip").touch()
    assert "empty.zip' is an empty file; give a folder, zip or tar" in fails(
        "--preset", "emoji32", "--data", "empty.zip"
    )


def test_unreadable_data(fails, tmp_path):
    (tmp_path / "a.zip").write_bytes(b"PK\3\4" + bytes(100))
    assert "'a.zip' is not a readable zip" in fails("--preset", "emoji32", "--data", "a.zip")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_forbidden_data(fails, tmp_path):
    (tmp_path / "forbidden").mkdir(mode=0)
    assert "cannot read the folder 'forbidden'" in fails("--preset", "emoji32", "--data", "forbidden")


def test_broken_images_only(fails, tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/text.png").write_text("not a picture")
    (tmp_path / "broken/empty.jpg").touch()
    with zipfile.ZipFile(tmp_path / "broken.zip", "w") as archive:
        archive.writestr("a.png", b"\x89PNG\r\n\x1a\n" + bytes(20))
    for data in ("broken", "broken.zip"):
        message = fails("--preset", "emoji32", "--data", data, "--out", "new")
        assert f"'{data}'" in message and "usable" in message
    assert not (tmp_path / "new").exists()


def test_labels_of_unlabelled_data(fails, images):
    message = fails("--preset", "emoji32", "--data", images, "--data.labels", "--out", "new")
    assert "has no labels" in message and "--data.no-labels" in message


def test_labels_of_an_unlabelled_model(fails, run, tmp_path):
    message = fails("run", "--labels", "smile", "--out", "new.png", command=sample.main)
    assert "without labels" in message and "--labels" in message
    assert not (tmp_path / "new.png").exists()


def test_channels_that_the_data_does_not_have(fails, images):
    message = fails("--preset", "emoji32", "--data", images, "--model.channels", "1", "--out", "new")
    assert "--model.channels 3" in message


@pytest.fixture
def packed(trained, tmp_path) -> Path:
    """A copy of the packed set that the run was trained on."""
    folder = next(Path(os.environ["MASKDIFF_CACHE"]).glob("images*px-p4-*"))
    return Path(shutil.copytree(folder, tmp_path / "packed"))


def test_packed_set_of_another_patch(fails, packed):
    message = fails("--preset", "emoji32", "--data", packed, "--model.patch", "8")
    assert "packed with patch 4, the model wants 8" in message


def test_packed_set_of_another_version(fails, packed):
    manifest = json.loads((packed / "manifest.json").read_text())
    (packed / "manifest.json").write_text(json.dumps(manifest | {"version": 99}))
    message = fails("--preset", "emoji32", "--data", packed)
    assert "version 99" in message and "pack the images again" in message


# ---- runs and checkpoints


def test_existing_run(fails, run, images):
    before = content(run)
    message = fails("--preset", "emoji32", "--data", images, "--out", "run")
    assert "run exists" in message and "--resume run" in message and "--out" in message
    assert content(run) == before


def test_resume_of_what_is_no_run(fails, images):
    assert "no run, it has no config.json" in fails("--resume", images)


def test_resume_of_another_configuration(fails, run):
    before = content(run)
    message = fails("--resume", "run", "--seed", "5", "--stages.1.lr", "0.1")
    assert "seed (is 0, got 5)" in message and "stages.1.lr (is 0.001, got 0.1)" in message
    assert content(run) == before


def test_resume_on_other_images(fails, run):
    assert "not those that run was trained on" in fails("--resume", "run", "--data", "faces:30")


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    middle = len(data) // 2
    if how == "truncated":
        path.write_bytes(data[:middle])
    elif how == "altered":
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    else:
        path.write_bytes(b"something else")


@pytest.mark.parametrize("how", ["truncated", "altered", "foreign"])
@pytest.mark.parametrize("file", ["state.safetensors", "meta.json"])
def test_spoiled_checkpoint(fails, run, how, file):
    damage(checkpoint.latest(run) / file, how)
    before = content(run)
    message = fails("--resume", "run", "--max-steps", "9")
    assert str(checkpoint.latest(run).name) in message and file in message and "earlier checkpoint" in message
    assert content(run) == before
    assert file in fails("--preset", "emoji32", "--data", "faces:30", "--init", run, "--out", "new")


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_pickle_with_code_in_it(fails, tmp_path, images, writer):
    bomb = {"step": 1, "model": {"w": torch.zeros(1), "x": Evil(tmp_path / "executed")}}
    if writer == "torch":
        torch.save(bomb, tmp_path / "evil.pt")
    else:
        (tmp_path / "evil.pt").write_bytes(pickle.dumps(bomb))
    message = fails("--preset", "emoji32", "--data", images, "--init", "evil.pt", "--out", "new")
    assert "evil.pt" in message
    assert not (tmp_path / "executed").exists() and not (tmp_path / "new").exists()


def test_foreign_weights(fails, tmp_path, images):
    def start(init):
        return fails("--preset", "emoji32", "--data", images, "--out", "new", *TINY, "--init", init)

    assert "absent.pt" in start("absent.pt")
    (tmp_path / "text.pt").write_text("not weights")
    assert "text.pt" in start("text.pt")
    torch.save({"state_dict": {"conv.weight": torch.zeros(3)}}, tmp_path / "other.pt")
    assert "other.pt" in start("other.pt")
    assert not (tmp_path / "new").exists()


def test_weights_of_another_shape(fails, run, images):
    message = fails(
        "--preset", "emoji32", "--data", images, "--out", "new", *TINY, "--model.width", "32", "--init", "run"
    )
    assert "run" in message and "16" in message and "32" in message


# ---- the machine


def test_bf16_on_a_processor_without_it(fails, monkeypatch, tmp_path):
    monkeypatch.setattr(precision, "has_native_bf16", lambda device: False)
    message = fails("--precision", "bf16", "--device", "cpu", "--out", "new")
    assert "no bf16" in message and "--precision fp32" in message
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="takes a machine without CUDA")
def test_cuda_where_there_is_none(fails):
    assert "--device cpu" in fails("--device", "cuda")


STALE_LIBRARY = """
from maskdiff import train
from maskdiff.errors import run_command
from maskdiff_kernels import library
library.expected_version = lambda: "of-other-sources"
run_command(train.main)
"""


def test_stale_library(images):
    argv = ["--preset", "emoji32", "--data", images, "--out", "new", *TINY]
    ended = subprocess.run([sys.executable, "-c", STALE_LIBRARY, *argv], capture_output=True, text=True)
    message = the_error(ended.returncode, ended.stderr)
    assert "is stale" in message and "of-other-sources" in message and "pip install" in message


FULL_DISK = """
import resource, sys
from maskdiff import train
from maskdiff.errors import run_command
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, 1 << 14))  # no file over 16 KiB: writes fail as on a full disk
run_command(train.main)
"""


def test_full_disk(run):
    """Of a run that goes on: its earlier checkpoints stay, and it can go on once there is room."""
    before = content(run / "checkpoints")
    command = [sys.executable, "-c", FULL_DISK, "--resume", "run", "--stages.1.steps", "3"]
    ended = subprocess.run(command, capture_output=True, text=True)
    message = the_error(ended.returncode, ended.stderr)
    assert "checkpoint not written, the earlier ones are kept" in message
    assert content(run / "checkpoints") == before


def test_compile_without_a_compiler(fails):
    torch._dynamo.reset()
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}), torch._inductor.utils.fresh_cache():
        line = fails(*TINY, "--out", "run", "--compile")
    assert "--compile" in line and "C++ compiler" in line and "no-such-compiler" in line
    assert not Path("run").exists()


def test_kernels_that_an_op_does_not_have(fails, monkeypatch):
    monkeypatch.setenv("MASKDIFF_KERNELS", "sdpa")
    line = fails(*TINY, "--out", "run")
    assert line.startswith("error: MASKDIFF_KERNELS: got 'sdpa'") and "takes auto or one of" in line
    assert not Path("run").exists()
