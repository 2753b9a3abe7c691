"""The training step against an independent plain U-ViT on references, step by step."""

import math
from fractions import Fraction

import pytest
import torch
from small_step import BATCH, MODEL, SEED, setup

from maskdiff import masking
from maskdiff.baselines import PlainUViT
from maskdiff.optim import Hyper
from maskdiff.step import batch_loss, draw, loss_by_tenth, micro_step, train_step
from maskdiff_kernels.ops.denoising_loss import reference as loss_reference
from maskdiff_kernels.ops.noisy_patches import reference as noisy_reference
from maskdiff_kernels.ops.samples import Samples, flatten


def ours(state, source, objective, mask, batch):
    loss, _ = batch_loss(state.model, source, objective, mask, batch, SEED, state.dtype)
    loss.backward()
    grads = {segment.name: grad for segment, grad in zip(state.segments, state.gradients(), strict=True)}
    return loss.detach(), grads


def plain(weights, source, objective, mask, batch, compute):
    """The same by PlainUViT and the references, the model in `compute`: in float64 it is the truth."""
    model = PlainUViT(MODEL)
    model.load_state_dict(weights)
    model.to(compute)
    samples = Samples(*flatten(source.store, batch, objective.alpha_sigma, SEED))
    exact = torch.promote_types(compute, torch.float32)
    noisy = noisy_reference.run(samples, compute, exact)
    label = source.labels[batch.image_ids].masked_fill(batch.drop_label[:, None], -1)
    ids = None if mask.kind == "dense" else batch.keep_ids
    if batch.cu_patches is None:
        prediction = model.forward_visible(noisy, batch.timestep, ids, label)
        size = prediction.numel()
    else:  # one sample at a time
        cuts = batch.cu_patches[1:-1].tolist()
        each = zip(noisy.tensor_split(cuts), batch.timestep[:, None], ids.tensor_split(cuts), label, strict=True)
        outs = [model.forward_visible(x[None], t, own[None], words[None])[0] for x, t, own, words in each]
        prediction = torch.cat(outs)
        size = torch.cat([torch.full((len(out), 1), float(BATCH * out.numel())) for out in outs])
    loss, _, error = loss_reference.run(prediction.detach(), samples, objective.target, objective.weight, True, exact)
    prediction.backward(error / size)
    return loss, {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}


def error(value, truth):
    """The norm, as in test_model.py: the largest error of some hundred tiny numbers is a matter of luck."""
    return (value.double() - truth).norm().item()


RANGES = ["patch:0.1-0.9", "block2:0.2-0.8", "crop:0.3-0.95"]


@pytest.mark.parametrize("mask", ["dense", "patch:0.5", "block2:0.75", "crop:0.5", *RANGES])
@pytest.mark.parametrize(("target", "min_snr"), [("v", None), ("eps", 5.0), ("x0", None)])
def test_every_step_obeys_the_fp64_rule(mask, target, min_snr):
    check_steps(mask, target, min_snr, torch.float32)


@pytest.mark.parametrize("mask", ["dense", "patch:0.5", "patch:0.1-0.9"])
def test_every_step_obeys_the_fp64_rule_in_bf16(mask):
    check_steps(mask, "v", None, torch.bfloat16)


def check_steps(mask, target, min_snr, dtype):
    """Trains with kernels; before each step the plain model takes the same weights, and the gradients are compared."""
    state, source, objective = setup(target, dtype, min_snr)
    mask = masking.resolve(masking.parse_mask(mask), MODEL.grid, BATCH)
    found = []
    for _ in range(4):
        n = torch.arange(state.sample, state.sample + BATCH)
        found.append(three_ways(state, source, objective, mask, draw(source, objective, mask, SEED, n)))
        before = state.sample
        train_step(state, source, objective, mask, SEED, BATCH, Hyper(1e-2, 1.0))
        assert state.sample == before + BATCH  # the next step sees new samples
    check(found, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("mask", ["dense", "patch:0.1-0.9"])
def test_the_sum_over_micro_batches_obeys_the_fp64_rule(mask, dtype):
    """As the gradient of the whole batch, which it is."""
    state, source, objective = setup(dtype=dtype)
    mask, sums = masking.resolve(masking.parse_mask(mask), MODEL.grid, 2), state.sums  # a range in groups of two
    found = []
    for first in range(0, 4 * BATCH, BATCH):
        for _ in range(4):
            micro_step(state, source, objective, mask, SEED, 2, 4)
        assert int(state.next_sample) == first + BATCH and all(g.dtype == torch.float32 for g in sums.gradients)
        batch = draw(source, objective, mask, SEED, torch.arange(first, first + BATCH))
        added = {segment.name: g.clone() for segment, g in zip(state.segments, sums.gradients, strict=True)}
        found.append(((sums.figures[0].clone(), added), *three_ways(state, source, objective, mask, batch)[1:]))
        with torch.no_grad():
            per_sample = batch_loss(state.model, source, objective, mask, batch, SEED, state.dtype)[1]
        if batch.cu_patches is not None:
            expected = loss_by_tenth(per_sample, batch.cu_patches, MODEL.patches)
            torch.testing.assert_close(sums.figures[1:], expected, rtol=1e-2, atol=0, equal_nan=True)
        sums.zero()
    check(found, dtype)


def three_ways(state, source, objective, mask, batch):
    """A batch's (loss, gradients by name): ours, plain PyTorch's, and the exact ones."""
    weights = {name: p.detach().float().clone() for name, p in state.model.named_parameters()}
    given = (source, objective, mask, batch)
    return ours(state, *given), *(plain(weights, *given, dtype) for dtype in (state.dtype, torch.float64))


def check(found, dtype, said=""):
    """The fp64 rule for what three_ways found in several steps, together: one step's error is a matter of luck."""
    unit = torch.finfo(dtype).eps / 2
    names = found[0][2][1].keys()
    assert all(grads.keys() == names for step in found for _, grads in step)
    check_norms([[loss for loss, _ in step] for step in found], 2, unit, f"{said} loss")
    for name in names:
        check_norms([[grads[name] for _, grads in step] for step in found], 3, unit, f"{said} {name}")


def check_norms(steps, times, unit, said):
    """The error of ours at most `times` plain PyTorch's and one rounding."""
    ours, plains, truth = map(torch.stack, zip(*steps, strict=True))
    allowed = times * error(plains, truth) + unit * truth.norm().item()
    assert error(ours, truth) <= allowed, f"{said}: error {error(ours, truth):.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize(
    ("mask", "split"),
    [("patch:0.5", (8,)), ("patch:0.5", (4, 4)), ("patch:0.5", (1, 7)), ("patch:0.1-0.9", (4, 4))],
)
def test_samples_do_not_depend_on_how_they_are_batched(mask, split):
    state, source, objective = setup()
    mask = masking.resolve(masking.parse_mask(mask), MODEL.grid, min(split))  # of a range: groups of four
    with torch.no_grad():
        losses = [
            batch_loss(state.model, source, objective, mask, draw(source, objective, mask, SEED, n), SEED, state.dtype)[
                1
            ]
            for n in torch.arange(8).split(list(split))
        ]
        whole = draw(source, objective, mask, SEED, torch.arange(8))
        expected = batch_loss(state.model, source, objective, mask, whole, SEED, state.dtype)[1]
    torch.testing.assert_close(torch.cat(losses), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mask", RANGES)
def test_the_loss_of_a_tenth_is_the_mean_over_its_samples(mask):
    state, source, objective = setup()
    mask = masking.resolve(masking.parse_mask(mask), MODEL.grid, BATCH)
    batch = draw(source, objective, mask, SEED, torch.arange(BATCH))
    with torch.no_grad():
        loss, per_sample = batch_loss(state.model, source, objective, mask, batch, SEED, state.dtype)
    tenths: dict[int, list[float]] = {}
    for count, value in zip(batch.cu_patches.diff().tolist(), per_sample.tolist(), strict=True):
        tenths.setdefault(int(Fraction(MODEL.patches - count, MODEL.patches) * 10), []).append(value)
    result = train_step(state, source, objective, mask, SEED, BATCH, Hyper(1e-3, 1.0))
    for tenth, value in enumerate(result.loss_by_tenth.tolist()):
        expected = sum(tenths[tenth]) / len(tenths[tenth]) if tenth in tenths else math.nan
        assert value == pytest.approx(expected, rel=1e-6, nan_ok=True)
    assert result.loss.item() == pytest.approx(loss.item(), rel=1e-6)
    assert loss.item() == pytest.approx(per_sample.mean().item(), rel=1e-6)


def test_rates_at_the_edge_of_a_tenth():
    """A rate of 0.9 is not below 0.9; a loss that is not finite stays in its own place."""
    cu_patches = torch.tensor([0, 10, 19, 20, 22]).int()  # 0, 1, 9 and 8 of ten hidden
    got = loss_by_tenth(torch.tensor([1.0, 2.0, torch.inf, 4.0]), cu_patches, 10).tolist()
    assert [got[tenth] for tenth in (0, 1, 9, 8)] == [1.0, 2.0, math.inf, 4.0]
    assert all(math.isnan(got[tenth]) for tenth in range(2, 8))
    assert train_step(
        *setup(), masking.resolve(masking.parse_mask("dense"), MODEL.grid), SEED, 2, Hyper(1e-3, 1.0)
    ).loss_by_tenth.shape == (0,)


def test_another_seed_gives_another_step():
    results = []
    for seed in (1, 2):
        state, source, objective = setup()
        mask = masking.resolve(masking.parse_mask("patch:0.5"), MODEL.grid, BATCH)
        results.append(train_step(state, source, objective, mask, torch.tensor([seed]), BATCH, Hyper(1e-3, 1.0)).loss)
    assert results[0] != results[1]
