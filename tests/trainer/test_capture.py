"""What a CUDA graph of a step rests on, shown on a CPU: nothing waits, nothing moves, nothing is baked in."""

import dataclasses
import json
from contextlib import nullcontext

import pytest
import torch
from small_step import BATCH, MODEL, SEED, mask_of, setup
from watching import NoReading, NoWaiting, Recorder

from maskdiff import capture, masking, step
from maskdiff.capture import Captured, Steps
from maskdiff.optim import Hyper
from maskdiff.reading import Staging
from maskdiff.step import accumulate, device_step, train_step, update_step
from maskdiff_kernels import dispatch
from maskdiff_kernels.ops.adamw_ema import op as adamw_op
from maskdiff_kernels.ops.attention import op as attention_op
from maskdiff_kernels.ops.denoising_loss import op as loss_op
from maskdiff_kernels.ops.draw_batch import op as draw_op
from maskdiff_kernels.ops.draw_batch import reference as draw_reference
from maskdiff_kernels.ops.noisy_patches import op as noisy_op

MASKS = ["dense", "patch:0.5", "block2:0.75", "crop:0.5", "patch:0.1-0.9", "block2:0.2-0.8", "crop:0.3-0.95"]
HYPERS = [Hyper(1e-3, 1.0), Hyper(2e-3, None), Hyper(0.0, 0.1), Hyper(5e-4, 1e-3)]


# ---- nothing waits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("mask", MASKS)
def test_a_step_never_waits_for_the_device(mask, dtype):
    state, source, objective = setup(dtype=dtype)
    staging = Staging(source, objective, mask_of(mask), SEED, BATCH)
    staging.hand_over(BATCH)
    for where in (source, staging.source):
        with NoWaiting(), NoReading():
            train_step(state, where, objective, mask_of(mask), SEED, BATCH, HYPERS[0])


CPU = torch.device("cpu")
WAITS = {
    "item": lambda x: x[0].item(),
    "list": lambda x: x.tolist(),
    "truth": lambda x: bool(x[0]),
    "number": lambda x: [1, 2, 3][x[0]],
    "copy": lambda x: x.cpu(),
    "array": lambda x: x.numpy(),
    "booleans": lambda x: x[x > 0],
    "booleans set": lambda x: x.index_put_((x > 0,), x[0]),
    "nonzero": lambda x: x.nonzero(),
    "select": lambda x: x.masked_select(x > 0),
    "repeats": lambda x: x.repeat_interleave(x),
    "bins": lambda x: torch.bincount(x),
    "segments": lambda x: torch.segment_reduce(x.float(), "sum", lengths=x[:1] + 1),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x + 0),
}


@pytest.mark.parametrize("fault", WAITS)
def test_a_step_that_waits_is_noticed(fault, monkeypatch):
    """Each way to wait, planted between the draw and the rest."""
    state, source, objective = setup()
    monkeypatch.setattr("maskdiff.step.draw", planted(step.draw, lambda batch: WAITS[fault](batch.keep_ids[0] * 0)))
    with pytest.raises(AssertionError, match="wait"), NoWaiting(), NoReading():
        train_step(state, source, objective, mask_of("patch:0.5"), SEED, BATCH, HYPERS[0])


def planted(function, fault):
    def with_fault(*arguments):
        result = function(*arguments)
        fault(result)
        return result

    return with_fault


@pytest.fixture
def device(monkeypatch):
    """Tensors without values, on a device that is no CPU, and the ops' references run on them: no op is a leaf."""
    for op, names in (
        (draw_op, ["_draw_batch"]), (noisy_op, ["_noisy_patches"]), (loss_op, ["_denoising_loss", "_backward"]),
        (attention_op, ["_attention", "_backward"]), (adamw_op, ["_adamw_ema"]),
    ):  # fmt: skip
        for name in names:
            run = getattr(op, "_run_backward" if name == "_backward" else "_run")
            monkeypatch.setattr(op, name, torch.no_grad()(run))
    monkeypatch.setattr(attention_op, "_as_given", lambda device: nullcontext())  # this device knows no autocast
    return torch.device("meta")


def step_on(device, mask):
    """A step of any implementation that a device without values can run: the references."""
    state, source, objective = setup(backend="reference", device=device, ema_every=2)
    seed = torch.zeros(1, dtype=torch.int64, device=device)
    with NoWaiting(), NoReading():
        return train_step(state, source, objective, mask_of(mask), seed, BATCH, HYPERS[0])


@pytest.mark.parametrize(
    ("mask", "adamw"),
    [(mask, "reference") for mask in ("dense", "patch:0.5", "block2:0.2-0.8", "crop:0.3-0.95")] + [("dense", "torch")],
)
def test_no_reference_waits_for_a_device(device, monkeypatch, mask, adamw):
    monkeypatch.setattr(torch, "_fused_adamw_", lambda *_, **__: None)  # this device has none
    choice = dispatch.choice
    names = {"adamw_ema": adamw, "attention": "reference"}
    monkeypatch.setattr(dispatch, "choice", lambda op, *rest, **more: names.get(op) or choice(op, *rest, **more))
    result = step_on(device, mask)
    assert all(figure.device == device for figure in tuple(vars(result).values()))


def test_a_reference_that_waits_for_a_device_is_noticed(device, monkeypatch):
    monkeypatch.setenv("MASKDIFF_KERNELS", "reference")
    constant = draw_reference._constant
    monkeypatch.setattr(draw_reference, "_constant", planted(constant, lambda x: x[0] + 1 == 2 and None))
    with pytest.raises((AssertionError, RuntimeError), match="wait|meta"):
        step_on(device, "patch:0.5")
    monkeypatch.setattr(draw_reference, "_constant", lambda numbers, where: torch.tensor(numbers).to(where))
    with pytest.raises(AssertionError, match="copies from"):
        step_on(device, "patch:0.5")


def test_walks_that_nobody_ends_are_enough():
    seed = torch.tensor([5])
    for images in (1, 2, 5, 17, 26, 50, 101, 300, 1000, 20000):
        base = max(a for a in range(200) if (a - 1) ** 2 < images)
        most, once = draw_reference._walks(images, base, False), draw_reference._walks(images, base, True)
        share = 1 - images / base**2
        assert 1 <= most <= once and (most == once or share**most <= 2**-96 < share ** (most - 1))
        n = torch.arange(min(3 * images, 2000))
        ended = draw_reference.shuffled(seed, n, images)
        assert torch.equal(walked(seed, n, images, most), ended)
        assert most == 1 or not torch.equal(walked(seed, n, images, 1), ended)
    assert most == 14 and once == 165  # of 20000 images


def walked(seed, n, images, walks):
    """`shuffled` with so many walks, whether or not they are needed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(draw_reference, "_walks", lambda *_: walks)
        patch.setattr(draw_reference, "bool", lambda ended: False, raising=False)
        return draw_reference.shuffled(seed, n, images)


# ---- nothing moves


def addresses(state, source, objective, seed):
    """Of everything that lives on between steps."""
    lasting = {name: p for name, p in state.model.named_parameters()}
    lasting |= {name: b for name, b in state.model.named_buffers()}
    for owner in (state, *state.adams, source.store, source, objective):
        for name, value in vars(owner).items():
            if isinstance(value, torch.Tensor):
                lasting[f"{type(owner).__name__}.{name}"] = value
    lasting["seed"] = seed
    return {name: (id(tensor), tensor.data_ptr()) for name, tensor in lasting.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_what_lives_on_stands_still(dtype):
    state, source, objective = setup(dtype=dtype)
    where, mask = addresses(state, source, objective, SEED), mask_of("patch:0.1-0.9")
    assert {"FlatState.hyper", "FlatState.next_sample", "AdamState.ema_step", "Store.patches", "seed"} <= where.keys()

    def step():
        train_step(state, source, objective, mask, SEED, BATCH, HYPERS[0])

    def still():
        assert addresses(state, source, objective, SEED) == where

    step()
    still()
    with state.ema_weights():
        assert addresses(state, source, objective, SEED) != where
    still()
    with pytest.raises(KeyError), state.kept():
        step()
        raise KeyError
    still()
    state.load({name: tensor.clone() for name, tensor in state.tensors().items()})
    state.fresh()
    state.sample = 64
    still()
    step()
    still()


# ---- nothing is baked in


def recorded(state, source, objective, mask, seed):
    """A step as a graph would hold it: recorded in a step that does not count, as captures are."""
    recorder = Recorder()
    with state.kept(), recorder:
        result = device_step(state, source, objective, mask, seed, BATCH)
    return recorder, tuple(vars(result).values())


def same(state, other):
    ours, theirs = state.tensors(), other.tensors()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert (state.sample, state.step, int(state.next_sample)) == (other.sample, other.step, int(other.next_sample))


@pytest.mark.parametrize(
    ("mask", "backend", "dtype"),
    [
        *((mask, "cpp", torch.float32) for mask in MASKS),
        ("patch:0.1-0.9", "cpp", torch.bfloat16),
        ("patch:0.5", "reference", torch.bfloat16),
        ("patch:0.1-0.9", "reference", torch.float32),
    ],
)
def test_a_recorded_step_replays_as_eager_steps(mask, backend, dtype, monkeypatch):
    if backend == "reference":
        monkeypatch.setenv("MASKDIFF_KERNELS", "reference")  # of attention and adamw_ema too
    mask, seed = mask_of(mask), SEED.clone()
    state, source, objective = setup(dtype=dtype, backend=backend, ema_every=2)
    eager = setup(dtype=dtype, backend=backend, ema_every=2)[0]
    recorder, results = recorded(state, source, objective, mask, seed)
    for hyper in HYPERS:
        state.tell(hyper)
        replayed = recorder.replay(results)
        state.made_step(BATCH)
        expected = train_step(eager, source, objective, mask, seed, BATCH, hyper)
        for got, wanted in zip(replayed, vars(expected).values(), strict=True):
            assert torch.equal(got.nan_to_num(), wanted.nan_to_num())
        same(state, eager)
        with state.ema_weights(), eager.ema_weights():
            pass
    seed += 1
    state.tell(HYPERS[0])
    other = recorder.replay(results)[0]
    assert other != train_step(eager, source, objective, mask, SEED, BATCH, HYPERS[0]).loss
    eager.load(state.tensors())
    for owner in (state, eager):
        owner.sample = 1000
    assert recorder.replay(results)[0] == device_step(eager, source, objective, mask, seed, BATCH).loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("mask", ["dense", "patch:0.1-0.9"])
def test_recomputed_blocks_wait_for_nothing_and_replay_as_kept_ones(mask, dtype):
    state, source, objective = setup(dtype=dtype)
    eager = setup(dtype=dtype)[0]
    state.model.recompute = True
    recorder, results = recorded(state, source, objective, mask_of(mask), SEED)
    for turn, hyper in enumerate(HYPERS):
        expected = train_step(eager, source, objective, mask_of(mask), SEED, BATCH, hyper)
        if turn % 2:
            with NoWaiting(), NoReading():
                train_step(state, source, objective, mask_of(mask), SEED, BATCH, hyper)
        else:
            state.tell(hyper)
            assert torch.equal(recorder.replay(results)[0], expected.loss)
            state.made_step(BATCH)
        same(state, eager)


def test_a_number_that_is_baked_in_is_noticed():
    state, source, objective = setup()
    recorder = Recorder()
    with state.kept(), recorder:
        loss, _ = accumulate(state, source, objective, mask_of("dense"), SEED.clone() + 0, BATCH)
    assert not torch.equal(recorder.replay(loss), recorder.replay(loss))  # the counter moves on
    recorder = Recorder()
    state.sample = 0
    with recorder:
        made = torch.full((), state.sample) + state.next_sample
    state.sample = 8
    assert recorder.replay(made) == 8


# ---- graphs of a run


class Pretended(Captured):
    """A graph for a CPU: what it does is done again at each replay, into the tensors that the first result lay in."""

    made: list["Pretended"] = []

    def __init__(self, call, device, shared=None):
        assert shared is None or shared in self.made
        for _ in range(3):
            self.result = call()
        self.call, self.replays = call, 0
        for value in self.figures(self.result):
            value.fill_(torch.nan)
        self.made.append(self)

    def figures(self, result):
        return [] if result is None else vars(result).values()  # a micro-batch's go to the state's sums

    def __call__(self):
        self.replays += 1
        for kept, value in zip(self.figures(self.result), self.figures(self.call()), strict=True):
            kept.copy_(value)
        return self.result


class Refused(Captured):
    """A capture that fails at its worst moment: steps were made, and gradients were left behind."""

    def __init__(self, call, device, shared=None):
        call()
        state = call.args[0]
        state.tell(Hyper(1.0, None))
        call()
        if call.func is not update_step:
            accumulate(*call.args[:6])
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nSearch for more")


class OnDevice(Steps):
    """Steps that are captured, though this is a CPU."""

    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named)
        self.captures = True


@pytest.fixture
def graphs(monkeypatch):
    monkeypatch.setattr(capture, "Captured", Pretended)
    Pretended.made = []
    return Pretended.made


def steps_of(captures=True, ahead=False, say=None, **options):
    state, source, objective = setup(**options)
    steps = Steps(state, source, objective, SEED, "auto", say or (lambda text: None), ahead)
    assert not steps.captures  # on a CPU
    steps.captures = captures
    return steps


SEQUENCE = ["patch:0.5", "patch:0.5", "dense", "patch:0.1-0.9", "patch:0.5", "dense", "block2:0.75", "patch:0.1-0.9"]


@pytest.mark.parametrize("ahead", [False, True], ids=["", "ahead"])
def test_captured_steps_are_eager_steps_and_stages_share_graphs(graphs, ahead):
    steps, eager = steps_of(ahead=ahead), steps_of(captures=False)
    for turn, mask in enumerate(SEQUENCE):
        hyper = HYPERS[turn % len(HYPERS)]
        got, expected = steps(mask_of(mask), BATCH, hyper), eager(mask_of(mask), BATCH, hyper)
        assert torch.equal(got.loss, expected.loss) and torch.equal(got.grad_norm, expected.grad_norm)
        assert torch.equal(got.loss_by_tenth.nan_to_num(), expected.loss_by_tenth.nan_to_num())
        same(steps.state, eager.state)
    assert [graph.replays for graph in graphs] == [3, 2, 2, 1]


@pytest.mark.parametrize("ahead", [False, True], ids=["", "ahead"])
def test_micro_batches_and_updates_are_captured_apart(graphs, ahead):
    steps, eager = steps_of(ahead=ahead), steps_of(captures=False)
    for turn, text in enumerate(SEQUENCE):
        mask, hyper = masking.resolve(masking.parse_mask(text), MODEL.grid, 2), HYPERS[turn % len(HYPERS)]
        got, expected = steps(mask, BATCH, hyper, 2), eager(mask, BATCH, hyper, 2)
        assert torch.equal(got.loss, expected.loss) and torch.equal(got.grad_norm, expected.grad_norm)
        assert torch.equal(got.loss_by_tenth.nan_to_num(), expected.loss_by_tenth.nan_to_num())
        same(steps.state, eager.state)
        assert not any(total.any() for total in steps.state.sums.gradients)  # nothing is left for the next step
    assert [graph.replays for graph in graphs] == [12, 3, 8, 2, 8, 2, 4, 1]  # four micro-batches, one update
    steps(mask, 4, hyper, 2)
    assert len(graphs) == 10  # of another batch each is another part


def test_preparing_counts_as_no_step(graphs):
    steps = steps_of()
    before = {name: tensor.clone() for name, tensor in steps.state.tensors().items()}
    steps.prepare(mask_of("dense"), BATCH)
    assert len(graphs) == 1 and (steps.state.step, steps.state.sample, int(steps.state.next_sample)) == (0, 0, 0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in steps.state.tensors().items())
    steps(mask_of("dense"), BATCH, HYPERS[0])
    steps(mask_of("dense"), 2, HYPERS[0])
    assert len(graphs) == 2  # another batch, another shape


@pytest.mark.parametrize("micro", [None, 4])
def test_a_capture_that_fails_says_why_and_loses_nothing(monkeypatch, micro):
    said = []
    monkeypatch.setattr(capture, "Captured", Refused)
    steps, eager = steps_of(say=said.append), steps_of(captures=False)
    for turn, text in enumerate(SEQUENCE):
        mask = masking.resolve(masking.parse_mask(text), MODEL.grid, micro or BATCH)
        steps(mask, BATCH, HYPERS[turn % len(HYPERS)], micro)
        eager(mask, BATCH, HYPERS[turn % len(HYPERS)], micro)
        same(steps.state, eager.state)
    if micro:
        assert len(said) == 8 and said[1].startswith("note: updates after steps of 4 images with up to 8 patches run")
        return
    assert len(said) == 4 and all(
        "\n" not in line and "not permitted when stream is capturing" in line for line in said
    )
    assert said[0].startswith("note: steps of 8 images with up to 8 patches run without a CUDA graph: RuntimeError: ")


def test_a_fault_of_the_step_itself_is_raised(graphs, monkeypatch):
    steps = steps_of()
    monkeypatch.setattr(steps.state.model, "forward", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        steps(mask_of("dense"), BATCH, HYPERS[0])


# ---- whole runs


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    pytest.importorskip("PIL")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASKDIFF_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def run(out, monkeypatch, captured, readings, *more):
    """A run that is broken off and resumed with another reading."""
    from maskdiff import checkpoint, training
    from maskdiff.options import parse

    monkeypatch.setattr(capture, "Captured", captured)
    monkeypatch.setattr(capture, "Steps", OnDevice if captured else Steps)
    argv = ["--data", "faces:200", "--precision", "fp32", "--device", "cpu", "--model.width", "32", "--model.blocks"]
    argv += ["3", "--model.heads", "1", "--probe-steps", "1", "--checkpoint-every", "3", "--heldout-every", "4"]
    argv += ["--sample-every", "5", "--sample-count", "2", "--sample-steps", "2", "--data.flip", "0.5"]
    argv += [
        "--stages",
        "patch:0.75 x5 b16 lr2e-3 w2 c1.0, patch:0.4-0.9 x4 b16 lr1e-3, patch:0.75 x3 b16 lr1e-3 fresh",
    ]
    config = dataclasses.replace(parse([*argv, *more]).config, out=str(out))
    first, then = (dataclasses.replace(config, data=dataclasses.replace(config.data, reading=r)) for r in readings)
    training.run(dataclasses.replace(first, max_steps=7))
    training.run(then, resume=True)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rows = [{key: row[key] for key in row if key not in ("step_ms", "train_s", "retained")} for row in rows]
    return rows, checkpoint.load(checkpoint.latest(out))[0]


def test_a_probe_times_steps_whose_patches_were_staged(cache, tmp_path, monkeypatch):
    """Two shapes take turns there: each goes on where it has fetched ahead."""
    late, hand_over = [], Staging.hand_over

    def counted(staging, first):
        late.append(bool(staging.coming) and staging.coming[0][0] != first)
        hand_over(staging, first)

    monkeypatch.setattr(Staging, "hand_over", counted)
    run(tmp_path / "run", monkeypatch, None, ("ahead", "ahead"), "--probe-steps", "4", "--max-steps", "1")
    probed = late[: 2 * (1 + 4)]
    assert len(probed) == 10 and not any(probed)


def test_runs_are_the_same_however_their_steps_are_launched_and_read(cache, tmp_path, monkeypatch, capsys):
    """Held-out losses, samples, checkpoints and a resume lie between the replays of a graph."""
    rows, tensors = run(tmp_path / "eager", monkeypatch, None, ("device", "mapped"))
    said = capsys.readouterr().out
    assert len(rows) == 12 and "CUDA graph" not in said
    assert "reading device: 0.6 MB of images, " in said and "reading mapped: 0.6 MB of images, " in said
    for name, captured, readings in (
        ("graphs", Pretended, ("ahead", "auto")),
        ("refused", Refused, ("mapped", "ahead")),
    ):
        Pretended.made = []
        got, theirs = run(tmp_path / name, monkeypatch, captured, readings)
        assert got == rows and all(torch.equal(theirs[key], tensors[key]) for key in tensors)
        if captured is Pretended:
            # twice in each of the three probes, and one for each shape of the run before and after it was broken off
            assert [graph.replays for graph in Pretended.made] == [2, 2, 5, 2, 2, 2, 2, 2, 2, 3]
        said = capsys.readouterr().out.count("run without a CUDA graph: RuntimeError: CUDA error: operation not")
        assert said == (4 if captured is Refused else 0)
