"""Updates that overlap with the backward pass: the same bits, block by block, and what that gives up."""

from contextlib import contextmanager

import pytest
import torch
from small_step import BATCH, SEED, mask_of, setup

from maskdiff import optim
from maskdiff.capture import Steps
from maskdiff.optim import Hyper, Updating
from maskdiff.step import train_step

BLOCKS = 3  # of small_step's model


def states(dtype=torch.float32, **options):
    """A state with updates in the backward pass, one without, and what both learn from."""
    early, source, objective = setup(dtype=dtype, weight_decay=0.1, overlap=True, **options)
    return early, setup(dtype=dtype, weight_decay=0.1, **options)[0], source, objective


def same(one, other):
    ours, theirs = one.tensors(), other.tensors()
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    assert torch.equal(one.low, other.low) and (one.sample, one.step) == (other.sample, other.step)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "options", [{"ema_every": 3}, {"ema2": "power:0.1"}, {"optimizer": "torch"}, {"optimizer": "reference"}]
)
def test_the_same_bits(dtype, options):
    early, late, source, objective = states(dtype, **options)
    assert len(early.adams) == BLOCKS + 1 and len(late.adams) == 1
    for turn, mask in enumerate(["dense", "patch:0.5", "patch:0.1-0.9", "block2:0.75"]):
        place = source, objective, mask_of(mask), SEED, BATCH, Hyper(1e-3 * (turn + 1), None)
        got, expected = train_step(early, *place), train_step(late, *place)
        assert torch.equal(got.loss, expected.loss) and not got.skipped
        torch.testing.assert_close(got.grad_norm, expected.grad_norm, rtol=1e-6, atol=0)
        same(early, late)
    assert early.adam_step == 4


def test_parts_cover_every_parameter_once():
    early, late, *_ = states(torch.bfloat16)
    assert [number for span in early.spans for number in span] == list(range(len(early.segments)))
    for block, span in enumerate(early.spans[:-1]):
        names = {early.segments[number].name for number in span}
        products = {f"blocks.{block}.{name}" for name, p in early.model.blocks[block].named_parameters()}
        assert names == {name for name in products if "norm" not in name}
    assert [s.offset for s in early.segments] == [s.offset for s in late.segments]


def test_blocks_are_updated_while_the_backward_pass_goes_on(monkeypatch):
    early, _, source, objective = states()
    order, update = [], optim._update

    def watched(state, part, grads):
        with_gradient = {n for n, p in state.model.named_parameters() if p.grad is not None}
        order.append(
            (part, {int(n.split(".")[1]) for n in with_gradient if n.startswith("blocks.") and "norm" not in n})
        )
        return update(state, part, grads)

    monkeypatch.setattr(optim, "_update", watched)
    train_step(early, source, objective, mask_of("patch:0.5"), SEED, BATCH, Hyper(1e-3, None))
    # from the last block to the first; when one is updated no other one holds gradients
    assert order == [(2, set()), (1, set()), (0, set()), (3, set())]
    assert all(p.grad is None for p in early.params)


@pytest.mark.parametrize("by_hand", [True, False], ids=["whole", "parts"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_nothing_reads_the_weights_of_a_block_after_its_update(monkeypatch, dtype, by_hand):
    """They become NaN there: all gradients stay what they are without."""
    if not by_hand:
        monkeypatch.setattr("maskdiff.whole_block.takes", lambda block, x: False)
    early, late, source, objective = states(dtype)
    update, seen = optim._update, []

    def poisoned(state, part, grads):
        seen.append([grad.clone() for grad in grads])
        result = update(state, part, grads)
        for number in state.spans[part]:
            state.params[number].data.fill_(torch.nan)
        return result

    place = source, objective, mask_of("patch:0.5"), SEED, BATCH, Hyper(0.0, None)
    monkeypatch.setattr(optim, "_update", poisoned)
    train_step(early, *place)
    train_step(late, *place)
    *blocks, rest, every = seen
    gradients = [grad for block in reversed(blocks) for grad in block] + rest
    assert len(blocks) == BLOCKS and all(torch.equal(*pair) for pair in zip(gradients, every, strict=True))
    assert all(grad.isfinite().all() for grad in every)


def test_nonfinite_gradients_of_a_block_leave_that_block_alone():
    early, _, source, objective = states()
    place = source, objective, mask_of("patch:0.5"), SEED, BATCH, Hyper(1e-2, None)
    train_step(early, *place)
    before = {name: tensor.clone() for name, tensor in early.tensors().items()}
    early.tell(Hyper(1e-2, None))
    grads = [torch.ones(s.shape) for s in early.segments]
    grads[early.spans[1][0]].view(-1)[3] = torch.nan
    norm, skipped = optim.adamw_ema(early, grads)
    assert skipped == 1 and norm.isnan()
    kept = {segment.name for segment in early.segments[early.spans[1].start : early.spans[1].stop]}
    for name, tensor in early.tensors().items():
        part, _, parameter = name.partition(".")
        assert torch.equal(tensor, before[name]) == (parameter in kept), name
    assert early.adam_step == 2
    train_step(early, *place)  # and all go on from one count
    assert early.adam_step == 3 and set(early.counts.flatten().tolist()) == {3.0}


def test_nonfinite_gradients_of_all_change_nothing():
    early, _, source, objective = states()
    place = source, objective, mask_of("patch:0.5"), SEED, BATCH, Hyper(1e-2, None)
    train_step(early, *place)
    with torch.no_grad():
        early.params[-1].view(-1)[0] = torch.inf
    before = {name: tensor.clone() for name, tensor in early.tensors().items()}
    result = train_step(early, *place)
    assert result.skipped == 1 and not result.grad_norm.isfinite()
    assert [name for name, tensor in early.tensors().items() if not torch.equal(tensor, before[name])] == []


def test_micro_batches_update_at_the_end():
    early, late, source, objective = states()
    for turn in range(3):
        hyper = Hyper(1e-3 * (turn + 1), None)
        for state in (early, late):
            Steps(state, source, objective, SEED)(mask_of("patch:0.5"), BATCH, hyper, BATCH // 2)
        same(early, late)


@pytest.mark.parametrize("how", ["recompute", "kept", "compile"])
def test_other_ways_of_a_step(how):
    early, late, source, objective = states()
    place = source, objective, mask_of("patch:0.5"), SEED, BATCH, Hyper(1e-3, None)
    if how == "recompute":
        early.model.recompute = late.model.recompute = True
    elif how == "compile":
        for state in (early, late):
            for block in state.model.blocks:
                block.compile(backend="aot_eager")
    else:
        with early.kept():
            train_step(early, *place)
        same(early, late)
    train_step(early, *place), train_step(late, *place)
    same(early, late)


def test_a_clip_is_refused():
    early, late, *_ = states()
    late.tell(Hyper(1e-3, 1.0))
    with pytest.raises(ValueError, match=r"clip takes the norm of all gradients: it does not go with optim\.overlap"):
        early.tell(Hyper(1e-3, 1.0))


def test_hooks_stay_no_longer_than_the_step():
    early, _, source, objective = states()
    with pytest.raises(ZeroDivisionError), Updating(early):
        raise ZeroDivisionError
    sum(p.float().sum() for p in early.params).backward()
    assert all(p.grad is not None for p in early.params)
    early.gradients()
    train_step(early, source, objective, mask_of("dense"), SEED, BATCH, Hyper(1e-3, None))
    assert early.step == 1


def test_a_parameter_without_gradient_is_named():
    early, *_ = states()
    early.tell(Hyper(1e-3, None))
    with Updating(early) as update:
        sum(p.float().sum() for name, p in early.model.named_parameters() if name != "blocks.1.fc1.bias").backward()
    with pytest.raises(ValueError, match=r"blocks\.1\.fc1\.bias has no gradient"):
        update.finish()


def test_order_of_streams_on_a_gpu(monkeypatch):
    """Without one: streams that write down what they are told."""
    early, late, source, objective = states()
    said: list[tuple] = []

    class Stream:
        device = "cuda:0"

        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            said.append((self.name, "waits for", other.name))

    main, now = Stream("main"), ["main"]

    @contextmanager
    def stream(chosen):
        now.append(chosen.name)
        yield
        now.pop()

    update = optim._update

    def watched(state, part, grads):
        said.append((now[-1], "updates", part))
        return update(state, part, grads)

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(optim, "_update", watched)
    early.beside = Stream("beside")
    place = source, objective, mask_of("patch:0.5"), SEED, BATCH, Hyper(1e-3, None)
    train_step(early, *place)
    blocks = [step for n in (2, 1, 0) for step in (("beside", "waits for", "main"), ("beside", "updates", n))]
    assert said == [*blocks, ("main", "waits for", "beside"), ("main", "updates", 3)]
    monkeypatch.undo()
    train_step(late, *place)
    same(early, late)


def test_a_stream_that_was_never_begun_is_not_waited_for(monkeypatch):
    """A CUDA graph takes that amiss, and would hide why the step failed."""
    early, *_ = states()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: pytest.fail("waits"))
    early.beside = object()
    with pytest.raises(ZeroDivisionError), Updating(early):
        raise ZeroDivisionError


def test_memory_of_gradients_is_held_while_a_stream_reads_them(monkeypatch):
    early, _, source, objective = states()

    class Stream:
        device = "cuda:0"

        def wait_stream(self, other):
            waits.append(other)

    waits: list = []
    main = Stream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda chosen: contextmanager(lambda: iter([None]))())
    early.beside = Stream()
    early.tell(Hyper(1e-3, None))
    with Updating(early) as update:
        sum(p.float().sum() for p in early.params).backward()
        assert len(update.read) == sum(len(span) for span in early.spans[:-1])
    assert update.read == [] and waits[-1] is early.beside
