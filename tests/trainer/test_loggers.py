"""TensorBoard and Weights & Biases beside metrics.jsonl: what they are told, once each, across broken runs."""

import dataclasses
import json
import os
import shutil
import struct
import sys
from typing import get_args, get_type_hints

import pytest

from maskdiff import checkpoint, loggers, training
from maskdiff.config import Config
from maskdiff.errors import UserError
from maskdiff.options import parse
from maskdiff.runlog import MetricsFile, is_training

STAGES = "patch:0.5-0.8 x8 b16 lr2e-3, dense x6 b8 lr1e-3"
BROKEN = 9  # the step to which a run came that was then killed: its last checkpoint is older


@pytest.fixture(scope="module", autouse=True)
def surroundings(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASKDIFF_CACHE", str(tmp_path_factory.mktemp("cache")))
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            patch.delenv(name)
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        yield


def tiny(out, *more: str) -> Config:
    argv = ["--data", "faces:100", "--stages", STAGES, "--precision", "fp32", "--device", "cpu", "--probe-steps", "1"]
    argv += ["--model.width", "32", "--model.blocks", "3", "--model.heads", "1", "--heldout-every", "7"]
    argv += ["--sample-count", "4", "--sample-steps", "2", "--sample-every", "5", "--log-every", "2", "--guidance", "1"]
    return dataclasses.replace(parse([*argv, *more]).config, out=str(out))


def rows(run):
    return {row["step"]: row for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())}


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A run that was killed between two checkpoints, twice, with both loggers: 5 steps, then to 9, then to the end."""
    pytest.importorskip("tensorboard")
    pytest.importorskip("wandb")
    out = tmp_path_factory.mktemp("logged") / "run"
    config = tiny(out, "--log", "tensorboard", "wandb")
    training.run(dataclasses.replace(config, max_steps=5))
    for end in (7, BROKEN):
        training.run(dataclasses.replace(config, max_steps=end), resume=True)
        shutil.rmtree(checkpoint.latest(out))
    training.run(config, resume=True)
    return out


def expected(run):
    """{name: {step: value}} of what loggers are to have: every second step, and those of the held-out loss."""
    found = {}
    for step, row in rows(run).items():
        if step % 2 and step != 7:
            continue
        values = {f"loss/{'1_patch_0.5-0.8' if step <= 8 else '2_dense'}": row["loss"], "train/lr": row["lr"]}
        values |= {"train/grad_norm": row["grad_norm"], "train/images_seen": row["images_seen"]}
        values |= {"train/skipped_steps": 0} | {f"loss_by_rate/{k}": v for k, v in row.get("loss_by_rate", {}).items()}
        values |= {"loss/heldout": row["heldout_loss"]} if "heldout_loss" in row else {}
        for name, value in values.items():
            found.setdefault(name, {})[step] = pytest.approx(value, rel=1e-6)
    return found


def test_tensorboard_shows_every_figure_of_a_broken_run_once(broken):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(broken / "tensorboard"), size_guidance={"scalars": 0, "images": 0}).Reload()
    shown = {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
    speeds = {name: shown.pop(name) for name in ("speed/images_per_s", "speed/retained")}
    assert {name: dict(values) for name, values in shown.items()} == expected(broken)
    assert all(len(dict(values)) == len(values) for values in shown.values())
    log = rows(broken)
    assert dict(speeds["speed/images_per_s"])[12] == pytest.approx(8 / (log[12]["step_ms"] / 1e3), rel=1e-6)
    assert dict(speeds["speed/retained"])[8] == pytest.approx(log[8]["retained"], rel=1e-6)
    assert [event.step for event in events.Images("samples")] == [5, 10, 14]
    assert (events.Images("samples")[0].width, events.Images("samples")[0].height) == (140, 260)  # captions below


def records(path):
    """What a .wandb file holds: LevelDB's log format (blocks of 32 KiB; CRC, length and part before each piece)."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, part = struct.unpack("<HB", data[at + 4 : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if part in (1, 4):  # a whole one, the last piece of one
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def test_wandb_is_told_every_figure_of_a_broken_run_once(broken):
    ids, shown, pictures = set(), {}, []
    for file in sorted(broken.glob("wandb/offline-run-*/*.wandb")):
        for record in records(file):
            if record.HasField("run"):
                ids.add(record.run.run_id)
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            if "samples/path" in items:
                pictures.append(items["_step"])
            for name, value in items.items():
                if "/" in name and not name.startswith(("speed/", "samples/")):
                    assert items["_step"] not in shown.setdefault(name, {}), (name, items["_step"])
                    shown[name][items["_step"]] = value
    assert ids == {(broken / "wandb.id").read_text().strip()}
    assert shown == expected(broken)
    assert pictures == [5, 7, BROKEN, 10, 14]  # the ends of the broken runs among them


@pytest.mark.parametrize(("name", "module"), [("tensorboard", "tensorboard"), ("wandb", "wandb")])
def test_a_missing_package_is_said_before_data_are_made_ready(name, module, tmp_path, monkeypatch):
    for loaded in [loaded for loaded in sys.modules if loaded.split(".")[0] == module or "utils.tensorboard" in loaded]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(training.data, "prepare", None)
    with pytest.raises(UserError, match=f"--log {name} needs .*pip install {name} "):
        training.run(tiny(tmp_path / "run", "--log", name))
    assert not (tmp_path / "run").exists()


def test_a_logger_that_cannot_start_leaves_the_run_untouched(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")

    def refuse(**options):
        raise wandb.Error("no API key")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(UserError, match="--log wandb: no API key; .*WANDB_MODE=offline"):
        training.run(tiny(tmp_path / "run", "--log", "wandb"))
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == "" and not is_training(tmp_path / "run")


def test_a_run_is_trained_by_one_process(tmp_path):
    first = MetricsFile(tmp_path / "metrics.jsonl", 0)
    assert is_training(tmp_path)
    first.write({"step": 1})
    with pytest.raises(UserError, match="is being trained by another process"):
        MetricsFile(tmp_path / "metrics.jsonl", 0)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
    first.close()
    assert not is_training(tmp_path)


def test_every_logger_can_be_asked_for():
    (choice, _) = get_args(get_type_hints(Config)["log"])
    assert set(get_args(choice)) == set(loggers.LOGGERS)
