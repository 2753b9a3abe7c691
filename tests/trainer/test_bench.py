"""The bench: its figures follow from its times, its table and picture are drawn, its errors are one line."""

import dataclasses
import json

import pytest
import torch

from maskdiff import bench, flops, measure, presets, report
from maskdiff.errors import UserError

TINY = dataclasses.replace(
    presets.get("celeba64"),
    model=dataclasses.replace(presets.get("celeba64").model, image_size=16, width=32, blocks=3, heads=2),
)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def result():
    masks = [("patch", 0.0), ("patch", 0.5), ("block2", 0.5)]
    return bench.run(TINY, 4, masks, ["strong", "published"], 3, CPU, torch.float32)


def test_every_contestant_has_a_row(result):
    rows = {(row["implementation"], row["kind"], row["rate"]) for row in result["rows"]}
    assert rows == {
        ("maskdiff", "dense", 0.0), ("maskdiff", "patch", 0.5), ("maskdiff", "block2", 0.5),
        ("strong", "dense", 0.0), ("strong", "patch", 0.5), ("published", "dense", 0.0), ("published", "patch", 0.5),
    }  # fmt: skip
    assert json.loads(json.dumps(result)) == result


def test_figures_follow_from_the_times(result):
    rows = result["rows"]
    dense = {row["implementation"]: row["step_ms"] for row in rows if row["kind"] == "dense"}
    best = min(dense["maskdiff"], dense["strong"])  # the published step is no strong opponent
    for row in rows:
        ideal = flops.ideal(TINY.model, [row["tokens"] - 1])
        assert row["ideal"] == ideal and row["step_ms_p20"] <= row["step_ms"] <= row["step_ms_p80"]
        assert row["speedup"] == pytest.approx(dense[row["implementation"]] / row["step_ms"])
        assert row["retained"] == pytest.approx(best / row["step_ms"] / ideal)
        assert row["images_per_s"] == pytest.approx(4e3 / row["step_ms"])
        achieved = 4 * flops.step_flops(TINY.model, [row["tokens"] - 1]) / (row["step_ms"] * 1e-3)
        assert row["mfu"] == pytest.approx(achieved / (result["matrix_gflops"] * 1e9))
        if row["kind"] != "dense":
            saved = 1 - row["step_ms"] / best
            assert row["share"] == pytest.approx(saved / (1 - 1 / ideal)) and 1.5 < ideal < 2.5
    assert all(row["share"] is None and row["ideal"] == 1 for row in rows if row["kind"] == "dense")


def test_equal_tokens_grow_the_batch(result):
    assert [row["batch"] for row in result["equal_tokens"]] == [4, 4 * 17 // 9, 4 * 17 // 9]


def test_parts_make_up_the_step(result):
    for parts in result["parts_ms"].values():
        assert list(parts) == ["draw", "gather and noise", "forward", "loss", "backward", "optimizer"]
        assert all(value > 0 for value in parts.values())


def test_table_and_picture_show_every_row(result, tmp_path):
    from PIL import Image

    text = report.table(result)
    for row in result["rows"]:
        assert f"{row['step_ms']:.1f}" in text and f"{row['retained']:.1%}" in text
    report.picture(result, tmp_path / "curve.png")
    pixels = Image.open(tmp_path / "curve.png").convert("RGB")
    assert pixels.size == (1500, 630)
    assert len({pixels.getpixel((x, y)) for x in range(0, 1500, 7) for y in range(0, 630, 7)}) > 10


def test_interleaved_runs_everything_equally_often():
    calls = []
    times = measure.interleaved({name: lambda name=name: calls.append(name) for name in "abc"}, 6, CPU)
    assert all(len(values) == 6 and min(values) >= 0 for values in times.values())
    assert calls[6:12] == list("abcbca")  # after two warming calls each, the order turns
    assert all(calls.count(name) == 8 for name in "abc")


def test_peak_memory_sees_what_a_call_takes():
    assert measure.peak_memory(lambda: torch.ones(50 << 20, dtype=torch.uint8), CPU) == pytest.approx(50 << 20, rel=0.1)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--baselines", "strng"], "no baseline 'strng'"),
        (["--rates", "0,1.5"], "from 0 to below 1"),
        (["--rates", "half"], "not 'half'"),
        (["--batch", "0"], "number from 1"),
        (["--preset", "celeba46"], "celeba64"),
        (["--kinds", "blok4", "--rates", "0.5"], "blok4"),
    ],
)
def test_bad_options_are_one_line(argv, message, monkeypatch):
    monkeypatch.setattr("sys.argv", ["bench", *argv])
    with pytest.raises(UserError, match=message):
        bench.main()
