"""maskdiff.sweep: equal time on one clock, cells that are small files, studies that go on."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from maskdiff import durations, presets, sweep
from maskdiff.errors import UserError
from maskdiff.study import asked, cells, clock, plan, study
from maskdiff.study.clock import Times, joined

TINY = ["--data", "faces:160", "--preset", "faces32", "--data.no-labels", "--data.heldout", "0.2", "--guidance", "1"]
TINY += ["--model.image-size", "16", "--model.width", "32", "--model.heads", "1", "--model.blocks", "1"]
SHORT = ["--rates", "0,0.5", "--seconds", "0.2s", "--count", "12", "--points", "0.5,1", "--steps", "2", "--rounds", "3"]


def steps_take(**step_ms: float) -> Times:
    rows = [{"mask": mask.replace("_", ":"), "p20": ms, "p50": ms, "p80": ms} for mask, ms in step_ms.items()]
    return Times({}, None, "float32", 3, rows, sampling_images_per_s=20.0, features_images_per_s=30.0)


TIMES = steps_take(dense=40.0, **{"patch_0.5": 30.0, "patch_0.9": 25.0, "block2_0.5": 32.0})


def cells_of(courses: list[plan.Course], seconds: float = 60.0, seeds: int = 1) -> list[plan.Cell]:
    config = presets.get("emoji32")
    return plan.cells(courses, range(seeds), config, seconds, plan.budget_tokens(config), TIMES)


def command(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["sweep", *map(str, words)])
    sweep.main()


def test_every_cell_has_the_same_time_and_every_step_as_many_tokens():
    courses = [plan.course("dense", 1), plan.course("patch:0.5", 0.5), plan.course("patch:0.9", 0.25)]
    courses += [plan.course("patch:0.9", 0), plan.parse_course("patch:0.9 40%, patch:0.5 30%, dense 30%")]
    made = cells_of(courses)
    for cell in made:
        assert sum(stage["steps"] for stage in cell["stages"]) % plan.HELDOUT_POINTS == 0
        assert sum(stage["seconds"] for stage in cell["stages"]) == pytest.approx(60, abs=12 * 0.04)
        assert all(0.93 * 16 * 65 < stage["tokens"] <= 16 * 65 for stage in cell["stages"])
    assert made[0]["baseline"] and not any(cell["baseline"] for cell in made[1:])
    assert [cell["finetune"] for cell in made] == [1, 0.5, 0.25, 0, 0.3]
    dense, half = made[0]["stages"][0], made[1]["stages"]
    assert half[0]["steps"] == 1000 and half[0]["ideal"] == pytest.approx(dense["flops"] / 16 / half[0]["flops"] * 31)
    assert [stage["mask"] for stage in made[4]["stages"]] == ["patch:0.9", "patch:0.5", "dense"]
    assert len({cell["name"] for cell in made}) == len({cell["group"] for cell in made}) == 5


def test_what_a_cell_trains():
    config = presets.get("emoji32")
    varied = plan.vary([plan.course("patch:0.5", 0.5)], "optim.ema", "0.9", config)
    cell = cells_of(varied, seconds=10)[0]
    trained = plan.cell_config(config, cell, tokens=1040)
    assert trained.optim.ema == 0.9 and "ema 0.9" in cell["group"]
    masked, dense = trained.stages
    assert (masked.mask, masked.tokens, masked.fresh, masked.steps) == (
        "patch:0.5",
        1040,
        False,
        cell["stages"][0]["steps"],
    )
    assert dense.mask == "dense" and dense.fresh and dense.lr == config.stages[1].lr
    assert masked.warmup == masked.steps // 5  # a preset's 100 steps of warm-up would be most of so short a stage
    alone = plan.cell_config(config, cells_of([plan.course("dense", 1)])[0], tokens=1040)
    assert not alone.stages[0].fresh


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plan.parse_course("patch:0.9 40%, dense"), "dense"),
        (lambda: plan.parse_course("patch:0.9 40%, dense 30%"), "100%"),
        (lambda: plan.vary([], "model.positon", "none", presets.get("emoji32")), "model"),
        (lambda: plan.vary([plan.course("dense", 1)], "model.width", "wide", presets.get("emoji32")), "whole number"),
        (lambda: durations.seconds("20 minutes", "--budget"), "--budget got '20 minutes'"),
        (lambda: asked.share("1.5", "--points"), "shares from 0 to 1"),
    ],
)
def test_what_cannot_be_meant(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_masks_timed_later_are_told_on_the_first_clock():
    late = joined(TIMES, steps_take(dense=80.0, **{"patch_0.5": 99.0, "patch_0.3": 70.0}))
    assert late.step_ms("patch:0.3") == 35.0 and late.step_ms("patch:0.5") == 30.0


def test_a_budget_holds_the_whole_study():
    chosen = {**sweep.DEFAULTS, "budget": "20m", "jobs": 2, "seeds": 2}
    courses = [plan.course("dense", 1), plan.course("patch:0.5", 0.5)]
    masks = plan.masks_of(courses)
    seconds, count = asked.length(chosen, TIMES, masks, 4, 8)
    made = {"cells": cells_of(courses, seconds, 2), "points": [0.5, 1.0], "count": count}
    assert sum(study.estimate(made, TIMES)) == pytest.approx(2 * 1200, rel=0.01)
    assert count == 1000
    seconds, count = asked.length({**chosen, "budget": "4m"}, TIMES, masks, 4, 8)
    made = {"cells": cells_of(courses, seconds, 2), "points": [0.5, 1.0], "count": count}
    training, judging = study.estimate(made, TIMES)
    assert 100 <= count < 1000 and training == pytest.approx(judging, rel=0.05)
    with pytest.raises(UserError, match="too short for 4 cells"):
        asked.length({**chosen, "budget": "20s"}, TIMES, masks, 4, 8)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    path, measured = tmp_path_factory.mktemp("sweep") / "study", clock.measured

    def told(*args, **kwargs) -> Times:
        """Measured; but cells have their steps by another clock, whatever runs here beside."""
        times = measured(*args, **kwargs)
        assert all(0 < row["p20"] <= row["p50"] <= row["p80"] for row in times.rows)
        fixed = [{**row, "p50": 4.0 if row["mask"] == "dense" else 3.0} for row in times.rows]
        return dataclasses.replace(times, rows=fixed)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(clock, "measured", told)
        command(monkeypatch, path, *SHORT, *TINY)
    return path


def results(path: Path) -> dict[str, dict]:
    return {file.stem: json.loads(file.read_text()) for file in sorted((path / "cells").glob("*.json"))}


def test_a_study_from_its_plan_to_its_report(finished):
    made, found = study.read(finished), results(finished)
    assert {cell["name"] for cell in made["cells"]} == set(found) and len(found) == 2
    times = {row["mask"]: row["p50"] for row in json.loads((finished / study.TIMES).read_text())["steps"]}
    for result in found.values():
        last = result["rows"][-1]
        stages = result["cell"]["stages"]
        assert last["step"] == sum(stage["steps"] for stage in stages)
        assert last["seconds"] == pytest.approx(sum(s["steps"] * times[s["mask"]] for s in stages) / 1e3, abs=2e-3)
        assert last["images"] == sum(stage["steps"] * stage["batch"] for stage in stages)
        assert last["flops"] == pytest.approx(sum(stage["steps"] * stage["flops"] for stage in stages))
        assert all(row["heldout_loss"] is not None for row in result["rows"])
        judged = [row["step"] / last["step"] for row in result["rows"] if row["scores"]]
        assert judged == pytest.approx([0.5, 1], abs=0.05) and last["scores"]["frechet"] > 0
    assert made["real_frechet"] > 0
    assert not list((finished / "work").glob("*/state.safetensors")), "weights are not kept"
    assert (finished / "report.html").exists() and (finished / "real.png").exists()


def test_a_cell_that_was_stopped_goes_on_to_the_same_figures(finished, monkeypatch):
    made, before = study.read(finished), results(finished)
    cell = made["cells"][-1]
    cells.result_path(finished, cell).unlink()
    run, stops = cells.training.run, []

    def stopped(config, resume=False):
        stops.append(config.max_steps)
        ended = run(config, resume)
        if len(stops) == 1:
            raise KeyboardInterrupt  # killed between two stops
        return ended

    monkeypatch.setattr(cells.training, "run", stopped)
    setup = study.sweep_setup(made)
    with pytest.raises(KeyboardInterrupt):
        study.work(finished, made, setup)
    assert study.work(finished, made, setup) and len(stops) == 2 and stops[0] < stops[1]
    assert results(finished)[cell["name"]]["rows"] == before[cell["name"]]["rows"]


def test_a_cell_belongs_to_one_process(finished):
    cell = study.read(finished)["cells"][0]
    with cells.claimed(finished, cell) as mine, cells.claimed(finished, cell) as other:
        assert mine and not other


def test_later_commands_add_cells_and_change_none(finished, monkeypatch, capsys):
    before = {file: file.stat().st_mtime_ns for file in (finished / "cells").glob("*.json")}
    with pytest.raises(UserError, match="begun with another count: 12, not 13"):
        command(monkeypatch, finished, "--count", "13", "--dry-run")
    command(monkeypatch, finished, "--longer", "2")
    names = [cell["name"] for cell in study.read(finished)["cells"]]
    assert len(names) == 4 and all(name.endswith("+x2.seed0") for name in names[2:])
    longer = results(finished)[names[2]]
    assert longer["rows"][-1]["seconds"] == pytest.approx(2 * 0.2, abs=0.1)
    assert all(file.stat().st_mtime_ns == when for file, when in before.items())
    command(monkeypatch, finished, "--seeds", "2", "--dry-run")
    assert "6 cells" in capsys.readouterr().out


def test_the_best_mask_is_known_when_all_are_judged(tmp_path):
    made = {"cells": cells_of([plan.course("dense", 1), plan.course("patch:0.5", 0.5), plan.course("patch:0.9", 0.5)])}
    for cell, frechet in zip(made["cells"], (3.0, 9.0, 5.0), strict=True):
        with pytest.raises(UserError, match="not known before"):
            study.best_group(tmp_path, made)
        place = cells.result_path(tmp_path, cell)
        place.parent.mkdir(exist_ok=True)
        place.write_text(json.dumps({"rows": [{"scores": {"frechet": frechet}}]}))
    assert study.best_group(tmp_path, made) == "patch 90%"
