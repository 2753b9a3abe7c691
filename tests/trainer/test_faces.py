"""The drawn portraits: counted randomness, labels that are independent and can be read off, variety, both styles."""

import functools
import hashlib
import itertools

import numpy as np
import pytest
import torch

from maskdiff import data, faces
from maskdiff.errors import UserError
from maskdiff.traits import ATTRIBUTES, Dice, Traits
from maskdiff_kernels import philox

SIZES = [len(names) for names in ATTRIBUTES.values()]


@functools.cache
def drawn(style: str, count: int, size: int = 32) -> tuple[np.ndarray, np.ndarray]:
    return faces.draw(style, size, faces.face_words(style, range(count)))


@pytest.mark.parametrize("style", faces.STYLES)
def test_words_are_the_projects_counted_randomness(style):
    words = faces.face_words(style, range(3, 9))
    seed = torch.tensor([faces.STYLES[style].seed])
    for i, n in enumerate(range(3, 9)):
        blocks = [philox.words(seed, torch.tensor([n]), 6, torch.tensor([block])) for block in range(faces.WORDS // 4)]
        assert words[i].tolist() == torch.cat(blocks, dim=1)[0].tolist()


@pytest.mark.parametrize("style", faces.STYLES)
def test_a_portrait_depends_on_its_number_alone(style):
    images, labels = drawn(style, 20)
    for n in (0, 7, 19):
        alone, label = faces.draw(style, 32, faces.face_words(style, range(n, n + 1)))
        assert np.array_equal(alone[0], images[n]) and np.array_equal(label[0], labels[n])


def test_a_set_begins_as_every_longer_one_whatever_the_workers(tmp_path):
    short = data.prepare("faces:150", 16, 4, cache=tmp_path / "a", workers=1)
    long = data.prepare("faces:450", 16, 4, cache=tmp_path / "b", workers=3)
    ids = range(150)
    assert torch.equal(short.images(ids), long.images(ids))
    assert torch.equal(short.labels, long.labels[:150])


@pytest.mark.parametrize("style", faces.STYLES)
def test_attributes_are_uniform_and_independent(style):
    from scipy.stats import chi2

    words = faces.face_words(style, range(20_000))
    labels = np.array([Traits.draw(Dice(row)).labels() for row in words])
    level = 1e-4  # of each of the 15 tests of a style; the words are fixed, so this cannot fail now and then
    for j, size in enumerate(SIZES):
        counts = np.bincount(labels[:, j], minlength=size)
        statistic = ((counts - len(labels) / size) ** 2 / (len(labels) / size)).sum()
        assert statistic < chi2.ppf(1 - level, size - 1), list(ATTRIBUTES)[j]
    for i, j in itertools.combinations(range(len(SIZES)), 2):
        counts = np.zeros((SIZES[i], SIZES[j]))
        np.add.at(counts, (labels[:, i], labels[:, j]), 1)
        expected = counts.sum(1, keepdims=True) * counts.sum(0) / counts.sum()
        statistic = ((counts - expected) ** 2 / expected).sum()
        assert statistic < chi2.ppf(1 - level, (SIZES[i] - 1) * (SIZES[j] - 1)), (i, j)


@pytest.mark.parametrize("style", faces.STYLES)
def test_attributes_can_be_read_at_32_pixels(style):
    """Even a linear readout of the pixels gets each attribute right at least midway between chance and always."""
    images, labels = drawn(style, 3000)
    x = np.pad(images.reshape(len(images), -1) / np.float32(255), ((0, 0), (0, 1)), constant_values=1)
    y = np.concatenate([np.eye(size, dtype=np.float32)[labels[:, j]] for j, size in enumerate(SIZES)], axis=1)
    train = slice(0, 2500)
    gram = x[train].T @ x[train] + 20 * np.eye(x.shape[1], dtype=np.float32)
    scores = x[2500:] @ np.linalg.solve(gram, x[train].T @ y[train])
    edges = np.cumsum(SIZES)[:-1]
    for j, (name, score) in enumerate(zip(ATTRIBUTES, np.split(scores, edges, axis=1), strict=True)):
        right = (score.argmax(1) == labels[2500:, j]).mean()
        assert right > (1 + 1 / SIZES[j]) / 2, (name, right)


@pytest.mark.parametrize("style", faces.STYLES)
def test_no_two_portraits_are_equal(style):
    images, _ = drawn(style, 3000)
    assert len({hashlib.sha256(image).digest() for image in images}) == 3000
    # nor nearly so among those with the same labels: their position, colours and background vary
    assert images.std(axis=0).mean() > 20


@pytest.mark.parametrize("style", faces.STYLES)
@pytest.mark.parametrize("attribute", range(len(SIZES)))
def test_each_attribute_changes_the_picture(style, attribute):
    words = faces.face_words(style, range(40))
    other = words.copy()
    index = (words[:, attribute].astype(np.int64) * SIZES[attribute]) >> 32
    other[:, attribute] = ((index + 1) % SIZES[attribute] * 2**32 // SIZES[attribute] + 1000).astype(np.uint32)
    before, labels = faces.draw(style, 32, words)
    after, changed = faces.draw(style, 32, other)
    assert (labels != changed).sum() == 40 and (labels[:, attribute] != changed[:, attribute]).all()
    strong = (np.abs(before.astype(int) - after).max(axis=3) > 24).sum(axis=(1, 2))
    assert strong.min() >= 5, "fewer than five of 1024 pixels differ clearly"


@pytest.mark.parametrize("style", faces.STYLES)
@pytest.mark.parametrize("size", [16, 17, 32, 65, 130])
def test_any_size_shows_the_same_portrait(style, size):
    from PIL import Image

    images, labels = drawn(style, 6, size)
    large, same = drawn(style, 6, 256)
    assert images.shape == (6, size, size, 3) and np.array_equal(labels, same)
    for image, picture in zip(images, large, strict=True):
        down = np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling.BOX)).astype(int)
        assert np.abs(down - image).mean() < 8


def test_the_styles_share_attributes_and_nothing_else():
    a, _ = drawn("faces", 300)
    b, _ = drawn("faces-b", 300)
    # a line between the two sets of single pixels' means exists: they are different distributions
    assert np.abs(a.mean(axis=0) - b.mean(axis=0)).mean() > 15
    assert not np.array_equal(faces.face_words("faces", range(5)), faces.face_words("faces-b", range(5)))


def test_portraits_are_anti_aliased():
    image = drawn("faces-b", 1, 64)[0][0]
    # flat fills without anti-aliasing would leave some 30 colours
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 150


@pytest.mark.parametrize("style", faces.STYLES)
def test_no_portrait_runs_out_of_words(style):
    most = 0
    for row in faces.face_words(style, range(500)):
        dice = Dice(row)
        faces.STYLES[style].draw(Traits.draw(dice), dice, 16)
        most = max(most, dice.used)
    assert 30 < most <= faces.WORDS


@pytest.mark.parametrize("spec", ["faces", "faces:", "faces:0", "faces:-3", "faces:9999999999", "faces-b:1.5"])
def test_a_wrong_number_is_an_error(spec, tmp_path):
    with pytest.raises(UserError, match="needs a number of images"):
        data.prepare(spec, 32, 4, cache=tmp_path)


def test_too_small_is_an_error(tmp_path):
    with pytest.raises(UserError, match="16 pixels or more, got image_size 12"):
        data.prepare("faces:10", 12, 4, cache=tmp_path)
