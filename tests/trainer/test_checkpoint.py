"""Checkpoints: round trip, every kind of damage found, nothing lost when the disk refuses."""

import json
import subprocess
import sys

import pytest
import torch

from maskdiff import checkpoint
from maskdiff.errors import UserError


@pytest.fixture
def run(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, {"master.w": torch.full((1000,), float(step))}, {"sample": 8 * step}, keep=2)
    return tmp_path


def test_round_trip_keeps_the_newest(run):
    assert [path.name for path in checkpoint.listing(run)] == ["step-00000002", "step-00000003"]
    tensors, meta = checkpoint.load(checkpoint.latest(run))
    assert torch.equal(tensors["master.w"], torch.full((1000,), 3.0))
    assert (meta["step"], meta["sample"]) == (3, 24)


def test_keep_zero_keeps_all(tmp_path):
    for step in range(4):
        checkpoint.save(tmp_path, step, {"w": torch.zeros(1)}, {}, keep=0)
    assert len(checkpoint.listing(tmp_path)) == 4


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("state.safetensors", lambda b: b[:-8], "truncated or altered"),
        ("state.safetensors", lambda b: b[:-1] + bytes([b[-1] ^ 1]), "truncated or altered"),
        ("meta.json", lambda b: b[: len(b) // 2], "not JSON"),
        ("meta.json", lambda b: b.replace(b'"sample": 24', b'"sample": 25'), "altered"),
        ("meta.json", lambda b: b.replace(b'"format": 1', b'"format": 9'), "format 9"),
        ("meta.json", lambda b: b"[]", "not JSON"),
    ],
)
def test_damage_is_found(run, file, damage, message):
    path = checkpoint.latest(run) / file
    before = path.read_bytes()
    assert damage(before) != before
    path.write_bytes(damage(before))
    with pytest.raises(UserError, match=message):
        checkpoint.load(checkpoint.latest(run))


def test_missing_files_are_named(run, tmp_path_factory):
    newest = checkpoint.latest(run)
    (newest / "state.safetensors").unlink()
    with pytest.raises(UserError, match="missing"):
        checkpoint.load(newest)
    (newest / "meta.json").unlink()
    with pytest.raises(UserError, match="no checkpoint"):
        checkpoint.load(newest)
    with pytest.raises(UserError, match="no run"):
        checkpoint.latest(tmp_path_factory.mktemp("other"))


REFUSING_DISK = """
import resource, signal, sys, torch
from pathlib import Path
from maskdiff import checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))  # no file over 64 KiB: writes fail as on a full disk
try:
    checkpoint.save(Path(sys.argv[1]), 4, {"w": torch.zeros(1 << 16)}, {}, keep=1)
except OSError as error:
    print("refused:", error.strerror)
"""


def test_a_disk_that_refuses_loses_nothing(run):
    result = subprocess.run([sys.executable, "-c", REFUSING_DISK, run], capture_output=True, text=True, check=True)
    assert "refused: checkpoint not written, the earlier ones are kept" in result.stdout, result.stderr
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000002", "step-00000003"]
    assert checkpoint.load(checkpoint.latest(run))[1]["step"] == 3


def test_meta_is_readable_json_with_the_hash_of_every_file(run):
    newest = checkpoint.latest(run)
    meta = json.loads((newest / "meta.json").read_text())
    assert set(meta["files"]) == {path.name for path in newest.iterdir()} - {"meta.json"}
