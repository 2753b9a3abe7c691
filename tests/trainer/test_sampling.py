"""Sampling against closed forms and a sampler written out; guidance, labels, pictures, and the command."""

import os
import subprocess
import sys

import pytest
import torch
from PIL import Image

from maskdiff import checkpoint, sample, sampling, sheet
from maskdiff.config import Config, OptimConfig, config_to_dict
from maskdiff.diffusion import TARGETS, Diffusion, DiffusionConfig
from maskdiff.errors import UserError, run_command
from maskdiff.model import ModelConfig, UViT
from maskdiff.optim import FlatState

SHAPE = ModelConfig(image_size=8, width=32, blocks=3, heads=1)
LABELLED = ModelConfig(image_size=8, width=32, blocks=3, heads=1, classes=(3, 2))


def shaken(config: ModelConfig) -> UViT:
    """An untrained model with an opinion."""
    torch.manual_seed(0)
    model = UViT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


class Oracle(UViT):
    """Knows the one image of its data set, and keeps what it was shown."""

    def __init__(self, diffusion: Diffusion) -> None:
        super().__init__(SHAPE)
        self.diffusion = diffusion
        self.image = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(5)) * 2 - 1
        self.shown: list[tuple[int, torch.Tensor]] = []

    def predict(self, x_t, t, labels=None, keep_ids=None):
        alpha, sigma = self.diffusion.alpha_sigma[t].view(-1, 2, 1, 1, 1).unbind(1)
        eps = (x_t - alpha * self.image) / sigma
        self.shown.append((int(t[0]), eps))
        return self.diffusion.to_target(self.image.expand_as(x_t), eps, t)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("steps", [1, 7, 61, 300])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_perfect_model_draws_its_image_along_the_true_path(schedule, steps, target):
    """At every timestep shown, what is not image must be the starting noise, at the level that the timestep says."""
    diffusion = Diffusion(DiffusionConfig(schedule, target=target))
    oracle = Oracle(diffusion)
    drawn = sampling.sample(oracle, diffusion, 2, steps=steps)
    expected = ((oracle.image + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0)
    assert drawn.dtype == torch.uint8 and drawn.shape == (2, 8, 8, 3)
    assert (drawn.int() - expected.int()).abs().max() <= 1
    timesteps = [t for t, _ in oracle.shown]
    assert len(timesteps) == steps and timesteps[0] == 999
    gaps = [a - b for a, b in zip(timesteps, timesteps[1:] + [-1], strict=True)]
    assert max(gaps) - min(gaps) <= 1
    start = oracle.shown[0][1]
    for t, eps in oracle.shown:
        if diffusion.alpha_sigma[t, 1] > 0.1:  # below, a rounding of the image is much of what is left
            torch.testing.assert_close(eps, start, rtol=0, atol=0.02, msg=f"at {t}")


def test_fresh_noise_keeps_the_level_right():
    diffusion = Diffusion(DiffusionConfig("cosine", target="eps"))
    oracle = Oracle(diffusion)
    sampling.sample(oracle, diffusion, 64, steps=20, eta=1.0)
    start = oracle.shown[0][1]
    for t, eps in oracle.shown[1:15]:
        assert eps.std().item() == pytest.approx(1.0, abs=0.02), t
    similarity = (oracle.shown[10][1] * start).mean().item()
    assert abs(similarity) < 0.5  # the first noise has been replaced


@pytest.mark.parametrize("target", TARGETS)
def test_equals_ddim_written_out(target):
    diffusion = Diffusion(DiffusionConfig("linear", target=target))
    model = shaken(SHAPE)
    got = sampling.sample(model, diffusion, 3, steps=10, seed=4)
    x = sampling._normal(sampling._generators(4, torch.arange(3)), (3, 8, 8), torch.device("cpu"))
    clipped = 0
    for t in range(999, -1, -100):
        alpha, sigma = diffusion.alpha_sigma[t].double()
        with torch.no_grad():
            prediction = model.predict(x, torch.full((3,), t))
        x0 = diffusion.to_x0(prediction, x, torch.full((3,), t)).double()
        clipped += int((x0.abs() > 1).sum())
        x0 = x0.clamp(-1, 1)
        eps = (x - alpha * x0) / sigma
        alpha, sigma = diffusion.alpha_sigma[t - 100].double() if t > 100 else (1.0, 0.0)
        x = (alpha * x0 + sigma * eps).float()
    assert clipped  # else the clipping went untested
    expected = ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    assert (got.int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_an_image_is_the_same_in_any_batch(eta):
    model, diffusion = shaken(SHAPE), Diffusion(DiffusionConfig())
    whole = sampling.sample(model, diffusion, 7, steps=4, eta=eta, batch=7)
    parts = sampling.sample(model, diffusion, 5, steps=4, eta=eta, batch=2)
    assert (whole[:5].int() - parts.int()).abs().max() <= 1
    assert (whole[0].int() - whole[1].int()).abs().max() > 30
    other = sampling.sample(model, diffusion, 5, steps=4, eta=eta, seed=1)
    assert (other.int() - parts.int()).abs().max() > 30


def test_guidance_is_the_formula():
    model = shaken(LABELLED)
    x = torch.randn(4, 3, 8, 8)
    labels = torch.tensor([[0, 1], [2, 0], [-1, 1], [-1, -1]])
    t = torch.full((4,), 300)
    with torch.no_grad():
        with_labels, without = model.predict(x, t, labels), model.predict(x, t)
    for guidance in (1.0, 0.0, 2.5):
        got = sampling._predict(model, x, t, labels, guidance)
        torch.testing.assert_close(got, without + guidance * (with_labels - without), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(with_labels[0], without[0], atol=1e-2)


def test_labels_steer_every_image_by_its_own():
    model, diffusion = shaken(LABELLED), Diffusion(DiffusionConfig())
    labels = torch.tensor([[0, 0], [1, 1], [2, 0]])
    drawn = sampling.sample(model, diffusion, 3, labels, guidance=3.0, steps=4, batch=2)
    changed = sampling.sample(
        model, diffusion, 3, labels + torch.tensor([[0, 0], [1, 0], [0, 0]]), guidance=3.0, steps=4, batch=2
    )
    different = (drawn.int() - changed.int()).abs().amax((1, 2, 3))
    assert different[1] > 5 and different[0] <= 1 and different[2] <= 1


def test_wrong_wishes_are_named():
    diffusion = Diffusion(DiffusionConfig())
    for arguments, words in [
        ({"labels": torch.zeros(2, 2, dtype=torch.int64)}, "trained without labels"),
        ({"guidance": 2.0}, "needs labels"),
        ({"steps": 1001}, "between 1 and 1000"),
        ({"steps": 0}, "at least 1"),
    ]:
        with pytest.raises(UserError, match=words):
            sampling.sample(UViT(SHAPE), diffusion, 2, **arguments)
    for labels, words in [
        (torch.zeros(2, dtype=torch.int64), r"must be \[2, 2\]"),
        (torch.tensor([[0, 0], [0, 2]]), "label 2 of attribute 1: it takes 0 to 1"),
        (torch.tensor([[-2, 0], [0, 0]]), "label -2 of attribute 0"),
    ]:
        with pytest.raises(UserError, match=words):
            sampling.sample(UViT(LABELLED), diffusion, 2, labels)


def test_grid_lays_images_out_in_rows():
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 4, 6, 3) * 40
    sheet = sampling.grid(images, gap=1)
    assert sheet.size == (3 * 7 + 1, 2 * 5 + 1) and sheet.mode == "RGB"
    for i in range(5):
        top, left = 1 + i // 3 * 5, 1 + i % 3 * 7
        inside = {sheet.getpixel((x, y)) for x in range(left, left + 6) for y in range(top, top + 4)}
        assert inside == {(40 * i,) * 3}
    assert sheet.getpixel((0, 0)) == sheet.getpixel((7, 2)) == sheet.getpixel((18, 8)) == (255, 255, 255)
    assert sampling.grid(images[:1, :, :, :1]).mode == "L"
    assert sampling.grid(images[:1].expand(40, -1, -1, -1), gap=0).size == (8 * 6, 5 * 4)
    with pytest.raises(UserError, match="2 channels"):
        sampling.grid(images[..., :2])


def test_heavy_packages_are_imported_by_what_needs_them_alone():
    """A GPU machine may have none of them, and each takes seconds."""
    heavy = "{'diffusers', 'torchmetrics', 'sklearn', 'tyro', 'matplotlib', 'PIL'}"
    code = f"import maskdiff.sampling, maskdiff.pretrained, maskdiff.baselines, sys; print({heavy} & set(sys.modules))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# ---- the command

LABEL_NAMES, CLASS_NAMES = ["hair", "hat"], [["red", "blond", "none"], ["none", "cap"]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run with labels and one without, each with one checkpoint."""
    folder = tmp_path_factory.mktemp("runs")
    for name, shape in (("labelled", LABELLED), ("plain", SHAPE)):
        config = Config(model=shape, sample_steps=4)
        (folder / name).mkdir()
        (folder / name / "config.json").write_text("{}")
        meta = {"config": config_to_dict(config), "label_names": LABEL_NAMES, "class_names": CLASS_NAMES}
        checkpoint.save(folder / name, 1, FlatState(shaken(shape), OptimConfig()).tensors(), meta, keep=1)
    return folder


def command(monkeypatch, *arguments):
    monkeypatch.setattr(
        sys, "argv", ["maskdiff sample", *map(str, arguments), "--device", "cpu", "--precision", "fp32"]
    )
    sample.main()


def test_command_draws_a_grid(runs, tmp_path, monkeypatch):
    command(monkeypatch, runs / "plain", "--count", 6, "--out", tmp_path / "new" / "grid.png", "--seed", 3)
    sheet = Image.open(tmp_path / "new" / "grid.png")
    images = sampling.sample(shaken(SHAPE), Diffusion(Config().diffusion), 6, steps=4, seed=3)
    assert sheet.tobytes() == sampling.grid(images).tobytes()


def test_command_draws_single_images(runs, tmp_path, monkeypatch):
    command(monkeypatch, runs / "labelled", "--count", 3, "--out", tmp_path / "images", "--labels", "red,cap;hair=2")
    files = sorted(path.name for path in (tmp_path / "images").iterdir())
    assert files.pop() == "drawn.json" and files == ["000000.png", "000001.png", "000002.png"]
    labels = sampling.random_labels(3, (3, 2), 0)
    labels[0], labels[2], labels[1, 0] = torch.tensor([0, 1]), torch.tensor([0, 1]), 2
    images = sampling.sample(shaken(LABELLED), Diffusion(Config().diffusion), 3, labels, steps=4)
    for file, image in zip(files, images, strict=True):
        assert Image.open(tmp_path / "images" / file).tobytes() == sampling.to_image(image).tobytes()
    with pytest.raises(UserError, match="not an empty folder"):
        command(monkeypatch, runs / "plain", "--out", tmp_path)


def test_captions_are_the_labels_that_were_asked_for(runs, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(sample, "captioned", lambda *arguments: said.append(arguments) or sheet.captioned(*arguments))
    more = ("--count", 3, "--out", tmp_path / "grid.png", "--labels", "red,cap;blond,hat=none", "--captions")
    command(monkeypatch, runs / "labelled", *more)
    assert said[0][1:] == ([["red", "cap"], ["blond", "none"], ["red", "cap"]], 2)
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.size == (4 + 2 * 68, 4 + 2 * (64 + 4 + 2 * 12))
    assert sheet.label_words([2, -1], CLASS_NAMES) == ["none", "-"] and sheet.label_words([2, 1], []) == ["2", "1"]


def test_label_words():
    def wanted(text, names=LABEL_NAMES, classes=CLASS_NAMES, count=2):
        return sample.wanted_labels(text, count, (3, 2), 0, names, classes)

    drawn = sampling.random_labels(600, (3, 2), 0)
    assert torch.equal(wanted(None, count=600), drawn) and wanted("none") is None
    assert torch.equal(wanted(None), drawn[:2])
    for attribute, values in ((0, 3), (1, 2)):
        counts = drawn[:, attribute].bincount(minlength=values)
        assert len(counts) == values and counts.min() > 0.75 * 600 / values
    assert wanted("blond, hat=none").tolist() == [[1, 0], [1, 0]]
    assert wanted("hair=none,1=1").tolist() == [[2, 1], [2, 1]]
    assert wanted("0=1,1=0", [], []).tolist() == [[1, 0], [1, 0]]
    assert sample.wanted_labels("7", 1, (9,), 0, [], []).tolist() == [[7]]
    with pytest.raises(UserError, match="2 attributes have 'none'; write ATTRIBUTE=none"):
        wanted("red,none;cap")
    for word in ("green", "hair=3", "shoes=red", "hat=red"):
        with pytest.raises(UserError, match=f"no label '{word}'; this model takes hair=red|blond|none; hat=none|cap"):
            wanted(word)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["plain", "--labels", "red"], "trained without labels"),
        (["plain", "--guidance", "2"], "needs labels"),
        (["nothing"], "no run"),
        (["plain", "--count", "0"], "at least 1"),
        (["plain", "--sampler", "dmp++"], "--sampler got 'dmp++'; did you mean 'dpm++'?"),
        (["plain", "--smapler=ddim"], "unexpected '--smapler=ddim'; did you mean --sampler?"),
        (["plain", "--steps", "many"], "argument --steps: invalid int value: 'many'; --help"),
        (["plain", "--interpolate", "1", "2", "--seed", "0"], "leave --seed out"),
        (["plain", "--captions"], "these images have none"),
        (["labelled", "--captions", "--out", "folder"], "name one with --out"),
    ],
)
def test_command_says_what_is_wrong_in_one_line(runs, tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: command(monkeypatch, runs / arguments[0], *arguments[1:]))
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and out == ""
    assert err.startswith("error: ") and words in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
