"""The ops as PyTorch sees them: opcheck, torch.compile, autocast, differentiation past the public function."""

import pytest
import torch
from torch.library import opcheck

import maskdiff_kernels as mk
from maskdiff_kernels.ops.samples import flatten

ops = torch.ops.maskdiff
VISIBLE = [5, [3, 0, 24, 10]]


def outputs_equal(got, expected) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("counts", [(6,), (2, 6)])
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_opcheck_draw_batch(seed, counts, backend):
    for ids in (None, torch.arange(9)):
        mask = ("patch", 0, counts)
        opcheck(ops.draw_batch.default, (seed, torch.arange(4), ids, 9, (4, 6), *mask, 50, 0.5, 0.1, 0, backend))


@pytest.mark.parametrize("visible", VISIBLE)
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_opcheck_noisy_patches(make_store, make_batch, alpha_sigma, seed, visible, backend):
    for store, noisy in ((make_store(), True), (make_store(pad=16), False)):
        flat = flatten(store, make_batch(store, visible), alpha_sigma if noisy else None, seed)
        opcheck(ops.noisy_patches.default, (*flat, torch.bfloat16, backend))


@pytest.mark.parametrize("visible", VISIBLE)
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_opcheck_denoising_loss(make_store, make_batch, alpha_sigma, seed, weight, visible, backend):
    store = make_store()
    batch = make_batch(store, visible)
    flat = flatten(store, batch, alpha_sigma, seed)
    wide = torch.randn(*batch.keep_ids.shape, 64)
    for prediction, needs_grad in ((wide[..., :48], True), (wide[..., :48].bfloat16().requires_grad_(), False)):
        opcheck(ops.denoising_loss.default, (prediction, *flat, "v", weight, needs_grad, backend))
    error = wide[..., :48].contiguous()
    opcheck(
        ops.denoising_loss_backward.default,
        (error, batch.cu_patches, torch.tensor(1.0), torch.ones(4), backend),
    )


def train_step(model, seed, n, patches, alpha_sigma, mask):
    store = mk.Store(patches, (4, 6), 4)
    batch = mk.draw_batch(seed, n, patches.shape[0], store.grid, mask, alpha_sigma.shape[0], flip=0.5)
    x_t = mk.noisy_patches(store, batch, alpha_sigma, seed)
    mean, per_sample = mk.denoising_loss(model(x_t), store, batch, alpha_sigma, seed, "v")
    return mean, per_sample, x_t, batch.keep_ids, batch.flip, batch.timestep


@pytest.mark.parametrize("compiler", ["inductor", "aot_eager"])
@pytest.mark.parametrize("mask", [mk.Mask("patch", counts=(6,)), mk.Mask("patch", counts=(3, 9))])
def test_fullgraph_compile(make_store, alpha_sigma, seed, compiler, mask):
    store, model = make_store(), torch.nn.Linear(48, 48)
    torch._dynamo.reset()
    compiled = torch.compile(train_step, fullgraph=True, backend=compiler)
    results = []
    for step in (compiled, train_step):
        model.zero_grad()
        mean, per_sample, *rest = step(model, seed, torch.arange(8), store.patches, alpha_sigma, mask)
        (mean + per_sample[2]).backward()
        results.append([mean, per_sample, *rest, model.weight.grad])
    got, expected = results
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)  # the linear layer's rounding may differ
    assert outputs_equal(got[2:6], expected[2:6])


def test_compile_for_any_batch_size(make_store, alpha_sigma, seed):
    store, model = make_store(), torch.nn.Linear(48, 48)
    torch._dynamo.reset()
    compiled = torch.compile(train_step, fullgraph=True, backend="aot_eager", dynamic=True)
    mask = mk.Mask("patch", counts=(6,))
    for batch in (4, 7):
        n = torch.arange(batch)
        got, expected = (step(model, seed, n, store.patches, alpha_sigma, mask) for step in (compiled, train_step))
        assert outputs_equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(implementation, make_store, make_batch, alpha_sigma, seed, dtype):
    store = make_store()
    batch = make_batch(store, 5)
    prediction = torch.randn(4, 5, 48).to(dtype).requires_grad_()

    def step():
        x_t = mk.noisy_patches(store, batch, alpha_sigma, seed, dtype, implementation)
        mean, per_sample = mk.denoising_loss(prediction, store, batch, alpha_sigma, seed, backend=implementation)
        return x_t, mean, per_sample, torch.autograd.grad(mean, prediction)[0]

    with torch.autocast(seed.device.type, torch.bfloat16):
        inside = step()
    assert outputs_equal(inside, step()) and inside[0].dtype == dtype and inside[3].dtype == dtype


def test_the_registered_op_does_not_pass_for_differentiable(make_store, make_batch, alpha_sigma, seed):
    store = make_store()
    batch = make_batch(store, 5)
    prediction = torch.randn(4, 5, 48, requires_grad=True)
    flat = flatten(store, batch, alpha_sigma, seed)
    mean, _, error = ops.denoising_loss.default(prediction, *flat, "eps", None, True, "auto")
    assert not mean.requires_grad and not error.requires_grad
    with pytest.raises(RuntimeError, match="does not require grad"):
        mean.backward()
