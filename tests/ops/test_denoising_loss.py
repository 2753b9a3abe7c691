"""denoising_loss: fp64 truth of the loss and its gradient, the same bits everywhere, layouts, errors."""

import dataclasses
import itertools

import pytest
import torch
from placing import here

import maskdiff_kernels as mk
from maskdiff_kernels import library
from maskdiff_kernels.ops.denoising_loss import cpp, reference
from maskdiff_kernels.ops.noisy_patches import reference as noisy
from maskdiff_kernels.ops.samples import Samples, flatten

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TARGETS = ["eps", "x0", "v"]
SHAPES = [((4, 6), 1, 1), ((5, 3), 3, 3), ((4, 6), 4, 3), ((2, 1), 20, 2)]  # 800: more than a window of the C++
LENGTHS = [1, 2, 15, 16, 17, 25, 33, 49, 63, 64, 65, 66, 77, 100, 127, 128, 129, 130, 144, 196, 255, 256, 257, 258, 417]


def predict(batch: mk.Batch, size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    drawn = torch.randn(*batch.keep_ids.shape, size, generator=generator, device="cpu")
    return here(drawn).to(dtype).requires_grad_()


def plain_loss(prediction, eps, pixels, samples, target, weight):
    """The loss as one would write it in PyTorch, in eps's dtype: given noise and bytes, for samples of any length."""
    sample, batch = samples.sample(), len(samples.n)
    alpha, sigma = samples.alpha_sigma[samples.timestep[sample]].to(eps.dtype).split(1, dim=1)
    x0 = pixels.to(eps.dtype) * (2 / 255) - 1
    wanted = {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0}[target]
    squares = (prediction.flatten(0, -2).to(eps.dtype) - wanted).square().mean(1)
    counts = torch.bincount(sample, minlength=batch).clamp(min=1)
    weights = weight[samples.timestep].to(eps.dtype)
    per_sample = weights * squares.new_zeros(batch).index_add(0, sample, squares) / counts
    return per_sample.mean(), per_sample


def gradient(outputs, prediction, coefficients) -> torch.Tensor:
    mean, per_sample = outputs
    scalar = 1.7 * mean.double() + (per_sample.double() * coefficients).sum()
    return torch.autograd.grad(scalar, prediction, retain_graph=True)[0]


@pytest.mark.parametrize(("grid", "patch", "channels"), SHAPES)
@pytest.mark.usefixtures("poisoned")
def test_against_float64(implementation, seed, make_store, make_batch, alpha_sigma, weight, grid, patch, channels):
    """Errors at most twice (gradients three times) those of plain PyTorch given the exact noise, plus one rounding,
    plus what the noise's own bound of 4 x 2^-23 max(1, |z|) does to the result. The mean is a single number, whose
    error in plain PyTorch is luck: it is held to the errors of the numbers it is the mean of.
    """
    store = make_store(grid, patch, channels)
    patches, size = grid[0] * grid[1], patch * patch * channels
    for visible in ((patches + 1) // 2, [0, 1, patches, 0, patches // 2] * 3):
        batch = make_batch(store, visible, batch=12)
        samples = Samples(*flatten(store, batch, alpha_sigma, seed))
        sample, count = samples.sample(), len(batch.n)
        eps, x0 = noisy.noise(samples, torch.float64), noisy.clean(samples, torch.float64)
        pixels = ((x0 + 1) * 255 / 2).round()
        noise_bound = 2**-21 * eps.abs().clamp(min=1)
        coefficients = torch.linspace(-1, 2, count, dtype=torch.float64)
        scale = 2 * weight[batch.timestep].double() * (1.7 / count + coefficients).abs() / size
        scale = (scale / sample.bincount(minlength=count))[sample, None]
        for dtype, target in itertools.product(DTYPES, TARGETS):
            prediction = predict(batch, size, dtype)
            exact_prediction = prediction.detach().double().requires_grad_()

            exact = plain_loss(exact_prediction, eps, pixels, samples, target, weight)
            plain = plain_loss(prediction, eps.float(), pixels, samples, target, weight)
            got = mk.denoising_loss(prediction, store, batch, alpha_sigma, seed, target, weight, implementation)
            exact_gradient = gradient(exact, exact_prediction, coefficients)
            plain_gradient = gradient(plain, prediction, coefficients)
            got_gradient = gradient(got, prediction, coefficients)

            share = {"eps": 1.0, "x0": 0.0, "v": noisy.coefficients(samples, torch.float64)[0]}[target]
            slope = torch.autograd.grad(exact[1].sum(), exact_prediction)[0].flatten(0, -2).abs()
            extra = eps.new_zeros(count).index_add(0, sample, (slope * share * noise_bound).sum(1)).max()
            peer_error = (plain[1] - exact[1]).abs().max()
            for name, truth, kernel in zip(("mean", "per sample"), exact, got, strict=True):
                assert kernel.dtype == torch.float32 and kernel.shape == truth.shape
                error = (kernel - truth).abs().max()
                print(f"{dtype} {target} {name}: {error:.2e}, plain PyTorch {peer_error:.2e}, by noise {extra:.2e}")
                assert error <= 2 * peer_error + 2**-24 * truth.abs().max() + extra
            assert got_gradient.dtype == dtype and got_gradient.shape == prediction.shape
            error = (got_gradient.double() - exact_gradient).abs().max()
            peer_error = (plain_gradient.double() - exact_gradient).abs().max()
            extra = (scale * share * noise_bound).max()
            print(f"{dtype} {target} gradient: {error:.2e}, plain PyTorch {peer_error:.2e}, by noise {extra:.2e}")
            assert error <= 3 * peer_error + torch.finfo(dtype).eps / 2 * exact_gradient.abs().max() + extra


@pytest.mark.parametrize("outputs", ["mean", "per_sample", "both"])
def test_any_incoming_gradient(implementation, seed, make_store, make_batch, alpha_sigma, weight, outputs):
    store = make_store()
    batch = make_batch(store, [3, 24, 0, 10])
    prediction = predict(batch, 48)
    mean, per_sample = mk.denoising_loss(prediction, store, batch, alpha_sigma, seed, "v", weight, implementation)
    coefficients = torch.tensor([0.5, -2.0, 3.0, 0.0])
    scalar = {"mean": mean, "per_sample": per_sample @ coefficients, "both": mean * 2 + per_sample.sum()}[outputs]
    factors = {"mean": torch.full((4,), 0.25), "per_sample": coefficients, "both": torch.full((4,), 1.5)}[outputs]
    samples = Samples(*flatten(store, batch, alpha_sigma, seed))
    sample = samples.sample()
    difference = prediction.detach().double() - reference.targets(samples, "v", torch.float64)
    scale = factors.double() * 2 * weight[batch.timestep] / (batch.cu_patches.diff() * 48)
    got = torch.autograd.grad(scalar, prediction)[0]
    torch.testing.assert_close(got.double(), scale[sample, None] * difference, rtol=4e-6, atol=1e-9)
    assert (got[sample == 3] == 0).all() == (outputs == "per_sample")


def test_gradient_is_that_of_finite_differences(implementation, seed, make_store, make_batch, alpha_sigma, weight):
    """The loss is a square: a central difference of any step is its exact derivative."""
    store = make_store()
    batch = make_batch(store, 5, batch=2)
    prediction = predict(batch, 48)
    direction = here(torch.randn(prediction.shape, generator=torch.Generator().manual_seed(5), device="cpu"))

    def loss(at):
        return mk.denoising_loss(at, store, batch, alpha_sigma, seed, "eps", weight, implementation)[0]

    value = loss(prediction)
    slope = (torch.autograd.grad(value, prediction)[0] * direction).sum()
    difference = (loss(prediction.detach() + direction) - loss(prediction.detach() - direction)) / 2
    assert abs(slope - difference) < 1e-5 * value.detach()


def test_perfect_prediction(implementation, seed, make_store, make_batch, alpha_sigma):
    store = make_store()
    batch = make_batch(store, 9)
    x0 = mk.noisy_patches(store, batch, None, seed, backend=implementation).requires_grad_()
    mean, per_sample = mk.denoising_loss(x0, store, batch, alpha_sigma, seed, "x0", backend=implementation)
    mean.backward()
    assert mean == 0 and (per_sample == 0).all() and (x0.grad == 0).all()
    x_t = mk.noisy_patches(store, batch, alpha_sigma, seed, backend=implementation)
    alpha, sigma = alpha_sigma[batch.timestep][:, :, None, None].unbind(1)
    for target, prediction in (("eps", (x_t - alpha * x0) / sigma), ("v", (alpha * x_t - x0) / sigma)):
        loss, _ = mk.denoising_loss(prediction, store, batch, alpha_sigma, seed, target, backend=implementation)
        assert loss < 1e-8, target


# ---- the same bits ----


@pytest.mark.usefixtures("threads")
def test_every_level_and_thread_count_gives_the_same_bits(seed, make_store, make_batch, alpha_sigma, weight):
    for grid, patch, channels in (*SHAPES, ((16, 16), 4, 3)):
        store = make_store(grid, patch, channels)
        batch = make_batch(store, grid[0] * grid[1])
        for dtype in DTYPES:
            for target in TARGETS:
                prediction = predict(batch, patch * patch * channels, dtype)
                outputs = []
                for name in library.cpu_levels():
                    for count in (1, 2, 3):
                        torch.set_num_threads(count)
                        with library.use_cpu_level(name):
                            loss = mk.denoising_loss(prediction, store, batch, alpha_sigma, seed, target, weight, "cpp")
                            outputs.append([*loss, torch.autograd.grad(loss[0] + loss[1][0], prediction)[0]])
                for output in outputs[1:]:
                    assert all(map(torch.equal, output, outputs[0]))


@pytest.mark.parametrize("length", LENGTHS)
def test_ragged_equals_one_by_one(level, seed, make_store, make_batch, one_sample, alpha_sigma, length):
    store = make_store((21, 20), patch=2)
    batch = make_batch(store, [length, 3, 420, 0, length])
    prediction = predict(batch, 12)
    mean, per_sample = mk.denoising_loss(prediction, store, batch, alpha_sigma, seed, "v", backend="cpp")
    per_sample.sum().backward()
    for b, (begin, end) in enumerate(zip(batch.cu_patches[:-1], batch.cu_patches[1:], strict=True)):
        alone = prediction.detach()[None, begin:end].clone().requires_grad_()
        loss, _ = mk.denoising_loss(alone, store, one_sample(batch, b), alpha_sigma, seed, "v", backend="cpp")
        loss.backward()
        assert loss == per_sample[b]
        assert torch.equal(alone.grad[0], prediction.grad[begin:end])
    torch.testing.assert_close(mean, per_sample.mean(), rtol=2e-7, atol=0)


def test_runs_twice_alike(implementation, seed, make_store, make_batch, alpha_sigma):
    store = make_store((16, 16))
    batch = make_batch(store, [256, 3, 77, 0])
    prediction = predict(batch, 48)
    mean, per_sample = mk.denoising_loss(prediction, store, batch, alpha_sigma, seed, backend=implementation)
    first, second = (
        torch.autograd.grad(mean + per_sample[1], prediction, retain_graph=again)[0] for again in (True, False)
    )
    again = mk.denoising_loss(prediction, store, batch, alpha_sigma, seed, backend=implementation)
    assert torch.equal(first, second) and mean == again[0] and torch.equal(per_sample, again[1])


# ---- layouts ----


@pytest.mark.parametrize("visible", [9, [3, 0, 24, 10]])
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_prediction(implementation, seed, make_store, make_batch, alpha_sigma, visible, dtype):
    """Such as a model gives that drops its extra tokens by slicing."""
    store = make_store()
    batch = make_batch(store, visible)
    dense = predict(batch, 48, dtype)
    shape = dense.shape
    wide = torch.full((*shape[:-2], shape[-2] + 3, 80), float("nan"), dtype=dtype)
    wide[..., 2 : 2 + shape[-2], 16:64] = dense.detach()
    strided = wide[..., 2 : 2 + shape[-2], 16:64].requires_grad_()
    results = []
    for prediction in (dense, strided):
        mean, per_sample = mk.denoising_loss(prediction, store, batch, alpha_sigma, seed, backend=implementation)
        results.append((mean, per_sample, torch.autograd.grad(mean, prediction)[0]))
    assert all(map(torch.equal, *results))


def test_staging_buffer(implementation, seed, make_store, make_batch, alpha_sigma):
    store = make_store()
    batch = make_batch(store, 9)
    place = batch.keep_ids.long()
    source = torch.where(batch.flip[:, None], place // 6 * 6 + 5 - place % 6, place)
    staged = store.patches[batch.image_ids[:, None], source]
    slots = torch.arange(9, dtype=torch.int32).repeat(4)
    buffer = mk.Store(staged, store.grid, store.patch, slots)
    moved = dataclasses.replace(batch, image_ids=torch.arange(4))
    prediction = predict(batch, 48)
    for target in ("x0", "v"):
        got = mk.denoising_loss(prediction, buffer, moved, alpha_sigma, seed, target, backend=implementation)
        expected = mk.denoising_loss(prediction, store, batch, alpha_sigma, seed, target, backend=implementation)
        assert all(map(torch.equal, got, expected))


def test_nan_and_infinity_reach_the_loss(implementation, seed, make_store, make_batch, alpha_sigma):
    store = make_store()
    batch = make_batch(store, 9)
    for dtype in DTYPES:
        for value in (float("nan"), float("inf")):
            prediction = predict(batch, 48, dtype).detach()
            prediction[2, 3, 17] = value
            prediction.requires_grad_()
            mean, per_sample = mk.denoising_loss(prediction, store, batch, alpha_sigma, seed, backend=implementation)
            mean.backward()
            assert not mean.isfinite() and per_sample.isfinite().tolist() == [True, True, False, True]
            assert prediction.grad.isfinite().sum() == prediction.numel() - 1


def test_no_gradient_is_made_where_none_is_needed(seed, make_store, make_batch, alpha_sigma):
    store = make_store()
    batch = make_batch(store, 9)
    for prediction in (predict(batch, 48), predict(batch, 48).detach()):
        needs = prediction.requires_grad
        arguments = (prediction, *flatten(store, batch, alpha_sigma, seed), "eps", None, needs, "cpp")
        error = torch.ops.maskdiff.denoising_loss.default(*arguments)[2]
        assert error.numel() == (prediction.numel() if needs else 0)
        mean, per_sample = mk.denoising_loss(prediction, store, batch, alpha_sigma, seed)
        assert mean.requires_grad == needs and per_sample.requires_grad == needs


@pytest.mark.parametrize(("first", "second"), [("cpp", "reference"), ("reference", "cpp")])
def test_the_backward_is_by_the_implementation_of_the_forward(
    monkeypatch, seed, make_store, make_batch, alpha_sigma, first, second
):
    """Whatever the choice is by then, as with pinned memory, which the choice for the backward knows nothing of."""
    ran, store = [], make_store()
    for name, module in (("cpp", cpp), ("reference", reference)):
        run = module.run_backward
        monkeypatch.setattr(module, "run_backward", lambda *a, name=name, run=run: (ran.append(name), run(*a))[1])
    batch = make_batch(store, 9)
    prediction = predict(batch, 48)
    monkeypatch.setenv("MASKDIFF_KERNELS", first)
    mean, _ = mk.denoising_loss(prediction, store, batch, alpha_sigma, seed)
    monkeypatch.setenv("MASKDIFF_KERNELS", second)
    mean.backward()
    assert ran == [first]


# ---- errors ----


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, r"^prediction: got torch.float64, takes float32", {"prediction": torch.zeros(4, 2, 48).double()}),
        (ValueError, r"^prediction: got shape \[4, 3, 48\]", {"prediction": torch.zeros(4, 3, 48)}),
        (ValueError, r"^prediction: got shape \[8, 48\]", {"prediction": torch.zeros(8, 48)}),
        (ValueError, r"^prediction: got strides", {"prediction": torch.zeros(4, 48, 2).transpose(1, 2)}),
        (ValueError, r"^target: got 'noise', takes eps, x0 or v", {"target": "noise"}),
        (TypeError, r"^weight: got torch.float64", {"weight": torch.ones(50).double()}),
        (ValueError, r"^weight: got shape \[49\]", {"weight": torch.ones(49)}),
        (TypeError, r"^alpha_sigma: got None", {"alpha_sigma": None}),
        (ValueError, r"^timestep: got values from 0 to 50", {"batch": {"timestep": torch.tensor([0, 50, 1, 1])}}),
        (ValueError, r"^image_ids: got values from 0 to 7", {"batch": {"image_ids": torch.tensor([0, 7, 1, 1])}}),
        (ValueError, r"^keep_ids: got values from 0 to 24", {"batch": {"keep_ids": torch.tensor([[0, 24]] * 4).int()}}),
    ],
)
def test_errors(make_store, make_batch, alpha_sigma, seed, backend, error, message, change):
    store = make_store()
    batch = dataclasses.replace(make_batch(store, 2), **change.get("batch", {}))
    arguments = {
        "prediction": torch.zeros(4, 2, 48), "store": store, "alpha_sigma": alpha_sigma, "seed": seed, **change,
        "batch": batch, "backend": backend,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        mk.denoising_loss(**arguments)


def test_second_derivative_is_an_error(implementation, seed, make_store, make_batch, alpha_sigma):
    store = make_store()
    batch = make_batch(store, 2)
    prediction = predict(batch, 48)
    mean, per_sample = mk.denoising_loss(prediction, store, batch, alpha_sigma, seed, backend=implementation)
    for output in (mean, per_sample.sum()):
        with pytest.raises(RuntimeError, match="denoising_loss has no second derivative"):
            torch.autograd.grad(output, prediction, create_graph=True)
