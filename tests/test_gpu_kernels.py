"""The kernel benchmarks' own machinery, on the CPU: rows, resuming, failures, the time budget, peers, the choice."""

import functools
import json
import math
import os
import types

import attention_peers
import bench_adamw_ema
import choices
import gpu_kernels
import pytest
import records
import torch
from attention_peers import Problem

from maskdiff import measure
from maskdiff_kernels import dispatch

CPU = torch.device("cpu")
ONE = "L 5 equal, d 64, 4 x 2, forward + backward"
NAMES = {"cpp", "sdpa", "explicit", "torch_sdpa", "torch_explicit"}


@pytest.fixture
def bench(tmp_path, monkeypatch, capsys):
    """Runs the command on the CPU; gives its exit status, its output and the rows it leaves."""

    def run(*options: str) -> tuple[int, str, list[records.Row]]:
        path = tmp_path / "rows.json"
        argv = ["gpu_kernels.py", "--device=cpu", "--rounds=2", f"--out={path}", "--commit=one", "--ops=attention"]
        monkeypatch.setattr("sys.argv", [*argv, "--only", ONE, *options])
        status = gpu_kernels.main()
        return status, capsys.readouterr().out, records.read(path) if path.exists() else []

    return run


def never(*arguments):
    raise AssertionError("measured again")


# ---- the command ----


def test_every_contestant_has_a_row_and_a_line(bench):
    status, output, rows = bench()
    assert status == 0 and {row["implementation"] for row in rows} == NAMES
    for row in rows:
        assert row["op"] == "attention" and row["case"] == ONE and row["dtype"] == "fp32" and row["error"] is None
        assert row["peer"] == row["implementation"].startswith("torch_") and row["launches"] == "host"
        assert row["device"] == dispatch.device_key(CPU) and row["commit"] == "one" and row["card"] and row["versions"]
        assert 0 < row["ms"]["p20"] <= row["ms"]["p50"] <= row["ms"]["p80"]
        assert row["gflops"] == pytest.approx(14 * 5**2 * 64 * 8 / row["ms"]["p50"] / 1e6)
        assert row["gbs"] == pytest.approx((8 * 5 * (12 * 64 * 4 + 8)) / row["ms"]["p50"] / 1e6)
        assert row["copy_share"] == pytest.approx(row["gbs"] / row["copy_gbs"]) and row["card_copy_gbs"] > 0
        assert records.line(row) in output
    assert "1 of 1 cases to measure" in output and "x as fast as torch_" in output


def test_finished_rows_are_skipped(bench, monkeypatch):
    first = bench()[2]
    with monkeypatch.context() as patch:
        patch.setattr(gpu_kernels.Runner, "run", never)
        status, output, rows = bench()
        assert status == 0 and rows == first and "0 of 1 cases to measure" in output
        with pytest.raises(AssertionError, match="measured again"):
            bench("--commit=two")
    rows = bench("--commit=two")[2]
    assert len(rows) == len(first) and {row["commit"] for row in rows} == {"two"}


def test_a_case_that_lacks_a_row_runs_whole(bench, tmp_path):
    """Only what runs in turns can be compared."""
    first = {row["implementation"]: row for row in bench()[2]}
    del first["sdpa"]
    (tmp_path / "rows.json").write_text(json.dumps(list(first.values())))
    again = {row["implementation"]: row for row in bench()[2]}
    assert set(again) == NAMES and all(again[name]["ms"] != first[name]["ms"] for name in first)


def test_a_peer_that_fails_is_a_row(bench, monkeypatch):
    calls = []

    def raises(problem):
        calls.append("raises")
        raise RuntimeError("no kernel\nfor this")

    def wrong(problem):
        calls.append("wrong")
        right = attention_peers.explicit(problem)
        return lambda qkv: right(qkv) * 1.01

    monkeypatch.setattr(attention_peers, "ANYWHERE", {"torch_raises": raises, "torch_wrong": wrong})
    status, output, rows = bench()
    found = {row["implementation"]: row for row in rows}
    assert status == 0 and set(found) == {"cpp", "sdpa", "explicit", "torch_raises", "torch_wrong"}
    assert found["torch_raises"]["error"] == "RuntimeError: no kernel for this" and found["torch_raises"]["ms"] is None
    assert found["torch_wrong"]["error"].startswith("output: error") and found["torch_wrong"]["ms"] is None
    assert found["cpp"]["ms"] and "ratio" not in found["cpp"]
    assert "torch_raises" in output and "no kernel for this" in output
    calls.clear()
    assert bench()[2] == rows and calls == []  # what failed at this commit fails again


def test_our_own_wrong_result_is_an_error(bench, monkeypatch):
    right = attention_peers.ours
    monkeypatch.setattr(
        attention_peers,
        "ours",
        lambda problem, name: (lambda x: right(problem, name)(x).mul(2)) if name == "sdpa" else right(problem, name),
    )
    status, output, rows = bench()
    assert status == 1 and f"WRONG attention {ONE} fp32 sdpa: output: error" in output
    assert [row["implementation"] for row in rows if row["error"]] == ["sdpa"]


def test_no_time_left(bench):
    status, output, rows = bench("--minutes=0")
    assert status == 0 and rows == [] and "1 cases are left; the same command goes on: attention L 5" in output
    status, output, rows = bench()
    assert len(rows) == len(NAMES) and "are left" not in output


def test_time_runs_out_within_a_case(bench, monkeypatch):
    """What was prepared is measured; the case counts as left, and runs whole next time."""
    answers = iter([False, False, False, True, True, True])
    with monkeypatch.context() as patch:
        patch.setattr(gpu_kernels.Runner, "late", lambda self: next(answers))
        status, output, rows = bench()
    assert status == 0 and {row["implementation"] for row in rows} == {"cpp", "sdpa"} and "1 cases are left" in output
    assert {row["implementation"] for row in bench()[2]} == NAMES


@pytest.mark.parametrize(("option", "said"), [("--device=cuda", "sees no CUDA device"), ("--ops=sum", "no op 'sum'")])
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_bad_options(bench, capsys, option, said):
    with pytest.raises(SystemExit) as error:
        bench(option)
    assert error.value.code == 2 and said in capsys.readouterr().err


def test_every_op_has_cases(monkeypatch):
    monkeypatch.setattr(bench_adamw_ema, "PARAMETERS", 160 * 160)
    assert set(gpu_kernels.OPS) == set(dispatch._OPS)
    for op, cases in gpu_kernels.OPS.items():
        case = next(cases(CPU))
        build, judge = case.open()
        assert case.fixed["op"] == op and case.work and {"cpp", *case.peers()} < set(case.names)
        for name in ("cpp", *case.peers()):
            assert judge(name, build(name)()) == "", (op, name)
    changed = torch.tensor([1, 2, 4])
    assert gpu_kernels.unlike([changed], [torch.tensor([1, 2, 3])], torch.float32) != ""
    assert gpu_kernels.unlike([changed + 1e-4], [changed.float()], torch.float32) != ""
    assert gpu_kernels.unlike([changed + 1e-4], [changed.float()], torch.bfloat16) == ""
    assert gpu_kernels.unlike([changed * torch.nan], [changed.float()], torch.bfloat16) != ""
    assert gpu_kernels.unlike([changed.float()], [changed], torch.bfloat16) != ""


def test_cases_of_a_card(monkeypatch):
    """The lengths, dtypes and peers that a GPU is asked for, without one."""
    monkeypatch.setattr(dispatch, "able", lambda op, device: ["cuda", "triton", "sdpa", "reference"])
    cases = list(gpu_kernels.attention(torch.device("cuda")))
    assert len({case.key for case in cases}) == len(cases)
    shapes = [(case.fixed["shape"], case.fixed["dtype"], case) for case in cases]
    for ragged in (False, True):
        for backward in (False, True):
            main = [s for s, dtype, _ in shapes if s["ragged"] == ragged and s["backward"] == backward]
            lengths = {s["length"] for s in main if s["width"] == 64}
            assert lengths == {27, 33, 65, 129, 257, 288, 417, 513}
    assert all(s["batch"] * s["heads"] == 2048 for s, _, _ in shapes)
    assert {(s["width"], dtype) for s, dtype, _ in shapes} == {(64, "bf16"), (32, "bf16"), (128, "bf16"), (64, "fp16")}
    assert (257, 288) in {(s["length"], s["longest"]) for s, _, _ in shapes}
    assert (
        set(cases[0].names) == {"cuda", "triton", "sdpa", *attention_peers.ON_CUDA}
        and "reference" not in cases[0].names
    )
    for _, _, case in shapes:
        assert ("torch_flex" in case.names) == (case.fixed["shape"]["width"] == 64 and case.fixed["dtype"] == "bf16")


@pytest.mark.parametrize(("count", "mean", "most"), [(256, 27, None), (256, 257, 288), (256, 513, None), (4, 5, None)])
def test_stratified_lengths(count, mean, most):
    lengths = gpu_kernels.stratified(count, mean, most)
    assert len(lengths) == count and abs(sum(lengths) - count * mean) <= count / 64
    assert max(lengths) <= (most or 1.5 * mean) and min(lengths) >= 2 * mean - (most or 1.5 * mean)
    assert len(set(lengths)) == len(range(min(lengths), max(lengths) + 1)) or count < mean  # none left out
    assert sorted(lengths) != list(lengths)


# ---- on a card, played ----


@pytest.fixture
def card(monkeypatch, tmp_path):
    """A runner that takes the CPU for a GPU."""
    monkeypatch.setattr(measure, "ColdClock", lambda device: measure.wall_clock)
    monkeypatch.setattr(measure, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    memory_copy = measure.memory_copy
    monkeypatch.setattr(measure, "memory_copy", lambda device, size: memory_copy(CPU, 1024))
    kept = records.Records(tmp_path / "rows.json", {**records.stamp(CPU, "one"), "card": "a card"})
    return gpu_kernels.Runner(kept, torch.device("cuda"), 3, math.inf)


def a_case(**calls) -> gpu_kernels.Case:
    """Of the op attention, whose results are right if they are 1."""
    judge = lambda name, result: "" if result == 1 else f"got {result}"  # noqa: E731
    return gpu_kernels.Case(
        {"op": "attention", "case": "x", "shape": {}, "dtype": "bf16"}, {"bytes": 1.0}, tuple(calls),
        lambda: (lambda name: calls[name], judge),
    )  # fmt: skip


def test_graphs_where_they_can_be(card, monkeypatch):
    class Captured:
        def __init__(self, call, device):
            if call is asks:
                raise RuntimeError("operation not permitted when stream is capturing")
            self.result = 7 if call is turns else call()

        def __call__(self):
            return None

    monkeypatch.setattr(measure, "Captured", Captured)
    right, asks, turns = (lambda: 1), (lambda: 1), (lambda: 1)
    case = a_case(cuda=right, torch_asks=asks, torch_turns=turns)
    assert card.run(case, card.missing(case)) and card.missing(case) == []
    rows = card.kept.of(*case.key)
    assert rows["cuda"]["launches"] == "graph" and rows["torch_asks"]["launches"] == "eager"
    assert rows["torch_turns"]["error"] == "as a CUDA graph: got 7" and rows["cuda"]["best_peer"] == "torch_asks"
    assert len(rows["cuda"]["ratios"]) == 3 and rows["cuda"]["card"] == "a card"


def test_inputs_that_cannot_be_made(card):
    def open():
        raise MemoryError("too large")

    case = gpu_kernels.Case({"op": "attention", "case": "x", "shape": {}, "dtype": "bf16"}, {}, ("cuda", "sdpa"), open)
    assert card.run(case, card.missing(case)) and card.missing(case) == []
    assert {row["error"] for row in card.kept.of(*case.key).values()} == {"MemoryError: too large"}


def test_a_device_that_answers_no_more(card, monkeypatch, tmp_path):
    """The row is kept, nothing else is tried in this process."""

    def breaks():
        monkeypatch.setattr(measure, "synchronize", fails)
        fails()

    def fails(device=None):
        raise RuntimeError("CUDA error: an illegal memory access")

    case = a_case(torch_breaks=breaks, cuda=never)
    assert not card.run(case, card.missing(case)) and card.broken
    assert records.read(tmp_path / "rows.json")[0]["error"] == "RuntimeError: CUDA error: an illegal memory access"
    assert card.missing(case) == ["cuda"]


def test_starting_anew(bench, monkeypatch):
    def broken(self, case, names):
        self.broken = True
        return False

    class Replaced(Exception):
        pass

    def execv(program, arguments):
        raise Replaced(*arguments)

    monkeypatch.setattr(gpu_kernels.Runner, "run", broken)
    monkeypatch.setattr(os, "execv", execv)
    with pytest.raises(Replaced) as replaced:
        bench()
    assert replaced.value.args[1] == "gpu_kernels.py" and replaced.value.args[-2:] == ("--commit", "one")
    assert 0 < float(replaced.value.args[-3]) <= 7.5


def test_cold_clock(monkeypatch):
    """The sweeps come before the first event, the call between both."""
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def elapsed_time(self, end):
            return 1500.0

    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(L2_cache_size=1 << 20)
    )
    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock, total = measure.ColdClock(CPU), torch.sum
    assert clock.buffer.nbytes == 256 << 20
    clock.buffer = clock.buffer[:1000]
    monkeypatch.setattr(torch, "sum", lambda *a, **k: (log.append("sweep"), total(*a, **k)))
    captured = measure.Captured.__new__(measure.Captured)
    captured.graph = types.SimpleNamespace(replay=lambda: log.append("call"))
    assert clock(captured, CPU)() == 1.5 and log == ["sweep", "event", "call", "event"]
    log.clear()
    clock(lambda: log.append("call"), CPU)
    assert log == ["sweep"] * 10 + ["event", "call", "event"]


# ---- rows ----


def test_ratios_are_of_the_same_round():
    samples = {"cpp": [1.0, 2.0, 4.0], "a": [2.0, 2.0, 2.0], "b": [1.0, 3.0, 9.0], records.COPY: [1.0, 1.0, 1.0]}
    rows = records.timed(records.fixed("op", "x-bf16"), samples, ["a", "b"], {"bytes": 6e6, "images": 4}, 8e6)
    found = {row["implementation"]: row for row in rows}
    assert list(found) == ["cpp", "a", "b"] and {row["best_peer"] for row in rows} == {"a"}
    assert found["cpp"]["ratio"] == 1.0 and found["cpp"]["ratios"]["p80"] == pytest.approx(1.6)
    assert found["a"]["ratio"] == 1.0 and found["b"]["ratio"] == pytest.approx(2 / 3)
    assert found["cpp"]["gbs"] == 3.0 and found["cpp"]["copy_gbs"] == 8.0 and found["cpp"]["copy_share"] == 0.375
    assert found["cpp"]["images_per_s"] == 2000 and "gflops" not in found["cpp"] and found["cpp"]["dtype"] == "bf16"
    alone = records.timed(records.fixed("op", "x"), {"cpp": [1.0], records.COPY: [1.0]}, [], {"flops": 1e6}, 1.0)[0]
    assert "ratio" not in alone and alone["gflops"] == 1.0 and "copy_share" not in alone
    assert "x as fast" not in records.line({**alone, "error": None})


def test_a_file_is_never_half_written(tmp_path, monkeypatch):
    path, stamp = tmp_path / "deep" / "rows.json", records.stamp(CPU, "one")
    kept = records.Records(path, stamp)
    kept.add(records.failed(records.fixed("op", "x"), "a", True, "why"))
    before = path.read_text()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", never)
        with pytest.raises(AssertionError):
            kept.add(records.failed(records.fixed("op", "y"), "a", True, "why"))
    assert path.read_text() == before
    other = records.Records(path, {**stamp, "card": "another"})
    other.add(records.failed(records.fixed("op", "x"), "a", True, "why"))
    assert len(other.rows) == 2 and other.of("op", "x", "-").keys() == {"a"}
    assert records.Records(path, {**stamp, "commit": "two"}).of("op", "x", "-") == {}
    for text in ("{", "[1]", '[{"op": 1}]', "{}}"):
        path.write_text(text)
        with pytest.raises(ValueError, match="rows.json: no file of measured kernels"):
            records.Records(path, stamp)


def test_names_of_files():
    assert records.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


# ---- peers ----

PROBLEMS = {"equal": ((17, 17, 17), False), "ragged": ((5, 300, 17, 40, 1), True)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mix", PROBLEMS)
def test_peers_do_the_same_work(mix, dtype):
    lengths, ragged = PROBLEMS[mix]
    problem = Problem(lengths, 2, 32, dtype, ragged=ragged)
    judge = problem.judge()
    factories = {**attention_peers.ANYWHERE, "cpp": functools.partial(attention_peers.ours, backend="cpp")}
    for name, factory in factories.items():
        out, grad = problem.run(factory(problem))()
        assert judge((out, grad)) == "" and out.is_contiguous() and grad.is_contiguous(), name
        assert judge((out,)) == judge(problem.run(factory(problem), backward=False)()) == ""
    assert judge((out * 1.1, grad)).startswith("output: error")
    assert judge((out, grad * 1.1)).startswith("gradient: error")
    assert judge((out.flip(0), grad)) != "" and judge((out * torch.nan, grad)) != ""
    assert judge((out.double(), grad)) == f"output: torch.float64 {list(out.flatten(0, -2).shape)}"
    flex = attention_peers.flex(problem, compile=False)
    assert judge(problem.run(flex, backward=False)()) == ""  # it has no backward on the CPU


def test_mask_of_documents():
    from torch.nn.attention.flex_attention import create_block_mask

    problem = Problem((5, 300, 17, 40, 1, 500), 2, 32, torch.float32, ragged=True)
    sequence, tokens = problem.sequences(), sum(problem.lengths)
    every = create_block_mask(lambda b, h, q, k: sequence[q] == sequence[k], None, None, tokens, tokens, device="cpu")
    assert torch.equal(attention_peers._document_mask(problem).to_dense(), every.to_dense())


# ---- the choice ----


def measured(implementation: str, longest: int, ms: float | None, case: str = "x", **more) -> records.Row:
    shape = {"longest": longest, "backward": True}
    row = {"op": "attention", "case": f"{case}{longest}", "shape": shape, "dtype": "bf16", "device": "cuda:9.0"}
    row |= {"implementation": implementation, "ms": ms and {"p50": ms}, "error": None if ms else "cannot"}
    return {"card": "a card", "commit": "one", **row, **more}


def test_choice_by_length():
    rows = [
        measured(name, n, ms) for n in (27, 65) for name, ms in (("cuda", 1.0), ("sdpa", 2.0), ("torch_flash", 0.1))
    ]
    assert choices.chosen(rows) == {"cuda:9.0": {"attention": "cuda"}}  # a peer is no choice
    rows += [measured("cuda", 257, None), measured("sdpa", 257, 3.0), measured("explicit", 257, 4.0)]
    assert choices.chosen(rows) == {"cuda:9.0": {"attention": [[65, "cuda"], [None, "sdpa"]]}}
    rows += [measured("sdpa", 288, 1.02), measured("explicit", 288, 1.0)]  # not faster by enough
    assert choices.chosen(rows)["cuda:9.0"]["attention"] == [[65, "cuda"], [None, "sdpa"]]
    rows += [measured("sdpa", 512, 1.1), measured("explicit", 512, 1.0)]
    assert choices.chosen(rows)["cuda:9.0"]["attention"] == [[65, "cuda"], [288, "sdpa"], [None, "explicit"]]
    forward = [measured("explicit", 27, 0.1)]
    forward[0]["shape"]["backward"] = False
    assert choices.chosen(rows + forward) == choices.chosen(rows)


def test_only_cases_that_all_ran_count():
    rows = [measured("cuda", 27, 1.0), measured("sdpa", 27, 2.0), measured("sdpa", 27, 0.01, "y")]
    assert choices.fastest(rows) == "cuda"
    rows += [measured("cuda", 27, 0.1, "y")]
    assert choices.fastest(rows) == "sdpa"
    with pytest.raises(ValueError, match="attention: no case was run by all of cuda, sdpa"):
        choices.fastest([measured("cuda", 27, 1.0), measured("sdpa", 27, 1.0, "y")])


def test_the_table_is_rewritten_on_request_alone(tmp_path, capsys):
    table, rows = tmp_path / "choices.json", tmp_path / "rows.json"
    table.write_text(choices.TABLE.read_text())
    measured_rows = [measured("cuda", 65, 1.0), measured("cuda", 288, None), measured("sdpa", 288, 1.0)]
    measured_rows += [
        {**measured(name, 1, ms), "op": "draw_batch", "shape": {}, "device": "cpu:avx2"}
        for name, ms in (("cpp", 1.0), ("reference", 2.0), ("torch", 0.1))
    ]
    rows.write_text(json.dumps(measured_rows))
    before = table.read_text()
    assert choices.main([str(rows)], table) == 0 and table.read_text() == before
    assert 'cuda:9.0 attention: null -> [[65, "cuda"], [null, "sdpa"]]' in capsys.readouterr().out
    assert choices.main([str(rows), "--write"], table) == 0
    found = dispatch.read_table(table.read_text())
    assert found["cuda:9.0"] == {"attention": ((65, "cuda"), (math.inf, "sdpa"))}
    assert found["cpu:avx2"] == {"draw_batch": "cpp"}
    assert {name: found[name] for name in ("cpu", "cuda")} == dispatch.read_table(before)
    assert choices.text(json.loads(before)) == before
    rows.write_text("[1]")
    assert choices.main([str(rows), "--write"], table) == 1 and "no file of measured" in capsys.readouterr().err
