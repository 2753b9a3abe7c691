"""Steps that fit in memory: gradients added up over micro-batches, blocks recomputed, and what fits found by trying."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from small_step import BATCH, MODEL, SEED, setup
from watching import LiveBytes

from maskdiff import checkpoint, masking, measure, memory, training
from maskdiff.capture import Steps
from maskdiff.errors import UserError
from maskdiff.model import ModelConfig, UViT
from maskdiff.optim import Hyper
from maskdiff.options import parse
from maskdiff.step import accumulate, micro_step

CPU = torch.device("cpu")


def in_fours(text):
    """A range of rates is spread over groups of four."""
    return masking.resolve(masking.parse_mask(text), MODEL.grid, 4)


# ---- gradients added up


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_steps_of_micro_batches_are_the_steps_of_the_batch(micro):
    """Ten updates with clipping: apart by what float32 rounds, and no more from step to step than at the first."""
    mask = in_fours("patch:0.1-0.9") if micro == 4 else in_fours("patch:0.5")
    (whole, *rest), (parts, *_) = setup(), setup()
    steps, others = (Steps(state, *rest, SEED) for state in (whole, parts))
    for _ in range(10):
        got, expected = others(mask, BATCH, Hyper(1e-3, 0.5), micro), steps(mask, BATCH, Hyper(1e-3, 0.5))
        assert got.loss.item() == pytest.approx(expected.loss.item(), rel=1e-4)
        assert got.grad_norm.item() == pytest.approx(expected.grad_norm.item(), rel=1e-4)
        assert torch.equal(got.loss_by_tenth.isnan(), expected.loss_by_tenth.isnan())
    assert (whole.sample, whole.step, int(whole.next_sample)) == (parts.sample, parts.step, int(parts.next_sample))
    moved = (whole.master - setup()[0].master).norm()
    assert (whole.master - parts.master).norm() < 1e-3 * moved


def test_a_step_with_a_gradient_that_is_not_finite_is_skipped_whole():
    state, source, objective = setup()
    steps = Steps(state, source, objective, SEED)
    before = state.master.clone()
    broken = dataclasses.replace(objective, alpha_sigma=objective.alpha_sigma.clone())
    broken.alpha_sigma[::2] = torch.inf  # some samples of a micro-batch
    assert Steps(state, source, broken, SEED)(in_fours("dense"), BATCH, Hyper(1e-3, None), 2).skipped == 1
    assert torch.equal(state.master, before)
    assert steps(in_fours("dense"), BATCH, Hyper(1e-3, None), 2).skipped == 0  # nothing of it is left
    assert state.master.isfinite().all() and not torch.equal(state.master, before)


def test_a_step_that_is_broken_off_between_micro_batches_leaves_nothing():
    state, source, objective = setup()
    with pytest.raises(KeyError), state.kept():
        micro_step(state, source, objective, in_fours("dense"), SEED, 4, 2)
        raise KeyError
    assert not state.sums.figures.any() and not any(total.any() for total in state.sums.gradients)


# ---- recomputed blocks


def test_recomputed_blocks_compiled_by_torch_compile_have_the_same_gradients():
    gradients = []
    for compiled, recompute in ((False, False), (True, False), (True, True)):
        torch.compiler.reset()
        state, source, objective = setup()
        state.model.recompute = recompute
        if compiled:
            state.model.compile_blocks(backend="eager")
        accumulate(state, source, objective, in_fours("patch:0.1-0.9"), SEED, BATCH)
        gradients.append(state.gradients())
    torch.compiler.reset()
    for plain, fused, again in zip(*gradients, strict=True):
        assert torch.equal(fused, again)
        torch.testing.assert_close(plain, again, rtol=1e-4, atol=1e-6)


def test_recomputing_takes_less_memory():
    """Of thirteen blocks' activations those of one, and the input of each."""
    model = UViT(ModelConfig(image_size=16, patch=2, width=32, blocks=13, heads=1))
    x, t = torch.randn(32, 64, 12), torch.arange(32)
    held, peaks = {}, {}
    for recompute in (False, True):
        model.recompute = recompute
        with LiveBytes() as live:
            loss = model(x, t).square().mean()
            held[recompute] = live.bytes
            loss.backward()
        peaks[recompute] = live.peak
    assert held[True] < held[False] / 8 and peaks[True] < peaks[False] / 4, (held, peaks)


# ---- whole runs


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASKDIFF_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


STAGES = "patch:0.25-0.75 x3 b32/16 lr2e-3 w2 c1.0, dense x4 b8/2 lr1e-3 fresh"


def tiny(out, *more):
    argv = ["--data", "faces:100", "--stages", STAGES, "--precision", "fp32", "--device", "cpu", "--probe-steps", "1"]
    argv += ["--model.width", "32", "--model.blocks", "3", "--model.heads", "2", "--data.flip", "0.5"]
    argv += ["--checkpoint-every", "2", "--heldout-every", "3", "--sample-every", "0", "--sample-count", "0"]
    return dataclasses.replace(parse([*argv, *more]).config, out=str(out))


def rows(run):
    """All but the times."""
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in row if key not in ("step_ms", "train_s", "retained")} for row in log]


def plans(run):
    return json.loads((run / "plans.json").read_text())


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, cache):
    out = tmp_path_factory.mktemp("unbroken") / "run"
    training.run(tiny(out))
    return out


@pytest.mark.parametrize("stop", [2, 5])  # in the range of rates, in the dense stage
def test_resume_is_bit_for_bit_with_micro_batches_recomputed_blocks_and_other_reading(unbroken, tmp_path, stop):
    out = tmp_path / "run"
    training.run(tiny(out, "--recompute", "--data.reading", "ahead", "--max-steps", str(stop)))
    training.run(tiny(out, "--recompute", "--data.reading", "mapped"), resume=True)
    assert rows(out) == rows(unbroken) and len(rows(out)) == 7  # recomputed or not, however images are read
    ours, theirs = (checkpoint.load(checkpoint.latest(run))[0] for run in (out, unbroken))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_batch_is_what_was_said(unbroken, tmp_path, capsys):
    """The log of micro-batches is that of whole batches, to rounding; another size on resume is taken, and said."""
    out = tmp_path / "run"
    training.run(tiny(out, "--micro-batch", "none", "--max-steps", "5"))
    capsys.readouterr()
    training.run(tiny(out, "--micro-batch", "16", "--stages.1.micro-batch", "5"), resume=True)
    assert "note: 8 images at a time were, 4 are: the run goes on, but not bit for bit" in capsys.readouterr().out
    assert [plans(out)[key]["micro"] for key in "01"] == [32, 4]  # the largest part of 8 that is no more than 5
    for got, expected in zip(rows(out), rows(unbroken), strict=True):
        assert got["images_seen"] == expected["images_seen"] and got["tokens"] == expected["tokens"]
        for key in {"loss", "grad_norm", "heldout_loss"} & expected.keys():
            assert got[key] == pytest.approx(expected[key], rel=1e-3)


# ---- what fits


@pytest.fixture
def small_memory(monkeypatch):
    """Four images at a time fit, whoever asks."""
    forward = UViT.forward

    def limited(model, x, timestep, *rest):
        if torch.is_grad_enabled() and len(timestep) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore of it")
        return forward(model, x, timestep, *rest)

    monkeypatch.setattr(UViT, "forward", limited)


def test_auto_takes_what_fits(small_memory, tmp_path, capsys):
    out = tmp_path / "run"
    training.run(tiny(out, "--stages", "patch:0.75 x2 b24 lr1e-3, dense x1 b4", "--batch", "auto", "--max-steps", "1"))
    assert "2 steps of 24 images (4 at a time), 16 of 64" in capsys.readouterr().out
    training.run(parse(["--resume", str(out), "--max-steps", "3"]).config, resume=True)
    assert [(plans(out)[key]["micro"], plans(out)[key]["asked"]) for key in "01"] == [(4, "auto"), (4, "auto")]
    assert [row["images_seen"] for row in rows(out)] == [24, 48, 52]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--stages", "dense x2 b24"],
         "stage 1 .--stages.0. 'dense': the memory of this machine does not hold steps of 24 images "
         "at a time; give --stages.0.micro-batch 4, which fits: .* batch of 24; or --recompute, which"),
        (["--stages", "dense x2 b24/8", "--recompute"], "steps of 8 images at a time; give .*micro-batch 4, .* of 24$"),
        (["--stages", "patch:0.2-0.5 x2 b32"], "steps of 32 images at a time; give --recompute, which takes less"),
        (["--stages", "patch:0.2-0.5 x2 b32/auto", "--recompute"], "of 16 images at a time; give a smaller model"),
    ],
)  # fmt: skip
def test_out_of_memory_says_what_would_fit(small_memory, tmp_path, words, said):
    with pytest.raises(UserError, match=said) as caught:
        training.run(tiny(tmp_path / "run", *words))
    assert "\n" not in str(caught.value)
    with pytest.raises(ZeroDivisionError):  # other errors stay what they are
        memory.suffices(lambda: 1 / 0, CPU)


@pytest.mark.parametrize("limit", [0, 1, 6, 59, 60])
def test_a_gpu_is_asked_by_trying(monkeypatch, limit):
    """The most first; what did not fit is given back."""
    tried, forgotten = [], []

    def attempt(steps, mask, batch, micro):
        tried.append(micro)
        if micro > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(memory, "attempt", attempt)
    monkeypatch.setattr(measure, "synchronize", lambda device: None)
    steps = SimpleNamespace(device=torch.device("cuda"), forget=lambda mask, batch, size: forgotten.append(size))
    sizes = [1, 2, 3, 5, 6, 10, 12, 15, 20, 30, 60]
    fits = [size for size in sizes if size <= limit]
    assert memory.fitting(steps, in_fours("dense"), 60, sizes) == (fits[-1] if fits else None)
    assert forgotten == [size for size in reversed(sizes) if size > limit] and tried == forgotten + fits[-1:]


@pytest.mark.parametrize(("room", "expected"), [(1e12, 64), (4.9e6, 8), (5.01e6, 16), (4.26e6, 4), (3.9e6, None)])
def test_a_host_is_asked_by_measuring(monkeypatch, room, expected):
    """4 MB and 62.5 kB an image: nothing is tried that is expected not to fit."""
    tried = []

    def peak(call, device):
        steps, mask, batch, size = call.args
        assert batch == (64 if size == 64 else 2 * size)
        tried.append(size)
        return 4_000_000 + 62_500 * size

    monkeypatch.setattr(measure, "peak_memory", peak)
    monkeypatch.setattr(memory, "attempt", lambda *_: None)
    monkeypatch.setattr(memory, "_room", lambda: room)
    sizes = [1, 2, 4, 8, 16, 32, 64]
    assert memory.fitting(SimpleNamespace(device=CPU), in_fours("dense"), 64, sizes) == expected
    assert all(4_000_000 + 62_500 * size <= room for size in tried[1:])
    monkeypatch.setattr(measure, "peak_memory", lambda call, device: None)
    with pytest.raises(UserError, match="cannot measure here .* give --micro-batch a number"):
        memory.fitting(SimpleNamespace(device=CPU), in_fours("dense"), 64, sizes)


def test_a_host_measures_what_steps_really_take():
    """A real step: its peak grows by the image, and with room for some eight of sixteen no more are taken."""
    torch.manual_seed(0)
    state, source, objective = setup()
    steps, mask = Steps(state, source, objective, SEED), in_fours("dense")
    if measure.peak_memory(lambda: None, CPU) is None:
        pytest.skip("this system does not say what a process takes")
    assert memory._room() > 0
    assert memory.fitting(steps, mask, 16, [1, 2, 4, 8, 16]) == 16
    assert (state.step, state.sample, int(state.next_sample)) == (0, 0, 0)
