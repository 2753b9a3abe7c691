"""Every sampler: one limit on Gaussian data; batches, interpolation, paths, other resolutions, folders gone on with."""

import json
import math
from functools import partial

import pytest
import torch
from PIL import Image
from test_sampling import LABELLED, SHAPE, command, runs, shaken  # noqa: F401 (runs is a fixture)

from maskdiff import folder, sampling
from maskdiff.diffusion import Diffusion, DiffusionConfig
from maskdiff.errors import UserError
from maskdiff.model import ModelConfig, UViT, patchify, unpatchify
from maskdiff.sampling import Sampler

MEAN = torch.tensor([0.1, -0.08, 0.05, 0.0], dtype=torch.float64)
ROOT = torch.tensor(  # of the covariance: standard deviations of 0.13 to 0.2, correlated
    [[0.15, 0.03, 0.0, 0.01], [0.0, 0.17, -0.02, 0.0], [0.02, 0.0, 0.14, 0.04], [0.0, 0.05, 0.0, 0.16]],
    dtype=torch.float64,
)
COVARIANCE = ROOT @ ROOT.T


class Gaussian(UViT):
    """The best predictor there is for images whose patches of 2 x 2 pixels are independent draws of one Gaussian."""

    def __init__(self, diffusion: Diffusion) -> None:
        super().__init__(ModelConfig(image_size=32, channels=1, patch=2, width=8, blocks=1, heads=1))
        self.diffusion = diffusion

    def predict(self, x_t, t, labels=None, keep_ids=None):
        alpha, sigma = (value.double().view(-1)[0] for value in self.diffusion._at(t, x_t))
        gain = alpha * COVARIANCE @ torch.linalg.inv(alpha**2 * COVARIANCE + sigma**2 * torch.eye(4))
        patches = torch.nn.functional.linear(patchify(x_t, 2), gain.float(), (MEAN - alpha * gain @ MEAN).float())
        x0 = unpatchify(patches, 2, self.config.grid)
        return self.diffusion.to_target(x0, (x_t - alpha.float() * x0) / sigma.float(), t)


def whitened(patches: torch.Tensor) -> torch.Tensor:
    return (patches.double() - MEAN) @ torch.linalg.inv(torch.linalg.cholesky(COVARIANCE)).T


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for each other cost more than such small images."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Name, eta, evaluations, what the model predicts, and the most by which so many evaluations may be off the limit, in
# standard deviations: the root mean square for deterministic samplers, which are compared image by image.
LIMITS = [
    ("ddim", 0.0, 1000, "eps", 0.015),
    ("ddim", 0.5, 1000, "x0", 0.015),
    ("ddim", 1.0, 1000, "v", 0.015),
    ("ddpm", 0.0, 1000, "eps", 0.015),
    ("dpm++", 0.0, 250, "x0", 0.01),
    ("unipc", 0.0, 250, "v", 0.01),
    ("heun", 0.0, 99, "v", 0.01),
]


@pytest.mark.parametrize("name, eta, steps, target, bias", LIMITS, ids=[f"{name}-{eta}" for name, eta, *_ in LIMITS])
def test_all_samplers_agree_in_the_limit(name, eta, steps, target, bias):
    """Mean and covariance of 16,384 draws are those of the data, within the bias above and 5 standard errors.

    A right sampler passes all 98 comparisons with a probability of 99.99 %. A deterministic one, moreover, follows the
    solution of the probability flow, which is known: (x_0 - mu) = C^1/2 (alpha^2 C + sigma^2)^-1/2 (x_T - alpha mu).
    """
    diffusion = Diffusion(DiffusionConfig("cosine", target=target))
    model, sampler = Gaussian(diffusion), Sampler(name, steps, eta)
    noise, generators = sampling.seeded(model.config, 11)(torch.arange(64))
    drawn = whitened(patchify(sampling.draw(model, diffusion, sampler, noise, generators), 2).flatten(0, 1))
    count = len(drawn)
    mean, covariance = drawn.mean(0), drawn.T.cov()
    off = (covariance - torch.eye(4)).abs()
    spread = torch.where(torch.eye(4) > 0, math.sqrt(2 / count), math.sqrt(1 / count))
    assert mean.abs().max() <= bias + 5 / math.sqrt(count)
    assert (off <= 2 * bias + 5 * spread).all()
    if sampler.deterministic:
        start = sampling.make_scheduler(diffusion, sampler).timesteps[:1]
        alpha, sigma = (value.double() for value in diffusion._at(start, torch.zeros(1)))
        values, vectors = torch.linalg.eigh(COVARIANCE)
        flow = vectors @ torch.diag((values / (alpha**2 * values + sigma**2)).sqrt()) @ vectors.T
        exact = MEAN + (patchify(noise, 2).flatten(0, 1).double() - alpha * MEAN) @ flow.T
        assert (drawn - whitened(exact)).square().mean().sqrt() <= bias


def test_ddpm_is_ddim_at_eta_1_with_the_same_noise():
    model, diffusion = shaken(SHAPE), Diffusion(DiffusionConfig())
    draw = partial(sampling.sample, model, diffusion, 3, steps=9)
    assert (draw(sampler="ddpm").int() - draw(eta=1.0).int()).abs().max() <= 1


@pytest.mark.parametrize("name", sampling.SAMPLERS)
def test_every_sampler_draws_the_same_image_in_any_batch_with_as_many_evaluations_as_said(name):
    model, diffusion = shaken(LABELLED), Diffusion(DiffusionConfig(target="v"))
    calls = []
    model.register_forward_hook(lambda *_: calls.append(None))
    labels = torch.tensor([[0, 0], [1, 1], [2, 0], [0, 1], [1, 0]])
    draw = partial(sampling.sample, model, diffusion, labels=labels, guidance=2.0, sampler=name)
    for steps in (1, 6):
        whole = draw(5, steps=steps, batch=5)
        expected = sampling.evaluations(Sampler(name, steps))
        assert len(calls) == expected == steps - (name == "heun" and steps == 6)
        parts = draw(5, steps=steps, batch=2)  # state kept from one batch to the next would show
        assert (whole.int() - parts.int()).abs().max() <= 1
        calls.clear()
    # A count for which np.arange ends beyond 0: every evaluation is at a timestep of its own, the last one near 0.
    timesteps = sampling.make_scheduler(diffusion, Sampler(name, 61)).timesteps
    assert len(timesteps) == 61 and timesteps.min() >= 0 and timesteps[0] <= 999
    assert len(timesteps.unique()) == (31 if name == "heun" else 61)


def test_samplers_that_do_not_exist():
    for wrong, words in [
        ({"name": "euler"}, "no sampler 'euler'; there are ddim, ddpm, dpm"),
        ({"steps": 0}, "at least 1"),
        ({"eta": 1.5}, "between 0 and 1"),
        ({"name": "unipc", "eta": 1.0}, "eta belongs to ddim"),
        ({"guidance": math.nan}, "must be a number"),
    ]:
        with pytest.raises(UserError, match=words):
            Sampler(**wrong)
    with pytest.raises(UserError, match="from 0 to 2"):
        sampling.seeded(SHAPE, 2**63)


def test_interpolation_joins_two_seeds_and_stays_noise():
    ids = torch.arange(7)
    noise, _ = sampling.between(SHAPE, 3, 8, 7)(ids)
    ends = [sampling.seeded(SHAPE, seed)(ids[:1])[0][0] for seed in (3, 8)]
    torch.testing.assert_close(noise[0], ends[0])
    torch.testing.assert_close(noise[6], ends[1])
    lengths, bounds = noise.flatten(1).norm(dim=1), sorted(end.norm().item() for end in ends)
    assert 0.97 * bounds[0] < lengths.min() and lengths.max() < 1.03 * bounds[1]
    turns = torch.nn.functional.cosine_similarity(noise[1:].flatten(1), noise[:-1].flatten(1))
    torch.testing.assert_close(turns, turns.mean().expand(6), rtol=0, atol=0.01)  # even steps
    torch.testing.assert_close(sampling.between(SHAPE, 3, 8, 7)(ids[4:])[0], noise[4:])
    same, _ = sampling.between(SHAPE, 3, 3, 4)(ids[:4])
    torch.testing.assert_close(same, ends[0].expand(4, -1, -1, -1))


def test_a_path_leads_from_the_noise_to_the_image():
    model, diffusion, sampler = shaken(SHAPE), Diffusion(DiffusionConfig()), Sampler("heun", 21)
    noise, generators = sampling.seeded(SHAPE, 0)(torch.arange(2))
    rows = sampling.path(model, diffusion, sampler, noise, generators, columns=6)
    drawn = sampling.sample(model, diffusion, 2, steps=21, sampler="heun")
    assert len(rows) == 2 * 2 * 6
    rows = rows.view(2, 2, 6, *rows.shape[1:])
    assert (rows[:, 0, 0].int() - sampling.to_bytes(noise).int()).abs().max() <= 1
    for kind in (0, 1):
        assert torch.equal(rows[:, kind, -1], drawn)
    assert (rows[:, 1, -2].int() - drawn.int()).abs().float().mean() < (
        rows[:, 1, 0].int() - drawn
    ).abs().float().mean()
    assert len(sampling.path(model, diffusion, Sampler(steps=1), noise, generators)) == 2 * 2 * 2


def test_a_model_at_another_resolution():
    model = shaken(LABELLED)
    with torch.no_grad():  # a table that is a plane over the picture, at the patches' centres
        rows = torch.arange(4.0).view(2, 2, 1)
        model.position[2:] = rows.view(4, 1) * torch.ones(32)
    large = model.resized(16)
    table = large.position[2:].view(4, 4, 32)[..., 0]
    torch.testing.assert_close(table, table.flip(0, 1).neg() + 3)  # symmetric about its middle
    assert (table.diff(dim=0) > 0).all() and (table.diff(dim=1) > 0).all()
    assert torch.equal(large.position[:2], model.position[:2])
    assert model.config.image_size == 8 and torch.equal(model.resized(8).position, model.position)
    x, t = torch.randn(1, 3, 16, 16), torch.tensor([5])
    assert large.predict(x, t).shape == x.shape and large.predict(x, t.float() + 0.5).shape == x.shape
    with pytest.raises(UserError, match="18 pixels .* patches of 4: 16 would be"):
        model.resized(18)


# ---- the command


def test_command_goes_on_with_a_folder(runs, tmp_path, monkeypatch, capsys):  # noqa: F811
    out, drawn = tmp_path / "images", []
    original = sampling.draw

    def counted(*arguments):
        drawn.append(len(arguments[3]))
        return original(*arguments)

    monkeypatch.setattr(sampling, "draw", counted)
    whole = partial(command, monkeypatch, runs / "labelled", "--steps", 3, "--out")
    whole(out, "--count", 5, "--batch", 4)
    assert "5 images of step " in (said := capsys.readouterr().out) and "images/s" in said and drawn == [4, 1]
    before = {file: file.read_bytes() for file in sorted(out.glob("*.png"))}
    files = list(before)
    assert [file.name for file in files] == [f"{i:06d}.png" for i in range(5)]
    files[1].unlink()
    files[3].write_bytes(before[files[3]][:-9])  # as after a crash of the machine
    (out / ".partial-000009.png").write_bytes(b"half")
    drawn.clear()
    whole(out, "--count", 7, "--batch", 3)
    assert drawn == [3, 1] and "3 were there, 4 drawn" in capsys.readouterr().out
    pixels = [torch.tensor(list(Image.open(file).tobytes())).int() for file in sorted(out.glob("*.png"))]
    assert len(pixels) == 7 and not list(out.glob(".partial*"))
    for file, now in zip(files, pixels, strict=False):
        assert (now - torch.tensor(list(sampling_bytes(before[file]))).int()).abs().max() <= 1
    drawn.clear()
    whole(out, "--count", 7)
    assert drawn == []
    with pytest.raises(UserError, match="drawn otherwise: seed was 0, is 1; name a new folder"):
        whole(out, "--seed", 1)
    (out / folder.SETTINGS).write_text("[]")
    with pytest.raises(UserError, match="damaged"):
        whole(out)


def sampling_bytes(png: bytes) -> bytes:
    import io

    return Image.open(io.BytesIO(png)).tobytes()


def test_a_failed_write_leaves_nothing_half(tmp_path, monkeypatch):
    def draw(ids):
        yield ids, torch.zeros(len(ids), 4, 4, 3, dtype=torch.uint8)

    def full(self, path, *rest):
        path.write_bytes(b"\x89PNG half")
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(Image.Image, "save", full)
        folder.fill(tmp_path / "x", 2, {"seed": 1}, draw)
    assert [file.name for file in (tmp_path / "x").iterdir()] == [folder.SETTINGS]
    assert folder.fill(tmp_path / "x", 2, {"seed": 1}, draw) == 2
    assert json.loads((tmp_path / "x" / folder.SETTINGS).read_text()) == {"seed": 1}


def test_command_interpolates_shows_paths_and_resizes(runs, tmp_path, monkeypatch, capsys):  # noqa: F811
    run = runs / "labelled" / "checkpoints" / "step-00000001"  # as of a run whose masked stage alone is done
    draw = partial(command, monkeypatch, run, "--steps", 3, "--sampler", "unipc")
    draw("--interpolate", 4, 5, "--count", 3, "--out", tmp_path / "way")
    draw("--seed", 4, "--count", 1, "--out", tmp_path / "end")
    ends = [Image.open(tmp_path / name / "000000.png").tobytes() for name in ("way", "end")]
    assert max(abs(a - b) for a, b in zip(*ends, strict=True)) <= 1
    draw("--path", "--out", tmp_path / "path.png")
    assert Image.open(tmp_path / "path.png").size == (4 * 10 + 2, 2 * 10 + 2)
    draw("--image-size", 12, "--count", 2, "--out", tmp_path / "large.png")
    assert Image.open(tmp_path / "large.png").size == (2 * 14 + 2, 14 + 2)
    for wrong, words in [
        (["--path", "--interpolate", 1, 2], "two pictures"),
        (["--path", "--out", tmp_path / "folder"], "one picture"),
        (["--interpolate", 1, 2, "--sampler", "ddpm"], "no noise of its own"),
        (["--interpolate", 1, -2], "from 0 to 2"),
        (["--eta", 0.5], "eta belongs to ddim"),
    ]:
        with pytest.raises(UserError, match=words):
            draw(*wrong)
