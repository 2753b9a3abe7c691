"""The command that judges images: what it says, what it keeps, the sides it takes, and memorised samples."""

import dataclasses
import json
import sys

import pytest
import torch
from PIL import Image
from test_sampling import LABELLED as SMALL_LABELLED
from test_sampling import SHAPE as SMALL
from test_sampling import shaken

from maskdiff import checkpoint, data, evaluate, features, metrics, nearest, sampling
from maskdiff.config import Config, DataConfig, OptimConfig, config_to_dict
from maskdiff.diffusion import Diffusion
from maskdiff.errors import UserError
from maskdiff.optim import FlatState

SHAPE, LABELLED = (dataclasses.replace(shape, image_size=16) for shape in (SMALL, SMALL_LABELLED))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run with labels and one without, each with one checkpoint, on portraits of 16 px."""
    folder = tmp_path_factory.mktemp("runs")
    for name, shape in (("labelled", LABELLED), ("plain", SHAPE)):
        config = Config(model=shape, sample_steps=4, data=DataConfig(path="faces:80", heldout=0.2))
        (folder / name).mkdir()
        (folder / name / "config.json").write_text("{}")
        meta = {"config": config_to_dict(config), "label_names": [], "class_names": []}
        checkpoint.save(folder / name, 7, FlatState(shaken(shape), OptimConfig()).tensors(), meta, keep=1)
    return folder


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASKDIFF_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["maskdiff evaluate", *map(str, arguments), "--device", "cpu"])
    evaluate.main()


def test_a_run_beside_its_own_data(runs, tmp_path, monkeypatch, capsys):
    out = tmp_path / "new" / "figures.json"
    options = ["--count", 12, "--seed", 3, "--batch", 5, "--precision", "fp32", "--json", out]
    command(monkeypatch, runs / "plain", *options)
    found = json.loads(out.read_text())
    packed = data.prepare("faces:80", 16, SHAPE.patch, heldout=0.2)
    extractor = features.load(device="cpu")
    images = sampling.sample(shaken(SHAPE), Diffusion(Config().diffusion), 12, steps=4, seed=3)
    expected = metrics.Reference.of(extractor, packed).compare(extractor(images))
    other = metrics.Reference.of(extractor, packed).compare(
        extractor(sampling.sample(shaken(SHAPE), Diffusion(Config().diffusion), 12, steps=4, seed=0))
    )
    assert abs(other.frechet / expected.frechet - 1) > 1e-3 > abs(found["scores"]["frechet"] / expected.frechet - 1)
    assert found["scores"]["count"] == 12 and found["scores"]["real_count"] == len(packed.train_ids)
    assert found["real"]["hash"] == packed.hash and found["extractor"]["digest"] == extractor.digest
    drawn = found["images"]
    assert (drawn["step"], drawn["seed"], drawn["weights"], drawn["ema"]) == (7, 3, "ema", Config().optim.ema)
    assert drawn["sampler"] == {"name": "ddim", "steps": 4, "eta": 0.0, "guidance": 1.0}
    assert {"machine", "commit", "kid", "neighbours", "image_size"} <= found.keys()
    told = capsys.readouterr().out
    assert "12 samples of plain, step 7: ddim, 4 steps, guidance 1, ema" in told and "seed 3" in told
    assert f"{len(packed.train_ids)} training images of faces:80 ({packed.hash[:16]})" in told
    assert "Frechet distance (builtin)" in told and "FID" not in told


def test_sides_of_every_kind(runs, tmp_path, monkeypatch, capsys):
    packed = data.prepare("faces-b:30", 16, 4)
    (tmp_path / "photos").mkdir()
    for number, image in enumerate(packed.images(range(30))):
        sampling.to_image(image).save(tmp_path / "photos" / f"{number}.png")
    json_file = tmp_path / "figures.json"
    zero = ["--data", packed.path, "--json", json_file]
    command(monkeypatch, tmp_path / "photos", *zero, "--count", len(packed))  # the same pictures, all of them
    scores = json.loads(json_file.read_text())["scores"]
    assert scores["count"] == 30 and scores["precision"] == 1
    command(monkeypatch, tmp_path / "photos", *zero, "--count", 9)
    assert json.loads(json_file.read_text())["images"] | {"name": "", "hash": ""} == {
        "kind": "images", "name": "", "hash": "", "count": 9, "of": 30,
    }  # fmt: skip
    guided = ["--guidance", 2, "--sampler", "dpm++", "--steps", 3, "--weights", "raw"]
    command(monkeypatch, runs / "labelled", "--data", packed.path, "--count", 8, *guided, "--json", json_file)
    drawn = json.loads(json_file.read_text())["images"]
    assert drawn["sampler"] == {"name": "dpm++", "steps": 3, "eta": 0.0, "guidance": 2.0}
    assert (drawn["weights"], drawn["ema"], drawn["labels"]) == ("raw", None, "all alike, drawn at random")
    command(monkeypatch, "faces-b:30", "--data", runs / "plain", "--count", 8)
    assert "against                     8 samples of plain, step 7" in capsys.readouterr().out


def test_memorised_samples_are_nearer_than_heldout_images(tmp_path, monkeypatch, capsys):
    packed = data.prepare("faces:150", 16, 4, heldout=0.2)
    (tmp_path / "drawn").mkdir()
    for number, image in enumerate(packed.images(packed.train_ids[-20:])):
        sampling.to_image(image).save(tmp_path / "drawn" / f"{number}.png")
    out, picture = tmp_path / "figures.json", tmp_path / "nearest.png"
    monkeypatch.setattr(nearest, "_CHUNK", 50)
    command(monkeypatch, tmp_path / "drawn", "--data", packed.path, "--json", out, "--nearest", picture)
    near = json.loads(out.read_text())["nearest"]
    assert near["count"] == 20 and near["heldout"] == len(packed.heldout_ids)
    for space in ("features", "pixels"):
        assert near[space]["samples"] == pytest.approx(0, abs=1e-3) and near[space]["heldout"] > 1
    training, fresh = (packed.images(ids).double().flatten(1) for ids in (packed.train_ids, packed.heldout_ids))
    distances = torch.cdist(fresh, training).amin(1) / training.shape[1] ** 0.5
    assert near["pixels"]["heldout"] == pytest.approx(distances.median().item(), rel=1e-6)
    told = capsys.readouterr().out
    assert "nearest, pixels" in told and "of held-out images" in told
    sheet = Image.open(picture)
    # The first sample; beside it the training image itself, found by features and by pixels.
    side, left, row = 64, (4, 4 + 68 + 12, 4 + 4 * 68 + 24), 12 + 8 + 16
    shown = [sheet.crop((x, row, x + side, row + side)).tobytes() for x in left]
    assert shown[0] == shown[1] == shown[2] and len(set(shown[0])) > 10


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["faces:30"], "--data: name the real images"),
        (["faces:30", "--data", "faces-b:30"], "--image-size: say at how many pixels"),
        (["RUN", "--image-size", "32"], "different sizes.*16 px, --image-size: 32 px"),
        (["RUN", "--data", "RUN", "--nearest", "a.png"], "is a run, which has none"),
        (["RUN", "--nearest", "a.jpg"], "name of a .png file"),
        (["RUN", "--count", "1"], "2 images or more"),
        (["RUN", "--features", "none.pt"], "no such file"),
        (["RUN", "--guidance", "2", "--data", "faces:30"], "guidance of 2 needs labels"),
        (["RUN", "--data", "PACKED", "--crop", "celeba"], "--crop: .* is packed already"),
        (["nothing", "--data", "faces:30", "--image-size", "16"], "no data at 'nothing'"),
    ],
)
def test_mistakes_are_told_in_a_line(runs, monkeypatch, arguments, said):
    places = {"RUN": runs / "plain", "PACKED": data.prepare("faces:80", 16, SHAPE.patch, heldout=0.2).path}
    with pytest.raises(UserError, match=said):
        command(monkeypatch, *[places.get(word, word) for word in arguments])
