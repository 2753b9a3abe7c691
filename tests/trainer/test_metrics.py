"""Metrics against independent implementations, on features of all ranks; the way that they move; kept references."""

import dataclasses
import math
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

from maskdiff import data, faces, features, metrics
from maskdiff.errors import UserError


def normal(count: int, width: int, seed: int, rank: int | None = None) -> torch.Tensor:
    """Correlated features with a mean; of a lower rank if one is given."""
    generator = torch.Generator().manual_seed(seed)
    inner = rank or width
    mixed = torch.randn(count, inner, generator=generator) @ torch.randn(inner, width, generator=generator)
    return mixed + 3 * torch.rand(width, generator=generator)


FEATURES = {
    "random": (normal(300, 24, 1), normal(200, 24, 2)),
    "fewer images than dimensions": (normal(20, 96, 1), normal(35, 96, 2)),
    "many and few": (normal(5000, 48, 1), normal(7, 48, 2)),
    "low rank, far from zero": (normal(100, 64, 1, rank=3) + 1000, normal(80, 64, 2, rank=5) + 1000),
    "low rank": (normal(160, 64, 3, rank=3)[:90], normal(160, 64, 3, rank=3)[90:]),
    "constant on one side": (torch.full((40, 32), 2.5), normal(50, 32, 2)),
    "constant": (torch.full((40, 32), 2.5), torch.full((30, 32), -1.0)),
}


@pytest.mark.parametrize("name", FEATURES)
def test_frechet_distance_is_that_of_the_nuclear_norm(name):
    """The trace of the root is the sum of the singular values of the centred features' product, whatever the rank."""
    a, b = (side.double().numpy() for side in FEATURES[name])
    parts = [(side - side.mean(0)) / math.sqrt(len(side) - 1) for side in (a, b)]
    scale = sum((part**2).sum() for part in parts) + ((a.mean(0) - b.mean(0)) ** 2).sum()
    expected = scale - 2 * np.linalg.norm(parts[0] @ parts[1].T, "nuc")
    got = metrics.frechet_distance(*map(metrics.moments, FEATURES[name]))
    assert abs(got - expected) <= 1e-4 * scale
    if name == "random":
        linalg = pytest.importorskip("scipy.linalg", reason="comes with scikit-learn")
        root = linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
        traces = np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
        assert abs(got - traces - ((a.mean(0) - b.mean(0)) ** 2).sum()) <= 1e-4 * scale


def test_kid_is_the_mean_over_fixed_subsets():
    from sklearn.metrics.pairwise import polynomial_kernel

    real, drawn = FEATURES["random"]
    before = torch.get_rng_state()
    got = metrics.kernel_distance(real, drawn)
    assert torch.equal(torch.get_rng_state(), before) and got == metrics.kernel_distance(real, drawn)
    generator = torch.Generator().manual_seed(metrics.KID_SEED)
    size, found = 100, []  # half of the fewer
    for _ in range(100):
        x, y = (side[torch.randperm(len(side), generator=generator)[:size]].double().numpy() for side in (real, drawn))
        within = [polynomial_kernel(part, degree=3, gamma=1 / 24, coef0=1) for part in (x, y)]
        across = polynomial_kernel(x, y, degree=3, gamma=1 / 24, coef0=1)
        found.append(sum((k.sum() - np.trace(k)) / (size * (size - 1)) for k in within) - 2 * across.mean())
    assert got == pytest.approx((np.mean(found), np.std(found)), rel=1e-9)


@pytest.mark.parametrize("name", ["random", "fewer images than dimensions", "low rank"])
def test_neighbourhoods_are_those_of_their_definitions(name):
    real, drawn = (side.double() for side in FEATURES[name])
    drawn = drawn - drawn.mean(0) + real.mean(0)  # so that they overlap
    across = (real[:, None] - drawn).norm(dim=2)
    near, far = ((real[:, None] - real).norm(dim=2).sort(1).values[:, k] for k in (3, 5))  # 0: the image itself
    drawn_near = (drawn[:, None] - drawn).norm(dim=2).sort(1).values[:, 3]
    expected = [
        (across <= near[:, None]).any(0).double().mean(),
        (across <= drawn_near).any(1).double().mean(),
        (across <= far[:, None]).sum() / (5 * len(drawn)),
        (across <= far[:, None]).any(1).double().mean(),
    ]
    assert 0 < min(expected[:2]) and min(expected) < 1
    assert metrics.neighbourhoods(real.float(), drawn.float()) == pytest.approx([float(x) for x in expected], abs=1e-6)


def test_equal_images_reach_each_other():
    """However many copies, and however far from zero: rounding tells none of them apart."""
    real = normal(20, 16, 1).repeat(8, 1) * 100
    precision, recall, _, coverage = metrics.neighbourhoods(real, real[torch.randperm(160)])
    assert (precision, recall, coverage) == (1, 1, 1)
    constant = metrics.neighbourhoods(torch.ones(9, 4), torch.ones(7, 4))
    assert constant == (1, 1, 9 / 5, 1)


def drawn_faces(first: int, count: int, style: str = "faces") -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(map(torch.from_numpy, faces.draw(style, 32, faces.face_words(style, range(first, first + count)))))


@pytest.fixture(scope="module")
def moves():
    """Scores of fresh faces, and of those with something wrong, by the built-in extractor."""
    extractor = features.load(device="cpu")
    training = drawn_faces(0, 300)[0]
    reference = metrics.Reference.from_features(extractor(training))
    many, labels = drawn_faces(1000, 500)
    fresh = many[:100]
    noise = torch.randn(fresh.shape, generator=torch.Generator().manual_seed(0))
    planes = F.pad(fresh.permute(0, 3, 1, 2).float(), [1] * 4, "replicate")
    wrong = {
        "fresh": fresh,
        "noise": (fresh + 20 * noise).clamp(0, 255).to(torch.uint8),
        "more noise": (fresh + 40 * noise).clamp(0, 255).to(torch.uint8),
        "blur": F.avg_pool2d(planes, 3, 1).permute(0, 2, 3, 1).to(torch.uint8),
        "one mode": many[labels[:, 0] == 0][:100],
        "few": fresh[:10].repeat(10, 1, 1, 1),
        "memorised": training[::3],
    }
    return {name: reference.compare(extractor(images)) for name, images in wrong.items()}


def test_every_metric_moves_the_right_way(moves):
    fresh = moves["fresh"]
    assert abs(fresh.kid) < 2 * fresh.kid_std + 0.01 and fresh.precision > 0.85 and fresh.recall > 0.85
    for name in ("noise", "more noise", "blur", "one mode", "few"):
        assert moves[name].frechet > 1.5 * fresh.frechet, name
        assert moves[name].kid > fresh.kid + 0.02, name
        assert moves[name].coverage < fresh.coverage, name
    assert moves["more noise"].frechet > moves["noise"].frechet and moves["more noise"].kid > moves["noise"].kid
    for name in ("more noise", "blur"):  # seen in the images themselves
        assert moves[name].precision < fresh.precision and moves[name].density < fresh.density, name
    assert moves["few"].recall < moves["one mode"].recall < fresh.recall - 0.1  # seen in what is missing
    assert moves["few"].precision > 0.8 and moves["one mode"].precision > 0.8
    memorised = moves["memorised"]
    assert memorised.precision == 1 and memorised.coverage > fresh.coverage and memorised.density > fresh.density
    assert memorised.frechet < fresh.frechet


def test_too_few_images():
    reference = metrics.Reference.from_features(normal(40, 8, 1))
    scores = reference.compare(normal(3, 8, 2))
    assert math.isfinite(scores.frechet) and (scores.count, scores.real_count) == (3, 40)
    assert set(dataclasses.astuple(scores)[1:7]) == {None}
    for few, width, said in ((1, 8, "at least 2 images"), (9, 7, r"are \[9, 7\].*\[N, 8\]")):
        with pytest.raises(UserError, match=said):
            reference.compare(normal(few, width, 2))


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.neighbors", None)
    with pytest.raises(UserError, match="need scikit-learn.*pip install scikit-learn"):
        metrics.Reference.from_features(normal(40, 8, 1))


class Counting(features.Extractor):
    """The built-in, which counts the images that it was shown."""

    def __init__(self, digest: str = "0" * 16) -> None:
        self.seen = 0
        super().__init__(lambda planes: planes.float().mean((2, 3)), "counting", digest, torch.device("cpu"))
        self.seen = 0

    def __call__(self, images):
        self.seen += len(images)
        return super().__call__(images)


def test_references_are_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MASKDIFF_CACHE", str(tmp_path))
    packed = data.prepare("faces:60", 16, 4, workers=1, heldout=0.2)
    extractor = Counting()

    def seen(extractor=extractor, ids=None):
        before = extractor.seen
        made.append(metrics.Reference.of(extractor, packed, ids))
        return extractor.seen - before

    made: list[metrics.Reference] = []
    train = len(packed.train_ids)
    assert [seen(), seen()] == [train, 0]
    for one, other in zip(made[0].moments, made[1].moments, strict=True):
        assert torch.equal(one, other)
    assert made[0].count == made[1].count == train
    assert torch.equal(made[0].features, made[1].features) and torch.equal(made[0].reach, made[1].reach)
    probe = extractor(packed.images(packed.heldout_ids))
    assert made[0].compare(probe) == made[1].compare(probe)
    assert seen(ids=packed.heldout_ids) == len(packed.heldout_ids) and seen(Counting("1" * 16)) == train
    files = sorted((tmp_path / "features").iterdir())
    assert len(files) == 3 and not any(file.name.startswith(".") for file in files)
    tensors = safetensors.torch.load(files[0].read_bytes())
    tensors["mean"][0] = math.nan
    for damage in (b"", files[0].read_bytes()[:-8], b"\0" * 100, safetensors.torch.save(tensors)):
        for file in files:
            file.write_bytes(damage)
        capsys.readouterr()
        assert [seen(), seen()] == [train, 0]
        assert capsys.readouterr().err.count("is damaged and made anew") == 1
