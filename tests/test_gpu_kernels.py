"""The kernel benchmarks' own machinery, on the CPU: rows, resuming, failures, the time budget, peers, the choice."""

import functools
import inspect
import json
import math
import os
import subprocess
import sys
import types
from pathlib import Path

import attention_peers
import bench_adamw_ema
import gpu_kernels
import judging
import peers
import pytest
import records
import torch
from attention_peers import Problem

import maskdiff_kernels as mk
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


def test_what_was_edited_is_measured_again(bench, monkeypatch, tmp_path):
    """A commit's name alone, "...-dirty" or "unversioned", does not change with an edit."""
    edited = [tmp_path / "csrc" / "a.cu", *(tmp_path / folder / "a.py" for folder in records.MEASURED[1:])]
    for path in edited:
        path.parent.mkdir()
        path.write_text("1")
    monkeypatch.setattr(records, "ROOT", tmp_path)
    first = bench()[2]
    assert "0 of 1 cases to measure" in bench()[1]
    for path in edited:
        path.write_text("2")
        status, output, rows = bench()
        assert "1 of 1 cases to measure" in output and len(rows) == len(first) and rows[0]["ms"] != first[0]["ms"]
        assert len({row["sources"] for row in rows} | {first[0]["sources"]}) == 2


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
    assert found["torch_wrong"]["wrong"] and not found["torch_raises"]["wrong"]
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
    assert [(row["implementation"], row["wrong"]) for row in rows if row["error"]] == [("sdpa", True)]


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
    monkeypatch.setattr(peers, "compiled", lambda call: torch.compile(call, backend="eager"))  # in a tenth of the time
    assert set(gpu_kernels.OPS) == set(dispatch._OPS)
    for op, cases in gpu_kernels.OPS.items():
        case = next(cases(CPU))
        build, judge = case.open()
        ours = {"cpp"} & set(records.ours(op))
        assert case.fixed["op"] == op and case.work and case.peers() and {*ours, *case.peers()} <= set(case.names)
        for name in (*ours, *case.peers()):
            assert judge(name, build(name)()) == "", (op, name)


def test_unlike():
    whole = torch.tensor([1, 2, 4])
    single, half = whole.float(), whole.bfloat16()
    assert judging.unlike([whole], [torch.tensor([1, 2, 3])]) != ""
    assert judging.unlike([single + 1e-4], [single]) != "" == judging.unlike([single + 1e-6], [single])
    assert judging.unlike([half + 0.01], [half]) == "" != judging.unlike([half + 0.1], [half])
    assert judging.unlike([single * torch.nan], [single]) != "" != judging.unlike([single], [half])
    total, many = torch.tensor(1.0), torch.ones(10_000)  # the sum of many may be 100 roundings off
    assert judging.unlike([total + 1e-5, many], [total, many]) == ""
    assert judging.unlike([total + 1e-5], [total]) != "" != judging.unlike([total + 2e-5, many], [total, many])


@pytest.fixture
def updates(monkeypatch):
    """The bench's updates of few parameters, by what stands in for the kernels and is given the real op."""
    monkeypatch.setattr(bench_adamw_ema, "PARAMETERS", 160 * 160)
    real = mk.adamw_ema

    def play(stand_in):
        def update(state, *arguments, backend):
            run = functools.partial(real, state, *arguments, backend=backend)
            return stand_in(state, run) if backend == "cpp" else run()

        monkeypatch.setattr(bench_adamw_ema.mk, "adamw_ema", update)
        cases = list(gpu_kernels.OPS["adamw_ema"](CPU))
        assert [case.fixed["case"] for case in cases] == ["fp32", "bf16"]
        return cases

    return play


@pytest.mark.parametrize("name", ["master", "exp_avg", "exp_avg_sq", "ema", "low", "adam_step"])
def test_an_update_that_leaves_a_part_of_the_state(updates, name):
    """Its norm is right."""

    def restores(state, run):
        part = getattr(state, name)
        before = part.clone() if part is not None else None
        result = run()
        if part is not None:
            part.copy_(before)
        return result

    for case in updates(restores):
        build, judge = case.open()
        wrong = (name, case.fixed["case"]) != ("low", "fp32")  # where there is no copy
        assert (judge("cpp", build("cpp")()) != "") == wrong


def test_updates_are_judged_from_a_fresh_state(updates, card, monkeypatch):
    """Capturing calls them several times over, and a replay once more."""

    class Captured:
        def __init__(self, call, device):
            self.call, self.result = call, [call() for _ in range(4)][-1]

        def __call__(self):
            self.call()

    monkeypatch.setattr(measure, "Captured", Captured)
    for case in updates(lambda state, run: run()):
        assert card.run(case, ["cpp", "torch"])
        rows = card.kept.of(*case.key)
        assert {name: (row["launches"], row["error"]) for name, row in rows.items()} == {
            "cpp": ("graph", None),
            "torch": ("graph", None),
        }


@pytest.mark.parametrize("low", [None, torch.bfloat16])
@pytest.mark.parametrize("name", ["fused", "torch_compiled"])
def test_peers_of_adamw_ema_do_its_work(monkeypatch, name, low):
    """The weights, moments and copy after a step from zero moments; their averages have a decay of their own."""
    monkeypatch.setattr(peers, "compiled", lambda call: call)
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(48, generator=generator).to(low or torch.float32) for _ in range(3)]
    master = torch.randn(144, generator=generator)
    copies = [None if low is None else master.to(low) for _ in range(2)]
    theirs, ours = ([master.clone(), torch.zeros(144), torch.zeros(144), master.clone()] for _ in range(2))
    monkeypatch.setattr(bench_adamw_ema, "CLIP", 0.5)  # reached
    bench_adamw_ema.PEERS[name](theirs, grads, copies[0])()
    counts = torch.zeros(()), torch.zeros(())
    state = mk.AdamState(*ours, *counts, [0, 48, 96], [48] * 3, [True] * 3, low=copies[1])
    fixed = (bench_adamw_ema.BETAS, bench_adamw_ema.EPS, bench_adamw_ema.DECAY, 0.999)
    mk.adamw_ema(state, grads, torch.tensor([bench_adamw_ema.LR, 0.5]), *fixed, backend="reference")
    for number in (0,) if name == "fused" else (0, 1, 2):  # that one keeps moments of its own
        torch.testing.assert_close(theirs[number], ours[number], rtol=1e-5, atol=1e-7)
        assert not torch.equal(theirs[number], master)
    assert not torch.equal(theirs[3], master) and (low is None or torch.equal(*copies))


def test_peers_of_apex_take_what_they_are_given():
    pytest.importorskip("amp_C")
    options = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    inspect.signature(peers.apex("optimizers", "FusedAdam")).bind([], **options, capturable=True)
    norm = peers.apex("normalization.fused_layer_norm", "mixed_dtype_fused_layer_norm_affine")
    inspect.signature(norm).bind("input", "weight", "bias", (8,), 1e-5)
    pytest.importorskip("triton")
    swa = peers.apex("contrib.openfold_triton.fused_adam_swa", "FusedAdamSWA")
    inspect.signature(swa).bind([], [], [], 0.999, **options, adam_math_mode=None)
    inspect.signature(swa.step).bind(swa, grad_clip_scale=1.0)


def test_a_peer_that_is_absent_is_an_import_error(monkeypatch):
    with pytest.raises(ImportError, match="^no NVIDIA apex with optimizers.FusedOther is installed"):
        peers.apex("optimizers", "FusedOther")


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
    captured.graph, captured.result = types.SimpleNamespace(replay=lambda: log.append("call")), None
    assert clock(captured, CPU)() == 1.5 and log == ["sweep", "event", "call", "event"]
    log.clear()
    clock(lambda: log.append("call"), CPU)
    assert log == ["sweep"] * 10 + ["event", "call", "event"]


# ---- by pytest ----


def test_a_bench_file_judges_before_it_times(tmp_path):
    bench = tmp_path / "bench_draw_batch.py"
    bench.write_text("""
import pytest, torch

def build(case):
    return lambda: torch.tensor(2.0 if case == "wrong-cpp" else 1.0), 1.0, "bytes"

@pytest.mark.parametrize("case", ["right", "wrong"])
def test(in_turns, case):
    in_turns(build, case, ("cpp", "reference"))
""")
    folder = Path(gpu_kernels.__file__).parent
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "conftest", "--import-mode=importlib", "-q", str(bench)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *filter(None, sys.path)])},
        capture_output=True,
        text=True,
    )
    assert "cpp: result 0: error 1.00e+00" in done.stdout and "1 failed, 1 passed" in done.stdout, done.stdout


# ---- rows ----


def test_ratios_are_of_the_same_round():
    samples = {"cpp": [1.0, 2.0, 4.0], "a": [2.0, 2.0, 2.0], "b": [1.0, 3.0, 9.0], records.COPY: [1.0, 1.0, 1.0]}
    rows = records.timed(records.fixed("op", "x-bf16"), samples, ["a", "b"], {"bytes": 6e6, "images": 4}, 8e6)
    found = {row["implementation"]: row for row in rows}
    assert list(found) == ["cpp", "a", "b"] and {row["best_peer"] for row in rows} == {"a"}
    assert found["cpp"]["ratio"] == 1.0 and found["cpp"]["ratios"]["p80"] == pytest.approx(1.6)
    assert found["a"]["ratio"] == 1.0 and found["b"]["ratio"] == pytest.approx(2 / 3)
    assert found["cpp"]["gbs"] == 3.0 and found["cpp"]["copy_gbs"] == 8.0 and found["cpp"]["copy_share"] == 0.375
    assert {row["rounds"] for row in rows} == {3}
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
    factories = {**attention_peers.peers(CPU, ragged), "cpp": functools.partial(attention_peers.ours, backend="cpp")}
    assert ("torch_each" in factories) == ragged  # padding to the longest is not the best that PyTorch can do
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
