"""The step benchmark of a card, on the CPU: rows, resuming, failures, the time budget, what waits, pictures."""

import json
import os
import sys
import types

import gpu_step
import pytest
import records
import torch

import maskdiff_kernels as mk
from maskdiff import bench, flops, measure, presets
from maskdiff.model import UViT
from maskdiff_kernels import dispatch

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
# Compiling takes too long for a test.
NAMES = ("maskdiff-own", "maskdiff-overlap", "maskdiff", "no-sync", "strong", "published")


@pytest.fixture
def step(tmp_path, monkeypatch, capsys):
    """Runs the command on the CPU; gives its exit status, its output and the rows it leaves."""
    every = gpu_step.cases(CPU)
    assert {case.name for case in every} == {*NAMES, "compiled", "maskdiff-fused"}
    monkeypatch.setattr(gpu_step, "cases", lambda device: [case for case in every if case.name in NAMES])

    def run(*options: str) -> tuple[int, str, list[records.Row]]:
        path = tmp_path / "rows.json"
        argv = ["gpu_step.py", "--device=cpu", "--rounds=2", f"--out={path}", "--commit=one", *options]
        monkeypatch.setattr("sys.argv", argv)
        status = gpu_step.main()
        return status, capsys.readouterr().out, records.read(path) if path.exists() else []

    return run


def never(*arguments):
    raise AssertionError("measured again")


def test_every_row_is_measured_written_and_drawn(step, tmp_path):
    status, output, rows = step()
    assert status == 0 and len(rows) == 12 and "12 of 12 rows to measure" in output
    found = {(row["implementation"], row["shape"]["mask"]): row for row in rows}
    for (name, mask), row in found.items():
        assert gpu_step.line(row) in output and row["op"] == "step" and row["case"] == f"tiny b4 {mask}"
        if name == "no-sync":
            assert row["error"].startswith("NotImplementedError: a CPU's step") and row["ms"] is None
            continue
        assert row["error"] is None and row["launches"] == "host" and row["card"] and row["commit"] == "one"
        assert 0 < row["ms"]["p20"] <= row["ms"]["p50"] == row["step_ms"] <= row["ms"]["p80"]
        assert row["peer"] == (name in ("strong", "published")) == (row["kernels"] is None)
        work = 4 * flops.step_flops(gpu_step.configs(CPU)["tiny"].model, [16 if mask == "dense" else 8])
        assert row["mfu"] == pytest.approx(work / row["step_ms"] / row["matrix_gflops"] / 1e6) and row["copy_gbs"] > 0
        assert bool(row["parts_ms"]) != row["peer"]
    assert output.count("retained") == 1 and "loss backward" in output and "published" in output.split("retained")[1]
    picture = tmp_path / "rows-tiny-b4.png"
    assert str(picture) in output and picture.stat().st_size > 10_000


def test_finished_rows_are_skipped(step, monkeypatch):
    first = step("--only=maskdiff")[2]
    assert len(first) == 6
    with monkeypatch.context() as patch:
        patch.setattr(gpu_step.Runner, "run", never)
        status, output, rows = step("--only=maskdiff")
        assert status == 0 and rows == first and "0 of 6 rows to measure" in output
        with pytest.raises(AssertionError, match="measured again"):
            step("--only=dense strong")
        with pytest.raises(AssertionError, match="measured again"):
            step("--only=maskdiff", "--commit=two")


def test_what_fails_is_a_row(step, monkeypatch, tmp_path):
    def baseline(self, name, rate):
        raise torch.OutOfMemoryError("tried to allocate\n12 GiB")

    monkeypatch.setattr(bench.Bench, "baseline", baseline)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, output, rows = step("--only=dense")
    found = {row["implementation"]: row for row in rows}
    assert status == 0 and found["strong"]["error"] == "OutOfMemoryError: tried to allocate 12 GiB"
    assert found["maskdiff"]["ms"] and "no picture: matplotlib is not here" in output
    assert not list(tmp_path.glob("*.png"))


def test_no_time_left(step):
    status, output, rows = step("--minutes=0")
    assert status == 0 and rows == [] and "12 rows are left; the same command goes on: tiny b4 dense" in output


def test_no_compiling_is_begun_late(tmp_path):
    kept = records.Records(tmp_path / "rows.json", records.stamp(CPU, "one"))
    runner = gpu_step.Runner(kept, CPU, 2, deadline=gpu_step.time.monotonic() + 60)
    runner.device = CUDA
    late = {
        name: runner.late(gpu_step.Case("tiny", 4, "dense", name)) for name in ("strong", "compiled", "maskdiff-fused")
    }
    assert late == {"strong": False, "compiled": True, "maskdiff-fused": True}


def test_a_device_that_answers_no_more(step, monkeypatch):
    class Replaced(Exception):
        pass

    def execv(program, arguments):
        raise Replaced(*arguments)

    def fails(device):
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(gpu_step.Runner, "measured", lambda self, stand, case: fails(None))
    monkeypatch.setattr(measure, "synchronize", fails)
    monkeypatch.setattr(os, "execv", execv)
    with pytest.raises(Replaced) as replaced:
        step()
    assert replaced.value.args[1] == "gpu_step.py" and replaced.value.args[-2:] == ("--commit", "one")


def test_own_kernels_run_in_their_row_alone(step, monkeypatch):
    monkeypatch.setattr(dispatch, "_table", lambda: {"cpu": {"attention": "explicit"}})
    dispatch._choice.cache_clear()
    try:
        rows = {row["implementation"]: row for row in step("--only=dense maskdiff")[2]}
    finally:
        dispatch._choice.cache_clear()
    assert rows["maskdiff"]["kernels"]["attention"] == "explicit"
    assert set(rows["maskdiff-own"]["kernels"].values()) == {"cpp"}


def test_the_row_that_overlaps_updates_during_the_backward_pass(step, monkeypatch):
    seen = []
    train_step = bench.train_step
    monkeypatch.setattr(bench, "train_step", lambda state, *a: seen.append(len(state.adams)) or train_step(state, *a))
    (row,) = step("--only=dense maskdiff-overlap")[2]
    assert set(seen) == {4} and row["error"] is None  # three blocks and the rest
    assert set(row["kernels"].values()) == {"cpp"} and not row["peer"]


def test_the_fused_row_has_compiled_blocks(step, monkeypatch):
    compiled = []
    monkeypatch.setattr(gpu_step, "cases", lambda device: [gpu_step.Case("tiny", 4, "dense", "maskdiff-fused")])
    monkeypatch.setattr(UViT, "compile_blocks", lambda model: compiled.append(len(model.blocks)))
    (row,) = step()[2]
    assert len(compiled) == 1 and row["implementation"] == "maskdiff-fused" and row["error"] is None
    assert set(row["kernels"].values()) == {"cpp"} and not row["peer"]


@pytest.mark.parametrize(("option", "said"), [("--device=cuda", "sees no CUDA device"), ("--device=tpu", "not 'tpu'")])
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_bad_options(step, capsys, option, said):
    with pytest.raises(SystemExit) as error:
        step(option)
    assert error.value.code == 2 and said in capsys.readouterr().err


# ---- on a card, played ----


def test_rows_of_a_card():
    rows = gpu_step.cases(CUDA)
    assert len(set(map(str, rows))) == len(rows)
    places = {(case.model, case.batch) for case in rows}
    assert places == {("celeba64", 256), ("celeba64", 64), ("celeba64", 16), ("celebahq256", 32)}
    for place in places:
        for name in ("maskdiff-own", "maskdiff-fused", "maskdiff", "strong", "compiled", "published"):
            masks = [case.mask for case in rows if (case.model, case.batch) == place and case.name == name]
            assert masks == ["dense", "patch:0.5", "patch:0.75", "patch:0.9"]
    overlapping = {(case.model, case.batch) for case in rows if case.name == "maskdiff-overlap"}
    assert overlapping == {("celeba64", 256), ("celeba64", 64)}
    assert all(stage.clip is None for stage in gpu_step.configs(CUDA)["celeba64"].stages)
    assert {(case.model, case.batch) for case in rows if case.name == "no-sync"} == {
        ("celeba64", 256),
        ("celebahq256", 32),
    }
    last = max(i for i, case in enumerate(rows) if case.name == "strong")
    assert all(case.batch == 256 for case in rows[:last] if case.name in ("compiled", "published"))


def test_the_base_model(monkeypatch):
    """research: MaskDM's CelebA-HQ runs, 102.4 M parameters; the preset where there is one."""
    config = gpu_step.configs(CUDA)["celebahq256"]
    shape = config.model.width, config.model.heads, config.model.blocks, config.model.image_size, config.model.patch
    assert shape == (768, 12, 13, 256, 4) and config.diffusion.schedule == "cosine"
    with torch.device("meta"):
        parameters = sum(p.numel() for p in bench.UViT(config.model).parameters())
    assert parameters / 1e6 == pytest.approx(102.4, abs=0.05)
    other = presets.Preset("another", presets.get("celeba64"))
    monkeypatch.setitem(presets.PRESETS, "celebahq256", other)
    assert gpu_step.base256() is other.config


def test_own_kernels_of_a_card(monkeypatch):
    """CUDA where it takes the sequences, else Triton."""
    monkeypatch.setattr(mk, "chosen", lambda device: {"attention": "sdpa", "draw_batch": "reference"})
    able = {"attention": ["cuda", "triton", "sdpa", "reference"], "draw_batch": ["reference"]}
    monkeypatch.setattr(dispatch, "able", lambda op, device: able[op])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    config = gpu_step.base256()
    stand = types.SimpleNamespace(device=CUDA, dtype=torch.bfloat16, model_config=config.model, batch=2)
    stand.mask = lambda text: bench.Bench.mask(stand, text)
    assert gpu_step.own_kernels(stand, "patch:0.9") == {"attention": "triton"}
    stand.model_config = presets.get("celeba64").model
    assert gpu_step.own_kernels(stand, "dense") == {"attention": "cuda"}


def test_a_step_that_waits_is_found(monkeypatch, tmp_path):
    """The mode is on for one step after a first one, and off again whatever happens."""
    log = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: log.append(mode))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    kept = records.Records(
        tmp_path / "rows.json", {**records.stamp(CPU, "one"), "card": "a card", "device": "cuda:9.0"}
    )
    runner = gpu_step.Runner(kept, CPU, 2, 1e9)
    runner.device = CUDA
    waits = [False]

    def one_step():
        log.append("step")
        if waits[0] and "error" in log:
            raise RuntimeError("called a synchronizing CUDA operation")

    stand = types.SimpleNamespace(mask=lambda text: None, ours=lambda mask: one_step)
    monkeypatch.setattr(gpu_step, "Bench", lambda *arguments: stand)
    monkeypatch.setattr(gpu_step, "own_kernels", lambda stand, mask: {})
    case = gpu_step.Case("tiny", 4, "dense", "no-sync")
    runner.run(case)
    assert log == ["step", "error", "step", "default"]
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert row["error"] is None and gpu_step.line(row).endswith("never waited")
    log.clear()
    waits[0] = True
    runner.run(case)
    assert log == ["step", "error", "step", "default"]
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert row["error"] == "RuntimeError: called a synchronizing CUDA operation"
    assert gpu_step.status(kept) == 1
