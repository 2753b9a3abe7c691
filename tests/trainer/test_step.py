"""The training step against an independent plain U-ViT on references, step by step; and no waiting."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from maskdiff import masking
from maskdiff.baselines import PlainUViT
from maskdiff.config import OptimConfig
from maskdiff.diffusion import Diffusion, DiffusionConfig
from maskdiff.model import ModelConfig, UViT
from maskdiff.optim import FlatState, Hyper
from maskdiff.step import Objective, Source, batch_loss, draw, train_step
from maskdiff_kernels import Store
from maskdiff_kernels.ops.denoising_loss import reference as loss_reference
from maskdiff_kernels.ops.noisy_patches import reference as noisy_reference
from maskdiff_kernels.ops.samples import Samples, flatten

BATCH, SEED = 8, torch.tensor([1234])
MODEL = ModelConfig(image_size=16, channels=3, patch=4, width=32, blocks=3, heads=2, classes=(3, 2))


def setup(target="v", dtype=torch.float32, min_snr=None, backend="cpp"):
    generator = torch.Generator().manual_seed(0)
    patches = torch.randint(256, (20, MODEL.patches, MODEL.patch_dim), dtype=torch.uint8, generator=generator)
    labels = torch.stack(
        [torch.randint(-1, 3, (20,), generator=generator), torch.randint(2, (20,), generator=generator)], 1
    )
    source = Source(Store(patches, MODEL.grid, 4), torch.arange(20), labels.int())
    diffusion = Diffusion(DiffusionConfig(schedule="cosine", target=target, min_snr=min_snr))
    objective = Objective(diffusion.alpha_sigma, diffusion.weight, target, 0.5, 0.25, backend)
    torch.manual_seed(0)
    return FlatState(UViT(MODEL), OptimConfig(), dtype), source, objective


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
    prediction = model.forward_visible(noisy, batch.timestep, ids, label)
    loss, _, error = loss_reference.run(prediction.detach(), samples, objective.target, objective.weight, True, exact)
    prediction.backward(error / prediction.numel())
    return loss, {name: parameter.grad for name, parameter in model.named_parameters()}


def error(value, truth):
    return (value.double() - truth).abs().max().item()


@pytest.mark.parametrize("mask", ["dense", "patch:0.5", "block2:0.75", "crop:0.5"])
@pytest.mark.parametrize(("target", "min_snr"), [("v", None), ("eps", 5.0), ("x0", None)])
def test_every_step_obeys_the_fp64_rule(mask, target, min_snr):
    check_steps(mask, target, min_snr, torch.float32)


@pytest.mark.parametrize("mask", ["dense", "patch:0.5"])
def test_every_step_obeys_the_fp64_rule_in_bf16(mask):
    check_steps(mask, "v", None, torch.bfloat16)


def check_steps(mask, target, min_snr, dtype):
    """Trains with kernels; before each step the plain model takes the same weights, and the gradients are compared."""
    state, source, objective = setup(target, dtype, min_snr)
    mask = masking.resolve(masking.parse_mask(mask), MODEL.grid, BATCH)
    unit = torch.finfo(dtype).eps
    for _ in range(4):
        n = torch.arange(state.sample, state.sample + BATCH)
        batch = draw(source, objective, mask, SEED, n)
        weights = {name: p.detach().float().clone() for name, p in state.model.named_parameters()}
        loss, grads = ours(state, source, objective, mask, batch)
        plain_loss, plain_grads = plain(weights, source, objective, mask, batch, dtype)
        true_loss, true_grads = plain(weights, source, objective, mask, batch, torch.float64)
        allowed = 2 * error(plain_loss, true_loss) + unit * true_loss.abs().item()
        assert error(loss, true_loss) <= allowed, f"loss: error {error(loss, true_loss):.2e}, allowed {allowed:.2e}"
        assert grads.keys() == true_grads.keys()
        for name, truth in true_grads.items():
            allowed = 3 * error(plain_grads[name], truth) + unit * truth.abs().max().item()
            got = error(grads[name], truth)
            assert got <= allowed, f"{name}: error {got:.2e}, allowed {allowed:.2e}"
        before = state.sample
        train_step(state, source, objective, mask, SEED, BATCH, Hyper(1e-2, 1.0))
        assert state.sample == before + BATCH  # the next step sees new samples


@pytest.mark.parametrize("split", [(8,), (4, 4), (1, 7)])
def test_samples_do_not_depend_on_how_they_are_batched(split):
    state, source, objective = setup()
    mask = masking.resolve(masking.parse_mask("patch:0.5"), MODEL.grid, BATCH)
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


def test_another_seed_gives_another_step():
    results = []
    for seed in (1, 2):
        state, source, objective = setup()
        mask = masking.resolve(masking.parse_mask("patch:0.5"), MODEL.grid, BATCH)
        results.append(train_step(state, source, objective, mask, torch.tensor([seed]), BATCH, Hyper(1e-3, 1.0)).loss)
    assert results[0] != results[1]


class NoWaiting(TorchDispatchMode):
    """Fails where a step would have to wait for the device: a value read by the host, a shape that depends on data."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name in (
            "aten::_local_scalar_dense",
            "aten::nonzero",
            "aten::masked_select",
            "aten::is_nonzero",
            "aten::equal",
        ):
            raise AssertionError(f"{name} makes the host wait for the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mask", ["dense", "patch:0.5"])
def test_a_step_never_waits_for_the_device(mask):
    state, source, objective = setup()
    mask = masking.resolve(masking.parse_mask(mask), MODEL.grid, BATCH)
    with pytest.raises(AssertionError, match="wait"), NoWaiting():
        torch.ones(1).item()
    with NoWaiting():
        train_step(state, source, objective, mask, SEED, BATCH, Hyper(1e-3, 1.0))
