"""maskdiff.transfer: pre-trained elsewhere against from scratch in the same time, on shares of the target's images."""

import json
import sys
from pathlib import Path

import pytest
import torch

from maskdiff import data, training, transfer
from maskdiff.errors import UserError
from maskdiff.study import asked as asking
from maskdiff.study import cells, study
from maskdiff.study.clock import Times

TINY = ["--preset", "faces32", "--data.no-labels", "--guidance", "1", "--model.width", "32", "--model.heads", "1"]
TINY += ["--model.blocks", "1"]
SHORT = ["--seconds", "0.3s", "--count", "12", "--points", "1", "--steps", "2", "--rounds", "3"]


def command(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    """Without the report, whose tests are elsewhere; docs/reproduce.md is run with it."""
    monkeypatch.setattr(asking, "_report", lambda path: None)
    monkeypatch.setattr(training, "HELDOUT_SAMPLES", 16)
    monkeypatch.setattr(sys, "argv", ["transfer", *map(str, words)])
    transfer.main()


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[str, data.PackedSet]:
    """A small set to pre-train on, of smaller images than the target's."""
    cache = tmp_path_factory.mktemp("sets")
    made = {"faces:120": 16, "faces-b:160": 24}
    return {spec: data.prepare(spec, size, 4, cache=cache, heldout=0.2) for spec, size in made.items()}


@pytest.fixture(scope="module")
def asked(sets) -> list[str]:
    source, target = (str(packed.path) for packed in sets.values())
    return ["--sources", source, "--target", target, "--shares", "1,0.1", "--weights", "ema", "--free", *SHORT, *TINY]


@pytest.fixture(scope="module")
def started() -> list[tuple[str, str, int]]:
    """What every run of the study was started from: path, weights, size."""
    return []


@pytest.fixture(scope="module")
def finished(tmp_path_factory, asked, started) -> Path:
    path, initial = tmp_path_factory.mktemp("transfer") / "study", training.initial_weights

    def noted(init, weights, config, say):
        started.append((init, weights, config.image_size))
        return initial(init, weights, config, say)

    def clocked(config, packed, masks, tokens, sampler, extractor, rounds, others):
        rows = [{"mask": mask, "batch": 1, "p20": 6.25, "p50": 6.25, "p80": 6.25} for mask in masks]
        return Times({}, None, config.precision, rounds, rows, sampling_images_per_s=20.0, features_images_per_s=30.0)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(training, "initial_weights", noted)
        monkeypatch.setattr(transfer.clock, "measured", clocked)  # steps as many as on any machine
        command(monkeypatch, path, *asked)
    return path


def rows_of(path: Path, cell: dict) -> list[dict]:
    return json.loads(cells.result_path(path, cell).read_text())["rows"]


def test_pre_trained_and_from_scratch_take_the_same_time(finished, sets):
    made = study.read(finished)
    (first,) = made["pretraining"]
    (stage,) = first["stages"]
    assert (stage["mask"], stage["batch"]) == ("patch:0.75", 16 * 37 // 5) and first["target"] in made["data"]
    assert made["data"][first["target"]]["train"] == len(sets["faces:120"].train_ids)
    assert len(made["cells"]) == 6 == len({cell["group"] for cell in made["cells"]})
    for cell in made["cells"]:
        rows, tuned = rows_of(finished, cell), cell["source"] is not None
        short = "fine-tuning's time" in cell["group"]
        assert rows[-1]["seconds"] == pytest.approx(0.15 if short else 0.3)
        assert cell["baseline"] == (not tuned and not short) and rows[-1]["scores"]["count"] == 12
        own = sum(part["steps"] * part["batch"] for part in cell["stages"])
        assert rows[-1]["images"] == own + (stage["steps"] * stage["batch"] if tuned else 0)
        if tuned:
            assert cell["pretrain"] == first["name"] and cell["before"]["seconds"] == stage["seconds"]
            assert stage["seconds"] < rows[0]["seconds"] < rows[-1]["seconds"]
    assert not list(finished.glob("work/*/checkpoints")), "weights are not kept"
    assert (finished / "real.png").exists() and (finished / "cells" / f"{cell['name']}.png").exists()
    assert list(made["real_frechets"].values()) == [made["real_frechet"]]


def test_what_a_cell_starts_from_and_sees(finished, started, sets):
    made = study.read(finished)
    setup, target = transfer._setup(finished, made), sets["faces-b:160"]
    end = f"work/{made['pretraining'][0]['name']}/checkpoints/step-"
    assert [(weights, size) for _, weights, size in started] == [("ema", 24)] * 2  # positions of 16 pixels before
    assert all(end in path for path, _, _ in started)
    for cell in made["cells"]:
        config, judge = setup(cell)
        packed = study.packed_of(config)
        assert len(packed.train_ids) == round(cell["share"] * len(target.train_ids))
        assert torch.equal(packed.heldout_ids, target.heldout_ids)
        assert (config.init is not None) == (cell["source"] is not None) and judge.count == 12


def test_weights_that_are_gone_are_trained_again_to_the_same_figures(finished, monkeypatch):
    made = study.read(finished)
    cell = next(cell for cell in made["cells"] if cell["source"] is not None)
    before, when = rows_of(finished, cell), cells.result_path(finished, made["cells"][0]).stat().st_mtime_ns
    cells.result_path(finished, cell).unlink()
    command(monkeypatch, finished)
    assert rows_of(finished, cell) == before
    assert cells.result_path(finished, made["cells"][0]).stat().st_mtime_ns == when


def test_later_commands_add_cells(finished, sets, monkeypatch, capsys):
    command(monkeypatch, finished, "--seeds", "2", "--shares", "1,0.1,0.01", "--dry-run")
    assert "2 pre-trainings, 18 cells: " in capsys.readouterr().out
    both = [str(packed.path) for packed in sets.values()]
    with pytest.raises(UserError, match="begun with another count: 12, not 13"):
        command(monkeypatch, finished, "--count", "13", "--dry-run")
    command(monkeypatch, finished, "--sets", *both, "--shares", "1", "--rounds", "3", "--dry-run")
    said = capsys.readouterr().out
    assert "2 pre-trainings, 9 cells: " in said and "patch:0.75 at 16 px" in said and "dense at 16 px" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sources", "faces:120"], "say from where to where: --sources A B --target C"),
        (["--sources", "faces:120", "--target", "faces:120"], "all different"),
        (["--sets", "faces:120", "faces-b:120", "--finetune", "1"], "--finetune is below 1"),
        (["--sets", "faces:120", "faces-b:120", "--shares", "1,0"], "take shares above 0"),
        (["--sets", "faces:120", "faces-b:120", "--data.subset", "9"], "data.subset: --shares says"),
        (["--sets", "faces:120", "faces-b:120", "--init", "run"], "init is run: cells start from .* --init none"),
        (["--sets", "faces:120", "faces-b:120", "--model.channels", "1"], "channels"),
        (["--sets", "faces:120", "faces-b:120", "--weigths", "ema"], "--weigths"),
        (["--sets", "faces:120", "absent.zip"], "absent.zip"),
    ],
)
def test_what_cannot_be_meant(words, message, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=message):
        command(monkeypatch, tmp_path / "study", *words, *SHORT, *TINY)
    assert not (tmp_path / "study").exists()
