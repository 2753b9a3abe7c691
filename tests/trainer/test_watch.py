"""maskdiff.watch: what it shows of runs in every state, and that it follows one that is broken and goes on."""

import io
import json
import math
import sys

import pytest

from maskdiff import watch
from maskdiff.errors import UserError
from maskdiff.runlog import METRICS, MetricsFile
from maskdiff.watch import Watched, duration, sparkline

STAGES = [{"mask": "patch:0.75", "steps": 100, "minutes": None}, {"mask": "dense", "steps": None, "minutes": 5}]


@pytest.fixture
def run(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"stages": STAGES, "max_steps": None}))
    return tmp_path


def row(step, stage=0, loss=None, **more):
    return {
        "step": step, "stage": stage, "loss": 1 / step if loss is None else loss, "images_seen": 64 * step,
        "step_ms": 50.0, "train_s": 0.05 * step, "lr": 1e-3, "grad_norm": 0.5, "skipped": False, **more,
    }  # fmt: skip


def write(run, rows, end="", mode="w"):
    with (run / METRICS).open(mode) as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows) + end)


def shown(watched):
    watched.read()
    return dict(line.strip().split("  ", 1) for line in watched.lines()[1:]) | {"": watched.lines()[0]}


def test_a_run_in_its_first_stage(run):
    last = row(40, retained=0.87, heldout_loss=0.25, skipped=True, loss=math.nan)
    with_rates = [row(step, loss_by_rate={"0.7": 0.5, "0.8": step / 10}) for step in range(1, 4)]
    write(run, [*with_rates, *(row(step, heldout_loss=0.5) for step in range(4, 40)), last])
    lines = shown(Watched(run))
    assert lines[""] == f"{run}   stopped at step 40; go on with: python -m maskdiff.train --resume {run}"
    assert lines["stage"].strip() == "patch:0.75, 100 steps, 1 of 2"
    assert "step 40 of 100, 40%" in lines["progress"] and lines["progress"].count("█") == 16
    smoothed = sum(1 / step for step in range(1, 40)) / 39
    bars = lines["loss"].split()[1]
    assert lines["loss"].strip().startswith(f"{smoothed:.4f}  █") and bars.endswith("▁") and len(bars) == 39
    assert lines["loss"].endswith("mean of the last 40 steps")
    assert lines["held out"].strip().startswith("0.2500") and lines["held out"].endswith("at step 40")
    assert lines["speed"].strip() == (
        "50 ms a step, 1280 images/s, 87% of the ideal speed-up over the dense steps timed before the stage"
    )
    assert lines["lr"].strip() == "0.001   gradient norm 0.5" and lines["skipped"].strip() == "1 steps"
    assert "by rate" not in lines and "time left" not in lines
    write(run, with_rates)
    assert shown(Watched(run))["by rate"].strip() == "0.7 0.5000  0.8 0.2000"


def test_time_left_and_the_end(run):
    file = MetricsFile(run / METRICS, 0)
    watched = Watched(run)
    assert shown(watched)[""].endswith("preparing its first step")
    for step in range(1, 91):
        file.write(row(step))
    lines = shown(watched)
    assert lines["time left"].strip() == "0 s of this stage; then dense, 5 min" and not watched.ended
    (run / "plans.json").write_text(json.dumps({"1": {"steps": 300}}))
    for step in range(91, 161):
        file.write(row(step, stage=step > 100, step_ms=50 + 50 * (step > 100)))
    lines = shown(watched)
    assert lines["time left"].strip() == "24 s" and "step 60 of 300" in lines["progress"]
    assert lines[""].endswith("running, step 160 of 400")
    for step in range(161, 401):
        file.write(row(step, stage=1))
    file.close()
    assert shown(watched)[""].endswith("finished, 400 steps") and watched.ended
    watched.max_steps = 380
    assert watched.steps == 400  # a resumed run went on beyond it
    watched.max_steps = 500
    assert watched.steps == 400


def test_half_a_line_is_no_row_yet(run):
    second = json.dumps(row(2))
    write(run, [row(1)], end=second[:15])
    watched = Watched(run)
    watched.read()
    assert watched.step == 1
    write(run, [], end=second[15:] + "\n", mode="a")
    watched.read()
    assert watched.step == 2 and watched.losses[0] == [1.0, 0.5]
    write(run, [row(1)], end='{"step": 2, "lo')  # what a kill leaves
    assert shown(Watched(run))["progress"].strip().endswith("step 1 of 100, 1%")


@pytest.mark.parametrize("grown_to", [5, 60])  # shorter than what was read, longer than it
def test_a_resumed_run_is_read_anew(run, grown_to):
    write(run, [row(step, skipped=True) for step in range(1, 41)], end='{"step": 41, "lo')
    watched = Watched(run)
    watched.read()
    write(run, [row(step, loss=2.0) for step in range(1, grown_to + 1)])
    watched.read()
    assert watched.step == grown_to and watched.skipped == 0 and watched.losses[0] == [2.0] * grown_to


def test_a_line_of_an_earlier_step_where_reading_went_on(run):
    write(run, [row(step) for step in range(1, 5)])
    watched = Watched(run)
    watched.read()
    size = (run / METRICS).stat().st_size
    write(run, [row(1, note="x" * (size - len(json.dumps(row(1, note=""))) - 1)), row(2), row(3)])
    watched.read()
    assert watched.step == 3 and len(watched.losses[0]) == 3


def test_what_has_no_step_yet_and_what_is_no_run(run, tmp_path):
    watched = Watched(run)
    watched.read()
    assert watched.lines()[0].endswith("has not made a step yet") and not watched.ended
    assert watched.lines()[1:] == ["  to do  patch:0.75, 100 steps", "  to do  dense, 5 min"]
    for path, words in ((tmp_path / "none", "there is no such folder"), (run / "..", "it has no config.json")):
        with pytest.raises(UserError, match=f"is no run, {words}; give the folder that --out named"):
            Watched(path)
    for line in ("no JSON", "[1]", '{"step": 1}'):
        (run / METRICS).write_text(line + "\n")
        with pytest.raises(UserError, match="metrics.jsonl is damaged: '.* is no line of it"):
            Watched(run).read()
    (run / "config.json").write_text("{}x")
    with pytest.raises(UserError, match="is not valid"):
        Watched(run)


def test_it_follows_until_the_run_ends(run, monkeypatch, capsys):
    file = MetricsFile(run / METRICS, 0)
    file.write(row(1))

    def go_on(seconds):
        assert seconds == 1
        file.write(row(2))
        file.close()

    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(watch.time, "sleep", go_on)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    watch.watch(Watched(run), once=False)
    first, second = capsys.readouterr().out.split("\x1b[8A\x1b[J")  # up by what stood there, and cleared
    assert all(len(line) < 60 for line in first.splitlines()) and first.count("\n") == 8
    assert f"{run}   stopped at step 2; go on with: python -m maskdiff.train --resume {run}\n" in second


def test_the_command(run, monkeypatch, capsys):
    write(run, [row(1)])
    monkeypatch.setattr(sys, "argv", ["watch", str(run), "--once"])
    watch.main()
    assert "stopped at step 1" in capsys.readouterr().out

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(watch, "watch", interrupted)
    watch.main()  # Ctrl-C is how one leaves
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", ascii_only)
    monkeypatch.setattr(watch, "watch", lambda run, once: print("▁"))
    watch.main()


def test_bars_and_durations():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == watch.BARS and sparkline([5.0]) == "▁" and sparkline([]) == ""
    assert sparkline([math.nan, 0.0, math.inf, 1.0]) == " ▁ █"
    assert sparkline([1.0] * 50 + [3.0] * 50, width=4) == "▁▁██" and sparkline([1.0] * 5, width=2) == "▁▁"
    assert [duration(seconds) for seconds in (-1, 7.4, 59.6, 130, 3905)] == [
        "0 s", "7 s", "1 min 0 s", "2 min 10 s", "1 h 5 min",
    ]  # fmt: skip
