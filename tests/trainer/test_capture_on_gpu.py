"""CUDA graphs of steps on a GPU: `make gpu-test` runs these. They take PyTorch, NumPy and pytest alone."""

import dataclasses

import pytest
import torch
from small_step import BATCH, MODEL, mask_of, setup

from maskdiff import masking, reading
from maskdiff.capture import Captured, Steps
from maskdiff.memory import fitting
from maskdiff.optim import Hyper
from maskdiff.step import batch_loss, draw, train_step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device")

CUDA = torch.device("cuda", 0)
MASKS = ["dense", "patch:0.5", "block2:0.75", "patch:0.1-0.9"]
HYPERS = [Hyper(1e-3, 1.0), Hyper(2e-3, None), Hyper(0.0, 0.1), Hyper(5e-4, 1e-3)]


@pytest.fixture(params=["auto", "reference"])
def kernels(request, monkeypatch):
    """Whatever runs there by itself, and PyTorch alone."""
    if request.param != "auto":
        monkeypatch.setenv("MASKDIFF_KERNELS", request.param)


@pytest.fixture
def exact():
    """PyTorch sums in the same order every time, where it can: else no bits are the same."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


def steps_on(said=None, seed=1234, on_host=False, **options):
    """Steps whose images lie on the GPU, or `on_host`."""
    state, source, objective = setup(backend="auto", device=CUDA, **options)
    if on_host:
        source = dataclasses.replace(source, store=setup()[1].store)
    say = print if said is None else said.append
    return Steps(state, source, objective, torch.tensor([seed], device=CUDA), say=say)


def plain_step(steps, mask, hyper):
    return train_step(steps.state, steps.source, steps.objective, mask_of(mask), steps.seed, BATCH, hyper)


def same(state, other):
    ours, theirs = state.tensors(), other.tensors()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    assert (state.sample, state.step, int(state.next_sample)) == (other.sample, other.step, int(other.next_sample))


def heldout(steps):
    """What lies between the replays of a run: a loss of the EMA weights."""
    batch = draw(steps.source, steps.objective, mask_of("dense"), steps.seed, torch.arange(4, device=CUDA))
    source = reading.staged(steps.source, batch)
    with torch.no_grad(), steps.state.ema_weights() as model:
        dtype = steps.state.dtype
        return batch_loss(model, source, steps.objective, mask_of("dense"), batch, steps.seed, dtype)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("on_host", [False, True], ids=["resident", "staged"])
def test_captured_steps_are_eager_steps(kernels, exact, dtype, on_host):
    said: list[str] = []
    steps, eager = steps_on(said, on_host=on_host, dtype=dtype), steps_on(dtype=dtype)
    other = steps_on(seed=1, on_host=on_host, dtype=dtype)
    for turn, mask in enumerate([*MASKS, *MASKS, "patch:0.5", "patch:0.5"]):
        hyper = HYPERS[turn % len(HYPERS)]
        got, expected = steps(mask_of(mask), BATCH, hyper), plain_step(eager, mask, hyper)
        assert torch.equal(got.loss, expected.loss) and torch.equal(got.grad_norm, expected.grad_norm)
        assert torch.equal(got.loss_by_tenth.nan_to_num(), expected.loss_by_tenth.nan_to_num())
        assert torch.equal(heldout(steps), heldout(eager))
        assert other(mask_of(mask), BATCH, hyper).loss != got.loss
        same(steps.state, eager.state)
    assert said == [] and all(isinstance(steps.prepare(mask_of(mask), BATCH).part, Captured) for mask in MASKS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("captures", [False, True], ids=["eager", "captured"])
def test_updates_beside_the_backward_pass_are_those_after_it(kernels, exact, dtype, captures):
    said: list[str] = []
    steps, late = steps_on(said, dtype=dtype, overlap=True), steps_on(dtype=dtype)
    steps.captures = captures
    assert len(steps.state.adams) == MODEL.blocks + 1 and steps.state.beside is not None
    for turn, mask in enumerate([*MASKS, *MASKS, "patch:0.5", "patch:0.5"]):
        hyper = Hyper(1e-3 * (1 + turn % 3), None)
        got, expected = steps(mask_of(mask), BATCH, hyper), plain_step(late, mask, hyper)
        assert torch.equal(got.loss, expected.loss)
        torch.testing.assert_close(got.grad_norm, expected.grad_norm, rtol=1e-5, atol=0)
        same(steps.state, late.state)
    assert said == []


@pytest.mark.parametrize("on_host", [False, True], ids=["resident", "staged"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_captured_micro_batches_are_eager_ones(kernels, exact, on_host, recompute):
    said: list[str] = []
    steps, eager = steps_on(said, on_host=on_host, dtype=torch.bfloat16), steps_on(dtype=torch.bfloat16)
    eager.captures, steps.state.model.recompute = False, recompute
    for turn, text in enumerate([*MASKS, *MASKS]):
        mask, hyper = masking.resolve(masking.parse_mask(text), MODEL.grid, 4), HYPERS[turn % len(HYPERS)]
        got, expected = steps(mask, BATCH, hyper, 4), eager(mask, BATCH, hyper, 4)
        assert torch.equal(got.loss, expected.loss) and torch.equal(got.grad_norm, expected.grad_norm)
        assert torch.equal(got.loss_by_tenth.nan_to_num(), expected.loss_by_tenth.nan_to_num())
        same(steps.state, eager.state)
    assert said == []


def test_what_fits_is_found_by_trying(kernels, monkeypatch):
    steps = steps_on([])
    forward, image = steps.state.model.forward, torch.cuda.mem_get_info(CUDA)[0] // 5

    def large(x, timestep, *rest):
        held = torch.empty(len(timestep) * image, dtype=torch.uint8, device=CUDA)
        return forward(x, timestep, *rest) + 0 * held[0]

    monkeypatch.setattr(steps.state.model, "forward", large)
    assert fitting(steps, mask_of("dense"), BATCH, [1, 2, 4, 8]) == 4
    assert steps.state.step == 0


def test_stages_of_a_shape_share_a_graph_and_all_share_memory(kernels):
    steps = steps_on()
    graphs = [steps.prepare(mask_of(mask), BATCH).part for mask in (*MASKS, *MASKS)]
    assert graphs[: len(MASKS)] == graphs[len(MASKS) :] and len(set(graphs)) == len(MASKS)
    assert len({graph.graph.pool() for graph in graphs}) == 1


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("on_host", [False, True], ids=["resident", "staged"])
def test_no_step_waits(kernels, mask, on_host):
    captured, eager = steps_on(on_host=on_host), steps_on(on_host=on_host)
    eager.captures = False
    for steps in (captured, eager):
        steps(mask_of(mask), BATCH, HYPERS[0])  # loads and compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for hyper in HYPERS:
                steps(mask_of(mask), BATCH, hyper)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_step_that_reads_back_runs_without_a_graph(kernels, exact, monkeypatch):
    said: list[str] = []
    steps, eager = steps_on(said), steps_on()
    forward = steps.state.model.forward

    def reads(x, *rest):
        assert x.sum().item() != 0.5
        return forward(x, *rest)

    monkeypatch.setattr(steps.state.model, "forward", reads)
    for hyper in HYPERS:
        steps(mask_of("patch:0.5"), BATCH, hyper)
        plain_step(eager, "patch:0.5", hyper)
    same(steps.state, eager.state)
    assert len(said) == 1 and "run without a CUDA graph: " in said[0] and "\n" not in said[0]
    monkeypatch.undo()
    assert isinstance(steps.prepare(mask_of("dense"), BATCH).part, Captured)  # another shape is captured all the same


def test_images_that_take_too_much_of_the_device_stay_with_the_host(monkeypatch):
    store = setup()[1].store
    assert reading.resolve(store, CUDA).store.patches.is_cuda
    monkeypatch.setattr(reading, "RESIDENT", 0.0)
    ahead = reading.resolve(store, CUDA)
    assert ahead.store is store and ahead.mode == "ahead"
