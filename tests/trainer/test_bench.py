"""The bench: its figures follow from its times, its table and picture are drawn, its errors are one line."""

import dataclasses
import json
import types

import pytest
import torch

import maskdiff_kernels as mk
from maskdiff import bench, bench_kernels, flops, measure, presets, report
from maskdiff.errors import UserError

TINY = dataclasses.replace(
    presets.get("celeba64"),
    model=dataclasses.replace(presets.get("celeba64").model, image_size=16, width=64, blocks=3, heads=2),
)
CPU = torch.device("cpu")
MASKS = ["dense", "patch:0.5", "patch:0.2-0.8", "block2:0.5"]


@pytest.fixture(scope="module")
def result():
    return bench.run(TINY, 4, MASKS, ["strong", "published"], 3, CPU, torch.float32, kernels=True)


def counts(row) -> tuple[int, ...]:
    return (12, 10, 7, 5) if row["range"] else (round(row["tokens"]) - 1,)


def test_every_contestant_has_a_row(result):
    rows = {(row["implementation"], row["mask"]) for row in result["rows"]}
    assert rows == {
        ("maskdiff", "dense"), ("maskdiff", "patch:0.5"), ("maskdiff", "patch:0.2-0.8"), ("maskdiff", "block2:0.5"),
        ("strong", "dense"), ("strong", "patch:0.5"), ("published", "dense"), ("published", "patch:0.5"),
    }  # fmt: skip
    assert json.loads(json.dumps(result)) == result
    assert {row["launches"] for row in result["rows"]} == {"host"} and all(row["peak_bytes"] for row in result["rows"])


def test_figures_follow_from_the_times(result):
    rows = result["rows"]
    dense = {row["implementation"]: row["step_ms"] for row in rows if row["kind"] == "dense"}
    best = min(dense["maskdiff"], dense["strong"])  # the published step is no strong opponent
    for row in rows:
        ideal = flops.ideal(TINY.model, counts(row))
        assert row["ideal"] == ideal and row["step_ms_p20"] <= row["step_ms"] <= row["step_ms_p80"]
        assert row["speedup"] == pytest.approx(dense[row["implementation"]] / row["step_ms"])
        assert row["retained"] == pytest.approx(best / row["step_ms"] / ideal)
        assert row["images_per_s"] == pytest.approx(4e3 / row["step_ms"])
        achieved = 4 * flops.step_flops(TINY.model, counts(row)) / (row["step_ms"] * 1e-3)
        assert row["mfu"] == pytest.approx(achieved / (result["matrix_gflops"] * 1e9))
        if row["kind"] != "dense":
            saved = 1 - row["step_ms"] / best
            assert row["share"] == pytest.approx(saved / (1 - 1 / ideal)) and 1.3 < ideal < 2.5
    assert all(row["share"] is None and row["ideal"] == 1 for row in rows if row["kind"] == "dense")


def test_averages_change_at_every_step():
    """Else medians of ours would be of steps without, beside baselines with them."""
    assert {presets.get(name).optim.ema_every for name in presets.PRESETS} == {1}


def test_a_range_of_rates(result):
    (row,) = (row for row in result["rows"] if row["range"])
    assert row["range"] == [0.2, 0.8] and row["rate"] == 0.5 and row["tokens"] == 9.5 and row["kind"] == "patch"
    assert row["effective_rate"] == 1 - 8.5 / 16
    assert flops.ideal(TINY.model, [9]) < row["ideal"] < flops.ideal(TINY.model, [8])


def test_without_a_dense_step_nothing_is_compared():
    row = {"implementation": "maskdiff", "kind": "patch", "ideal": 2.0, "step_ms": 1.0}
    assert bench.compared([row]) == [{**row, "speedup": None, "retained": None, "share": None}]
    published = {"implementation": "published", "kind": "dense", "ideal": 1.0, "step_ms": 1.0}
    assert bench.compared([row, published])[0]["retained"] is None
    strong = {"implementation": "strong", "kind": "dense", "ideal": 1.0, "step_ms": 3.0}
    first, *_ = bench.compared([row, published, strong])
    assert first["retained"] == 1.5 and first["speedup"] is None and first["share"] == pytest.approx(4 / 3)


def test_equal_tokens_grow_the_batch(result):
    assert {row["mask"]: row["batch"] for row in result["equal_tokens"]} == {
        "dense": 4, "patch:0.5": 4 * 17 // 9, "patch:0.2-0.8": 7, "block2:0.5": 4 * 17 // 9
    }  # fmt: skip


def test_parts_make_up_the_step(result):
    assert list(result["parts_ms"]) == MASKS
    for parts in result["parts_ms"].values():
        assert list(parts) == [
            "draw", "gather and noise", "forward", "loss", "loss backward", "backward", "optimizer"
        ]  # fmt: skip
        assert all(value > 0 for value in parts.values())
        inside = parts["forward"] + parts["backward"]
        assert report.outside(parts) == pytest.approx(1 - inside / sum(parts.values()))


def test_every_implementation_that_can_run_is_switched_to(result):
    assert mk.chosen("cpu")["attention"] == "cpp"
    others = {"adamw_ema": {"torch", "reference"}, "attention": {"sdpa", "reference", "explicit"}}
    others |= {op: {"reference"} for op in ("draw_batch", "noisy_patches", "denoising_loss", "gelu", "layer_norm")}
    for mask in MASKS:
        rows = [row for row in result["kernels"] if row["mask"] == mask]
        assert rows[0]["op"] is None and rows[0]["ratio"] == 1
        found = {op: {row["implementation"] for row in rows if row["op"] == op} for op in others}
        assert all(others[op] <= found[op] for op in others)
        assert all(row["error"] is None and row["ratio"] > 0 and row["instead_of"] == "cpp" for row in rows[1:])


def test_a_switched_step_runs_what_it_says(monkeypatch):
    """Forward and backward, and an implementation that fails is a row."""
    ran = []
    explicit = mk.dispatch.implementations("attention")["explicit"].module
    for name in ("run", "run_backward"):
        original = getattr(explicit, name)
        monkeypatch.setattr(explicit, name, lambda *a, name=name, f=original: (ran.append(name), f(*a))[1])

    def broken(*arguments):
        raise ValueError("takes at most\n3 tokens")

    sdpa = mk.dispatch.implementations("attention")["sdpa"].module
    monkeypatch.setattr(sdpa, "forward", broken)  # what layers.attention calls
    stand = bench.Bench(TINY, 2, CPU, torch.float32)
    rows = {row["implementation"]: row for row in bench_kernels.choices(stand, ["patch:0.5"], 2)}
    assert ran == (["run"] * 3 + ["run_backward"] * 3) * 5  # once to see that it runs, two to warm, two measured
    assert rows["sdpa"]["error"] == "ValueError: takes at most 3 tokens" and "ratio" not in rows["sdpa"]
    assert mk.dispatch.asked("attention") == ("auto", "MASKDIFF_KERNELS")


def test_time_beyond_the_ideal_by_kernel(result, monkeypatch):
    for mask in MASKS[1:]:
        names = {row["kernel"] for row in result["by_kernel"][mask]}
        assert len(names) == bench_kernels.SHOWN + 1
        assert sum("others" in name for name in names) == 1
    times = {5.0: {"mm": (4, 8.0), "adam": (1, 1.0)}, 2.0: {"mm": (4, 5.0), "adam": (1, 1.0), "gather": (1, 0.5)}}
    answers = iter(times.values())
    monkeypatch.setattr(bench_kernels, "kernel_times", lambda step, device: next(answers))
    monkeypatch.setattr(flops, "ideal", lambda config, counts: 2.0)
    stand = bench.Bench(TINY, 2, CPU, torch.float32)
    rows = bench_kernels.by_kernel(stand, ["dense", "patch:0.5"])["patch:0.5"]
    assert [(row["kernel"], row["excess_ms"]) for row in rows] == [("mm", 1.0), ("adam", 0.5), ("gather", 0.5)]
    assert rows[2]["dense_calls"] == 0 and rows[0]["dense_calls"] == 4


def test_kernels_of_a_step_are_found():
    a, b = torch.randn(2, 300, 300)
    found = bench_kernels.kernel_times(lambda: (a @ b).relu() + a @ a, CPU)
    assert found["aten::mm"][0] == 2 and found["aten::relu"][0] == 1 and found["aten::mm"][1] > 0


def test_table_and_picture_show_every_row(result, tmp_path):
    from PIL import Image

    text = report.table(result)
    for row in result["rows"]:
        assert f"{row['step_ms']:.2f}" in text and f"{row['retained']:.1%}" in text
    assert all(name in text for name in ("patch 20-80%", "attention=sdpa", "outside"))
    assert all(row["kernel"][:60] in text for rows in result["by_kernel"].values() for row in rows)
    report.picture(result, tmp_path / "curve.png")
    pixels = Image.open(tmp_path / "curve.png").convert("RGB")
    assert pixels.size == (1500, 630)
    assert len({pixels.getpixel((x, y)) for x in range(0, 1500, 7) for y in range(0, 630, 7)}) > 10


def test_how_a_step_was_launched_is_said_where_it_differs(result):
    rows = [dict(row) for row in result["rows"]]
    assert not any("host" in line for line in report.contestants(rows, "fp32"))
    rows[0]["launches"], rows[1]["retained"] = "graph", None
    lines = report.contestants(rows, "fp32")
    assert "maskdiff (graph)" in lines[1] and "strong (host)" in lines[2]


# ---- clocks, on a card that is played ----


@pytest.fixture
def card(monkeypatch):
    """Plays a GPU whose events tell the number of calls made so far as milliseconds."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = log.count("call")
            log.append("event")

        def elapsed_time(self, end):
            return float(end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append(f"sleep {cycles}"))
    return log


def test_step_clock_takes_the_mean_of_many(card, monkeypatch):
    monkeypatch.setattr(measure.StepClock, "once", lambda self, call, device: 0.0124)
    reading = measure.StepClock()(lambda: card.append("call"), torch.device("cuda"))
    assert card == ["call", "event", *["call"] * 4, "event"] and reading() == pytest.approx(1e-3)


def test_part_clock_lets_the_host_run_ahead(card):
    clock = measure.PartClock(torch.device("cuda"), host_seconds=0.01)
    assert card == ["wait", "sleep 30000000", "event"]
    for part in ("a", "b", "a"):
        card.append("call")
        clock.mark(part)
    assert clock.parts() == {"a": 2.0, "b": 1.0} and card.count("wait") == 2


def test_a_step_that_cannot_be_a_graph_runs_by_itself(card, monkeypatch):
    def captured(call, device):
        if call is refuses:
            raise RuntimeError("operation not permitted when stream is capturing")
        return types.SimpleNamespace(call=call)

    monkeypatch.setattr(measure, "Captured", captured)
    refuses, works = (lambda: 1), (lambda: 2)
    assert measure.as_graph(refuses, torch.device("cuda")) == (refuses, "eager") and card == ["wait"]
    graph, launches = measure.as_graph(works, torch.device("cuda"))
    assert graph.call is works and launches == "graph"
    assert measure.as_graph(works, CPU) == (works, "host")


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
        (["--rates", "half"], "the rate 'half' is not a number or a range"),
        (["--rates", "0.5-1"], "from 0 to below 1, not '0.5-1'"),
        (["--rates", "0.9-0.5"], "runs from low to high"),
        (["--kinds", "dense"], "dense is always there"),
        (["--batch", "0"], "number from 1"),
        (["--preset", "celeba46"], "celeba64"),
        (["--kinds", "blok4", "--rates", "0.5"], "blok4"),
    ],
)
def test_bad_options_are_one_line(argv, message, monkeypatch):
    monkeypatch.setattr("sys.argv", ["bench", *argv])
    with pytest.raises(UserError, match=message):
        bench.main()


def test_masks_that_the_options_name():
    assert bench.mask_texts("patch,block4", "0.9,0.5,0") == [
        "dense", "patch:0.5", "block4:0.5", "patch:0.9", "block4:0.9"
    ]  # fmt: skip
    assert bench.mask_texts("patch", "0.5-0.9, 0.6,0.6") == ["dense", "patch:0.6", "patch:0.5-0.9"]
