"""The run as a whole, on a tiny model: resume bit for bit, signals, stages, logs, errors that lose nothing."""

import dataclasses
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

from maskdiff import capture, checkpoint, flops, train, training
from maskdiff.config import Config, ModelConfig, config_to_dict, load_config
from maskdiff.data import prepare
from maskdiff.errors import UserError
from maskdiff.options import parse

STAGES = "patch:0.75 x8 b16 lr2e-3 w4 c1.0 cosine, dense x6 b8 lr1e-3 w0 c1.0 const fresh"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASKDIFF_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def tiny(out, *more: str) -> Config:
    argv = ["--data", "faces:200", "--stages", STAGES, "--precision", "fp32", "--device", "cpu"]
    argv += ["--model.width", "32", "--model.blocks", "3", "--model.heads", "2", "--probe-steps", "1"]
    argv += ["--checkpoint-every", "5", "--heldout-every", "7", "--sample-every", "0", "--sample-count", "0"]
    return dataclasses.replace(parse([*argv, *more]).config, out=str(out))


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def exact(run):
    """What must be the same bit for bit in a broken and an unbroken run: all but the times."""
    timed = ("step_ms", "train_s", "retained")
    return [{key: value for key, value in row.items() if key not in timed} for row in rows(run)]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, cache):
    out = tmp_path_factory.mktemp("unbroken") / "run"
    training.run(tiny(out))
    return out


def test_log_has_an_object_a_step(unbroken):
    log = rows(unbroken)
    assert [row["step"] for row in log] == list(range(1, 15))
    assert [row["stage"] for row in log] == [0] * 8 + [1] * 6
    assert [row["images_seen"] for row in log] == [16 * k for k in range(1, 9)] + [128 + 8 * k for k in range(1, 7)]
    extras = 2  # the time token and the label token
    assert log[7]["tokens"] == 8 * 16 * (16 + extras) and log[-1]["tokens"] - log[7]["tokens"] == 6 * 8 * (64 + extras)
    assert all(a["flops"] < b["flops"] and a["train_s"] < b["train_s"] for a, b in zip(log, log[1:], strict=False))
    assert [row["step"] for row in log if "heldout_loss" in row] == [7, 14]
    assert log[0]["lr"] == pytest.approx(2e-3 / 4) and log[-1]["lr"] == 1e-3
    keys = "step stage loss images_seen tokens flops step_ms train_s lr grad_norm skipped".split()
    assert all(set(keys) <= row.keys() for row in log)


def test_stage_plan_tells_speed_and_ideal(unbroken):
    plans = json.loads((unbroken / "plans.json").read_text())
    assert plans["0"]["effective_rate"] == 0.75 and plans["0"]["ideal"] > 3 and plans["0"]["dense_ms"] > 0
    assert plans["1"]["ideal"] == 1 and plans["1"]["speedup"] == 1 and plans["1"]["retained"] is None
    assert plans["0"]["retained"] == pytest.approx(plans["0"]["speedup"] / plans["0"]["ideal"])


def test_the_log_has_the_retained_share_of_masked_steps(unbroken):
    plan, log = json.loads((unbroken / "plans.json").read_text())["0"], rows(unbroken)
    for row in log[:8]:
        assert row["retained"] == pytest.approx(plan["dense_ms"] / row["step_ms"] / plan["ideal"], abs=1e-3)
    assert all("retained" not in row for row in log[8:])


def test_a_masked_stage_says_its_speed(tmp_path, capsys):
    training.run(tiny(tmp_path / "run", "--stages", "patch:0.75 x2 b16 lr2e-3"))
    captured = capsys.readouterr()
    said = r"\d ms a step, \d+\.\d\dx faster than dense \(ideal 4\.42x, \d+% of it retained\)"
    assert re.search(said, captured.out) and "(--stages.0)" in captured.out
    assert "images/s" in captured.err and "retained" not in captured.err  # one probe says nothing of later steps


def test_without_a_probe_no_speed_is_told(tmp_path, capsys):
    training.run(tiny(tmp_path / "run", "--stages", "patch:0.75 x2 b16", "--probe-steps", "0"))
    plan = json.loads((tmp_path / "run/plans.json").read_text())["0"]
    assert plan["step_ms"] > 0 and (plan["dense_ms"], plan["speedup"], plan["retained"]) == (None, None, None)
    assert "faster" not in capsys.readouterr().out and all("retained" not in row for row in rows(tmp_path / "run"))


def test_the_saved_configuration_starts_the_same_run(unbroken, tmp_path):
    config = parse(["--config", str(unbroken / "config.json"), "--out", str(tmp_path / "again")]).config
    training.run(config)
    assert exact(tmp_path / "again") == exact(unbroken)


@pytest.mark.parametrize("stop", [3, 8, 11])  # inside the first stage, at its end, inside the second
def test_resume_is_bit_for_bit(unbroken, tmp_path, stop):
    out = tmp_path / "run"
    training.run(dataclasses.replace(tiny(out), max_steps=stop))
    assert len(rows(out)) == stop
    training.run(tiny(out), resume=True)
    assert exact(out) == exact(unbroken)
    ours, theirs = (checkpoint.load(checkpoint.latest(run))[0] for run in (out, unbroken))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_resumed_run_may_update_during_the_backward_pass(tmp_path):
    stages = ("--stages.0.clip", "none", "--stages.1.clip", "none")
    training.run(tiny(tmp_path / "late", *stages))
    out = tmp_path / "run"
    training.run(dataclasses.replace(tiny(out, *stages, "--optim.overlap"), max_steps=3))
    training.run(parse(["--resume", str(out), "--optim.no-overlap", "--max-steps", "9"]).config, resume=True)
    training.run(parse(["--resume", str(out), "--optim.overlap", "--max-steps", "99"]).config, resume=True)
    ours, theirs = (checkpoint.load(checkpoint.latest(run))[0] for run in (out, tmp_path / "late"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs) and ours.keys() == theirs.keys()
    losses = [[row["loss"] for row in rows(run)] for run in (out, tmp_path / "late")]
    assert losses[0] == losses[1] and len(losses[0]) == 14


@pytest.mark.parametrize("stop", [11, None])  # inside the last stage, and after it
def test_a_resumed_run_takes_a_longer_stage_and_one_more(tmp_path, stop):
    more = ("--stages.1.steps", "9")
    training.run(tiny(tmp_path / "longer", *more))
    out = tmp_path / "run"
    training.run(dataclasses.replace(tiny(out), max_steps=stop))
    training.run(parse(["--resume", str(out), *more, "--max-steps", "99"]).config, resume=True)
    assert exact(out) == exact(tmp_path / "longer")
    both = [parse(["--resume", str(out)]).config.stages, load_config(out / "config.json").stages]
    assert both == [tiny(out, *more).stages] * 2  # and remembers it
    stages = f"{STAGES.replace('x6', 'x9')}, block2:0.5 x2 b8 lr1e-3"
    training.run(parse(["--resume", str(out), "--stages", stages, "--max-steps", "99"]).config, resume=True)
    assert [row["stage"] for row in rows(out)] == [0] * 8 + [1] * 9 + [2] * 2
    with pytest.raises(UserError, match=r"stages.1.steps \(is 9, got 8\)"):  # it is over for good
        parse(["--resume", str(out), "--stages.1.steps", "8"])


def test_a_stage_cannot_end_before_what_it_has_made(unbroken):
    config = parse(["--resume", str(unbroken), "--stages.1.steps", "4"]).config
    before = (unbroken / "config.json").read_text(), (unbroken / "plans.json").read_text()
    with pytest.raises(
        UserError, match=r"stage 2 \(--stages.1\) has made 6 steps and cannot end at 4: give x6 or more"
    ):
        training.run(config, resume=True)
    assert before == ((unbroken / "config.json").read_text(), (unbroken / "plans.json").read_text())


def test_a_finished_run_is_left_alone(tmp_path, capsys, monkeypatch):
    """But for its last images, where a kill came before them."""

    def resume(*more):
        monkeypatch.setattr(sys, "argv", ["maskdiff train", "--resume", str(tmp_path / "run"), *more])
        train.main()
        return capsys.readouterr().out.splitlines()[-1]

    def content():
        return {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in tmp_path.rglob("*") if file.is_file()}

    stages = ("--stages", "dense x1 b4, dense x2 b4", "--sample-count", "1", "--sample-steps", "1")
    training.run(tiny(tmp_path / "run", *stages))
    before, words = content(), "is finished already, at step 3: nothing left to do; it goes on with "
    assert resume().endswith(words + "a longer last stage (--stages.1.steps) or further ones (--stages 'S, S, ...')")
    assert resume("--max-steps", "2").endswith(words + "a larger --max-steps (or none)")
    assert content() == before
    (tmp_path / "run/samples/step-00000003.png").unlink()
    assert resume().startswith("trained 3 steps") and content().keys() == before.keys()
    assert resume("--stages.1.steps", "3").startswith("trained 4 steps")


def test_a_signal_at_the_last_images_stops_nothing(tmp_path, monkeypatch):
    def sample(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        return torch.zeros(1, 32, 32, 3, dtype=torch.uint8)

    texts = []
    captioned = training.captioned
    monkeypatch.setattr(training, "captioned", lambda *arguments: texts.append(arguments[1]) or captioned(*arguments))
    monkeypatch.setattr(training.sampling, "sample", sample)
    done = training.run(tiny(tmp_path / "run", "--stages", "dense x1 b4", "--sample-count", "1"))
    assert done.stopped_by is None and done.step == 1 and not done.was_over
    packed = prepare("faces:200", 32, 4)  # and they have the labels of the first held-out images under them
    label = packed.labels[packed.heldout_ids[0]].tolist()
    assert texts == [[[names[value] for names, value in zip(packed.class_names, label, strict=True)]]]


def test_what_max_steps_and_warm_ups_do_is_said_at_the_start(tmp_path, capsys):
    stages = "dense x2 b4 lr1e-3 w5, dense x9 b4 w9"
    training.run(tiny(tmp_path / "run", "--stages", stages, "--max-steps", "2"))
    said = capsys.readouterr().out
    assert "note: by --max-steps 2 the run ends before stage 2 (--stages.1), dense\n" in said
    assert "note: stage 1 (--stages.0) has 2 steps and a warm-up of 5: its learning rate ends at 0.0004" in said
    assert said.count("note:") == 2 and said.index("note:") < said.index("stage 1/2")


COMMAND = """
import sys
from maskdiff import training
from maskdiff.options import parse
training.run(parse(sys.argv[1:]).config)
"""


def start(config, *more, wait_for_step, env=None):
    """Trains in another process and returns it once metrics.jsonl has `wait_for_step` lines."""
    path = os.path.join(config.out, "metrics.jsonl")
    file = config.out + ".json"
    with open(file, "w") as stream:
        json.dump(config_to_dict(config), stream)
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, "--config", file, *more], stderr=subprocess.PIPE, text=True, env=env
    )
    for _ in range(1200):
        if os.path.exists(path) and open(path).read().count("\n") >= wait_for_step:
            return process
        if process.poll() is not None:
            raise AssertionError(process.stderr.read())
        time.sleep(0.05)
    process.kill()
    raise AssertionError("the run never came so far")


def long(out):
    return dataclasses.replace(
        tiny(out, "--stages", "patch:0.75 x100000 b16 lr2e-3 c1.0"), checkpoint_every=5, heldout_every=0
    )


def test_sigkill_then_resume_repeats_the_unbroken_losses(tmp_path):
    config = long(str(tmp_path / "killed"))
    process = start(config, wait_for_step=12)
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed = tmp_path / "killed"
    with open(killed / "metrics.jsonl", "a") as file:
        file.write('{"step": 99999, "lo')  # what a kill in the middle of a line leaves
    at = checkpoint.load(checkpoint.latest(killed))[1]["step"]
    end = at + 7
    training.run(dataclasses.replace(config, max_steps=end), resume=True)
    whole = dataclasses.replace(long(str(tmp_path / "whole")), max_steps=end)
    training.run(whole)
    assert at >= 10 and exact(killed) == exact(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_write_a_checkpoint(tmp_path, number):
    config = dataclasses.replace(long(str(tmp_path / "run")), checkpoint_every=0)
    process = start(config, wait_for_step=3)
    process.send_signal(number)
    process.communicate(timeout=60)
    step = checkpoint.load(checkpoint.latest(tmp_path / "run"))[1]["step"]
    assert step == len(rows(tmp_path / "run")) >= 3


def test_killed_before_the_first_checkpoint_starts_again(tmp_path):
    config = dataclasses.replace(long(str(tmp_path / "run")), checkpoint_every=0)
    process = start(config, wait_for_step=3)
    process.kill()
    process.wait()
    training.run(dataclasses.replace(config, max_steps=4), resume=True)
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3, 4]


def test_existing_run_is_left_alone(unbroken):
    before = (unbroken / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="--resume"):
        training.run(tiny(unbroken))
    assert (unbroken / "metrics.jsonl").read_bytes() == before


def test_other_images_are_an_error_on_resume(tmp_path):
    out = tmp_path / "run"
    training.run(dataclasses.replace(tiny(out), max_steps=2))
    other = dataclasses.replace(tiny(out), data=dataclasses.replace(tiny(out).data, path="faces:201"))
    with pytest.raises(UserError, match="not those"):
        training.run(other, resume=True)


def test_lasting_nonfinite_gradients_stop_the_run(tmp_path, monkeypatch):
    real = capture.device_step

    def poisoned(state, *rest):
        if state.step >= 4:
            state.model.head.weight.data.fill_(float("nan"))
        return real(state, *rest)

    monkeypatch.setattr(capture, "device_step", poisoned)
    monkeypatch.setattr(training, "MAX_SKIPS", 3)
    with pytest.raises(UserError, match="3 steps in a row .* the last checkpoint is"):
        training.run(tiny(tmp_path / "run"))
    log = rows(tmp_path / "run")
    assert [row["skipped"] for row in log] == [False] * 4 + [True] * 3


def test_init_from_a_run_starts_at_its_weights(unbroken, tmp_path):
    for weights, part in (("ema", "ema."), ("raw", "master.")):
        config = dataclasses.replace(tiny(tmp_path / weights), init=str(unbroken), init_weights=weights, max_steps=0)
        training.run(config)
        started = checkpoint.load(checkpoint.latest(tmp_path / weights))[0]
        source = checkpoint.load(checkpoint.latest(unbroken))[0]
        named = {name: tensor for name, tensor in source.items() if name.startswith(part)}
        assert named and all(
            torch.equal(tensor, started["master." + name.removeprefix(part)]) for name, tensor in named.items()
        )


def test_wall_clock_stage_becomes_steps_before_its_first(tmp_path):
    out = tmp_path / "run"
    training.run(tiny(out, "--stages", "patch:0.75 0.02m b16 lr2e-3"))
    plan = json.loads((out / "plans.json").read_text())["0"]
    assert plan["steps"] == len(rows(out)) and plan["steps"] == -(-0.02 * 60e3 // plan["step_ms"])


def test_a_time_budget_fixes_all_stages_before_the_first_step(tmp_path, capsys):
    out = tmp_path / "run"
    words = ("--time-budget", "1.2s", "--stages.0.warmup", "0", "--max-steps", "1")
    training.run(tiny(out, *words))
    before = (out / "plans.json").read_text()
    plans = list(json.loads(before).values())
    scale = 1200 / (8 * plans[0]["step_ms"] + 6 * plans[1]["step_ms"])
    assert [plan["steps"] for plan in plans] == [int(8 * scale), int(6 * scale)]
    assert f"{plans[0]['steps']} steps of patch:0.75 (" in capsys.readouterr().out
    with pytest.raises(UserError, match="time_budget is too short"):
        training.run(tiny(tmp_path / "short", "--time-budget", "1e-6"))
    assert not (tmp_path / "short").exists()
    training.run(parse(["--resume", str(out), "--max-steps", "99999", "--stages.0.micro-batch", "16"]).config, True)
    assert [row["stage"] for row in rows(out)] == [0] * plans[0]["steps"] + [1] * plans[1]["steps"]
    assert [plan["steps"] for plan in json.loads((out / "plans.json").read_text()).values()] == [
        plan["steps"] for plan in plans
    ]
    assert rows(out)[-2]["lr"] == 1e-3 > rows(out)[plans[0]["steps"] - 1]["lr"]  # a cosine to its own end


RANGE = "dense x3 b5 lr2e-3 c1.0, patch:0.4-0.9 x60 b16 lr4e-3 w5 c1.0, block2:0.5-0.8 x2 t1000 lr1e-3 c1.0"


@pytest.fixture(scope="module")
def ranged(tmp_path_factory, cache):
    """Its ranges begin at samples 15 and 975: in no whole group of 16 from the run's start."""
    out = tmp_path_factory.mktemp("ranged") / "run"
    training.run(with_range(out))
    return out


def with_range(out) -> Config:
    config = tiny(out, "--stages", RANGE)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, heads=1))


def test_a_range_of_rates_trains(ranged):
    log = rows(ranged)
    plans = {key: plan["mask"]["counts"] for key, plan in json.loads((ranged / "plans.json").read_text()).items()}
    first, last = ([row["loss"] for row in log[3:63]][part] for part in (slice(10), slice(-10, None)))
    assert sum(last) < 0.8 * sum(first)
    assert all("loss_by_rate" not in row for row in log[:3])
    for number, row in enumerate(log[3:], 3):
        counts = plans["1" if number < 63 else "2"]
        tenths = [f"{(64 - count) * 10 // 64 / 10:.1f}" for count in counts]
        assert sorted(set(tenths)) == list(row["loss_by_rate"]) and len(set(tenths)) > 1
        mean = sum(row["loss_by_rate"][tenth] for tenth in tenths) / len(tenths)
        assert mean == pytest.approx(row["loss"], rel=1e-5)


def test_a_range_of_rates_is_counted_exactly(ranged):
    log, model = rows(ranged), checkpoint.load(checkpoint.latest(ranged))[1]["config"]["model"]
    config, extras = ModelConfig(**model | {"classes": tuple(model["classes"])}), 2
    counts = [64 - int((0.4 + 0.5 * (i + 0.5) / 16) * 64) for i in range(16)]
    for before, row in itertools.pairwise(log[2:63]):
        assert row["images_seen"] - before["images_seen"] == 16
        assert row["tokens"] - before["tokens"] == sum(counts) + 16 * extras
        each = sum(flops.step_flops(config, [count]) for count in counts)
        assert row["flops"] - before["flops"] == pytest.approx(each, rel=1e-9)
    assert 900 < log[-1]["tokens"] - log[-2]["tokens"] <= 1000
    plan = json.loads((ranged / "plans.json").read_text())["1"]
    assert plan["effective_rate"] == pytest.approx(1 - sum(counts) / 1024)
    dense = flops.step_flops(config, [64])
    assert plan["ideal"] == pytest.approx(dense / (sum(flops.step_flops(config, [count]) for count in counts) / 16))


@pytest.mark.parametrize("stop", [2, 7, 64])  # in the dense stage, in the first range, in the second
def test_resume_with_a_range_is_bit_for_bit(ranged, tmp_path, stop):
    out = tmp_path / "run"
    training.run(dataclasses.replace(with_range(out), max_steps=stop))
    training.run(with_range(out), resume=True)
    assert exact(out) == exact(ranged)
    ours, theirs = (checkpoint.load(checkpoint.latest(run))[0] for run in (out, ranged))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_token_budget_sets_the_batch(tmp_path):
    out = tmp_path / "run"
    training.run(tiny(out, "--stages", "patch:0.75 x1 t360 lr2e-3"))
    assert rows(out)[0]["images_seen"] == 360 // 18


def test_compile_is_for_the_blocks_of_the_run(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(training.UViT, "compile_blocks", lambda model: compiled.append(len(model.blocks)))
    monkeypatch.setattr(training.precision, "check_compiler", lambda device: compiled.append(device.type))
    training.run(tiny(tmp_path / "run", "--compile", "--max-steps", "1"))
    assert compiled == ["cpu", 3]
    assert checkpoint.load(checkpoint.latest(tmp_path / "run"))[1]["environment"]["compile"] is True


# ---- averages, optimizer


def without(values, *keys):
    """A copy of a nested configuration as it was written before there were such keys of optim."""
    return values | {"optim": {key: value for key, value in values["optim"].items() if key not in keys}}


def test_two_averages_and_an_optimizer_by_name_resume_bit_for_bit(tmp_path, capsys):
    words = (
        "--optimizer",
        "torch",
        "--optim.ema",
        "power:0.1",
        "--optim.ema2",
        "0.9",
        "--optim.ema-every",
        "2",
        "--stages",
        "dense x6 b8 lr1e-3",
    )
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    training.run(tiny(whole, *words))
    training.run(dataclasses.replace(tiny(broken, *words), max_steps=3))
    training.run(tiny(broken, *words), resume=True)
    assert exact(whole) == exact(broken)
    (ours, meta), (theirs, _) = (checkpoint.load(checkpoint.latest(run)) for run in (broken, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert any(name.startswith("ema2.") for name in ours)
    assert meta["environment"]["kernels"]["adamw_ema"] == "torch"
    config = tiny(broken, *words, "--optimizer", "reference")
    capsys.readouterr()
    training.run(dataclasses.replace(config, stages=(dataclasses.replace(config.stages[0], steps=7),)), resume=True)
    assert "note: kernels was" in capsys.readouterr().out


def test_a_checkpoint_from_before_there_were_two_averages_goes_on(unbroken, tmp_path):
    out, later = tmp_path / "run", ("ema2", "ema_every", "optimizer")
    training.run(dataclasses.replace(tiny(out), max_steps=5))
    (out / "config.json").write_text(json.dumps(without(json.loads((out / "config.json").read_text()), *later)))
    tensors, meta = checkpoint.load(checkpoint.latest(out))
    meta["config"] = without(meta["config"], *later)
    checkpoint.save(out, 5, tensors, {key: meta[key] for key in meta if key not in ("format", "files", "hash")}, keep=1)
    config = parse(["--resume", str(out), "--max-steps", "14"]).config
    training.run(config, resume=True)
    assert exact(out) == exact(unbroken)


def test_an_optimizer_that_is_absent_is_said_before_data_are_made_ready(tmp_path, monkeypatch):
    monkeypatch.setattr(training.data, "prepare", None)
    with pytest.raises(UserError, match="optim.optimizer is apex"):
        training.run(tiny(tmp_path / "run", "--optimizer", "apex"))
    assert not (tmp_path / "run").exists()
