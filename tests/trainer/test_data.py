"""Packed sets opened and prepared: pixels as the ops and as people see them, the cache, and all that can be wrong."""

import json
import os
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from picture_files import encoded, noise
from PIL import Image

from maskdiff import data
from maskdiff.data import open_packed, prepare
from maskdiff.errors import UserError
from maskdiff.packing.manifest import Manifest, _sha256
from maskdiff.packing.sources import Options, open_source
from maskdiff.packing.writer import pack
from maskdiff_kernels import Mask, draw_batch, noisy_patches


def pictures(folder: Path, count: int, size: int) -> Path:
    folder.mkdir()
    for i in range(count):
        (folder / f"{i:03}.png").write_bytes(encoded(noise(i, size)))
    return folder


@pytest.fixture
def packed(tmp_path):
    """A packed set of ten noise pictures of 10 px in patches of 5: 300 bytes an image, 320 from one to the next."""
    pack(open_source(str(pictures(tmp_path / "pictures", 10, 10)), Options()), tmp_path / "set", 10, 5)
    return tmp_path / "set"


@pytest.mark.parametrize("change", [{"crop": "celeba64"}, {"subset": "10%"}, {"background": "black"}])
def test_what_is_packed_or_made_here_takes_no_options(packed, change):
    if "subset" not in change:
        with pytest.raises(UserError, match=f"data.{next(iter(change))}: .*is packed already"):
            prepare(packed, 10, 5, **change)
    for spec in ("faces:20", "digits"):
        with pytest.raises(UserError, match=f"'{spec}' is made here as it is"):
            prepare(spec, 32, 4, **change)


def test_a_subset_of_a_packed_set_is_one_of_its_training_images(tmp_path):
    pack(open_source(str(pictures(tmp_path / "many", 40, 10)), Options()), tmp_path / "set", 10, 5, heldout=0.3)
    whole, half, few = (prepare(tmp_path / "set", 10, 5, subset=subset) for subset in (None, "50%", "3"))
    ids = [set(one.train_ids.tolist()) for one in (whole, half, few)]
    assert ids[0] > ids[1] > ids[2] and [len(one) for one in ids[1:]] == [round(len(ids[0]) / 2), 3]
    assert half.train_ids.diff().min() > 0 and torch.equal(half.heldout_ids, whole.heldout_ids)
    assert len({one.hash for one in (whole, half, few)}) == 3
    with pytest.raises(UserError, match="there are only"):
        prepare(tmp_path / "set", 10, 5, subset="40")


def test_images_are_the_pictures(packed):
    opened = open_packed(packed)
    assert len(opened) == 10 and (opened.image_size, opened.channels, opened.patch) == (10, 3, 5)
    assert opened.store.grid == (2, 2) and opened.store.patch == 5
    for ids in ([3, 0, 9], torch.tensor([3, 0, 9]), range(2)):
        images = opened.images(ids)
        assert images.dtype == torch.uint8
        assert np.array_equal(images.numpy(), np.stack([noise(int(i), 10) for i in ids]))


def test_the_store_is_mapped_strided_and_taken_by_the_ops(packed, recwarn):
    opened = open_packed(packed)
    patches = opened.store.patches
    assert patches.shape == (10, 4, 75) and patches.stride() == (320, 75, 1) and patches.dtype == torch.uint8
    assert not [warning for warning in recwarn if "writable" in str(warning.message)]
    with open("/proc/self/maps") as maps:
        assert any(line.rstrip().endswith(str(packed / "images.u8")) for line in maps)
    batch = draw_batch(torch.tensor([5]), torch.arange(10), 10, (2, 2), Mask("patch", counts=(3,)), backend="reference")
    visible = noisy_patches(opened.store, batch, None, torch.tensor([5]), backend="reference")
    for row, image_id, keep in zip(visible, batch.image_ids, batch.keep_ids, strict=True):
        whole = noise(int(image_id), 10)
        for values, place in zip(row, keep, strict=True):
            y, x = divmod(int(place), 2)
            expected = whole[5 * y : 5 * y + 5, 5 * x : 5 * x + 5].reshape(-1) * np.float32(2 / 255) - 1
            assert np.allclose(values.numpy(), expected, atol=1e-6)


def test_split_covers_all_images_and_survives_another_patch_size(tmp_path):
    a = prepare("faces:300", 16, 4, cache=tmp_path)
    b = prepare("faces:300", 16, 2, cache=tmp_path)
    assert torch.equal(torch.cat([a.train_ids, a.heldout_ids]).sort().values, torch.arange(300))
    assert torch.equal(a.heldout_ids, b.heldout_ids) and a.hash != b.hash
    assert a.train_ids.dtype == a.heldout_ids.dtype == torch.int64 and 1 <= len(a.heldout_ids) <= 20
    none = prepare("faces:300", 16, 4, cache=tmp_path, heldout=0)
    assert len(none.heldout_ids) == 0 and len(none.train_ids) == 300


def test_labels_of_faces_and_digits_and_none(tmp_path, packed):
    faces = prepare("faces-b:40", 16, 4, cache=tmp_path)
    assert faces.label_names == ["skin", "hair", "glasses", "mood", "style"]
    assert faces.labels.shape == (40, 5) and faces.labels.dtype == torch.int32
    classes = torch.tensor([len(names) for names in faces.class_names])
    assert (faces.labels >= 0).all() and (faces.labels < classes).all()
    plain = open_packed(packed)
    assert plain.labels.shape == (10, 0) and plain.class_names == [] and plain.label_names == []


def test_digits_are_the_digits(tmp_path):
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is an extra")
    digits = prepare("digits", 16, 4, cache=tmp_path)
    small, targets = datasets.load_digits(return_X_y=True)
    assert len(digits) == 1797 and digits.channels == 1 and digits.class_names == [[str(i) for i in range(10)]]
    assert np.array_equal(digits.labels[:, 0].numpy(), targets)
    halved = digits.images(range(1797)).numpy().reshape(1797, 8, 2, 8, 2).mean(axis=(2, 4)).reshape(1797, 64)
    assert np.corrcoef(halved.ravel(), small.ravel())[0, 1] > 0.97


def test_digits_without_scikit_learn_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match="needs scikit-learn.*pip install scikit-learn"):
        prepare("digits", 16, 4, cache=tmp_path)


def test_the_cache_is_used_again_and_keyed_by_content_and_recipe(tmp_path, monkeypatch):
    root, cache = pictures(tmp_path / "mine", 6, 16), tmp_path / "cache"
    first = prepare(root, 16, 4, cache=cache)
    monkeypatch.setattr(data, "pack", None)  # packing again would fail
    assert prepare(root, 16, 4, cache=cache).path == first.path
    monkeypatch.undo()
    others = [prepare(root, 16, 8, cache=cache), prepare(root, 8, 4, cache=cache)]
    others.append(prepare(root, 16, 4, background="black", cache=cache))
    others.append(prepare(root, 16, 4, heldout=0.5, cache=cache))
    (root / "000.png").write_bytes(encoded(noise(77, 16)))
    others.append(prepare(root, 16, 4, cache=cache))
    assert len({first.path, *(other.path for other in others)}) == 6
    assert np.array_equal(others[-1].images([0])[0].numpy(), noise(77, 16))


def test_the_cache_folder_comes_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("MASKDIFF_CACHE", str(tmp_path / "here"))
    assert prepare("faces:5", 16, 4).path.parent == tmp_path / "here"
    monkeypatch.delenv("MASKDIFF_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert prepare("faces:5", 16, 4).path.parent == tmp_path / "home" / ".cache" / "maskdiff"


def test_identity_does_not_depend_on_where_the_pictures_lie(tmp_path):
    a = prepare(pictures(tmp_path / "a", 6, 16), 16, 4, cache=tmp_path / "cache")
    b = prepare(pictures(tmp_path / "b", 6, 16), 16, 4, cache=tmp_path / "other")
    archive = tmp_path / "c.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in (tmp_path / "a").iterdir():
            file.write(path, path.name)
    c = prepare(archive, 16, 4, cache=tmp_path / "cache")
    assert a.hash == b.hash == c.hash
    assert a.hash != prepare(pictures(tmp_path / "d", 5, 16), 16, 4, cache=tmp_path / "cache").hash


def test_a_damaged_cache_is_packed_anew(tmp_path, capsys):
    first = prepare("faces:30", 16, 4, cache=tmp_path)
    images = first.images(range(30))
    del first
    [folder] = tmp_path.glob("faces*")
    os.truncate(folder / "images.u8", 1000)
    again = prepare("faces:30", 16, 4, cache=tmp_path)
    assert torch.equal(again.images(range(30)), images)
    assert "warning: the cached set is packed anew" in capsys.readouterr().err


def test_two_at_once_pack_once(tmp_path, monkeypatch, capsys):
    real, packed = data.pack, []

    def slow(*arguments):
        packed.append(arguments)
        time.sleep(0.5)
        real(*arguments)

    monkeypatch.setattr(data, "pack", slow)
    with ThreadPoolExecutor(2) as threads:
        both = list(threads.map(lambda _: prepare("faces:30", 16, 4, cache=tmp_path), range(2)))
    assert len(packed) == 1 and both[0].hash == both[1].hash
    assert "waiting for another process that packs" in capsys.readouterr().err


def test_a_packed_set_is_data_as_it_is(packed, tmp_path):
    opened = prepare(packed, 10, 5, cache=tmp_path / "cache")
    assert opened.path == packed and not (tmp_path / "cache").exists()
    with pytest.raises(UserError, match="holds images of 10 px, the model wants 20"):
        prepare(packed, 20, 5)
    with pytest.raises(UserError, match="is packed with patch 5, the model wants 2"):
        prepare(packed, 10, 2)


def test_the_background_lies_behind_transparent_pictures(tmp_path):
    root = tmp_path / "clear"
    root.mkdir()
    Image.new("RGBA", (8, 8), (9, 9, 9, 0)).save(root / "a.png")
    for background, color in (("white", (255, 255, 255)), ("#102030", (16, 32, 48))):
        image = prepare(root, 8, 4, background=background, cache=tmp_path / "cache").images([0])
        assert (image == torch.tensor(color, dtype=torch.uint8)).all()


@pytest.mark.parametrize(
    ("spec", "image_size", "patch", "message"),
    [
        ("nowhere/at/all", 32, 4, "no data at 'nowhere/at/all'.*faces:N"),
        ("face:100", 32, 4, "no data at 'face:100'.*faces:N"),
        ("faces:10", 30, 4, "image size 30 is not divisible by patch 4; use 28 or 32"),
        ("faces:10", 2, 4, "image size 2 is not divisible by patch 4; use 4"),
        ("faces:10", 32, 0, "must be at least 1"),
    ],
)
def test_what_cannot_be_prepared_is_one_clear_line(spec, image_size, patch, message, tmp_path):
    with pytest.raises(UserError, match=message) as raised:
        prepare(spec, image_size, patch, cache=tmp_path / "cache")
    assert "\n" not in str(raised.value) and not (tmp_path / "cache").exists()


def test_a_file_that_is_no_source_is_an_error(tmp_path):
    (tmp_path / "one.png").write_bytes(encoded(noise(0, 8)))
    with pytest.raises(UserError, match="one.png' is none of what can be read; give a folder, zip or tar"):
        prepare(tmp_path / "one.png", 8, 4)


def test_a_cache_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the packed set .*MASKDIFF_CACHE"):
        prepare("faces:5", 16, 4, cache=tmp_path / "file" / "cache")


def edited(field: str, value):
    """Changes a field of the manifest and its checksum with it: as one would who means it."""

    def edit(folder: Path) -> None:
        content = json.loads((folder / "manifest.json").read_text())
        content.pop("checksum")
        content[field] = value
        content["checksum"] = _sha256(content)
        (folder / "manifest.json").write_text(json.dumps(content))

    return edit


def replaced(name: str, old: bytes, new: bytes):
    def replace(folder: Path) -> None:
        content = (folder / name).read_bytes()
        assert old in content
        (folder / name).write_bytes(content.replace(old, new, 1))

    return replace


def truncated(name: str, by: int):
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - by)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "has no manifest.json"),
        (truncated("manifest.json", 9), "manifest.json' is damaged: no JSON"),
        (lambda folder: (folder / "manifest.json").write_bytes(b"\xff\xfe"), "no JSON"),
        (lambda folder: (folder / "manifest.json").write_text("[" * 200_000), "no JSON"),
        (lambda folder: (folder / "manifest.json").write_text("[1]"), "not the manifest of a packed set"),
        (replaced("manifest.json", b'"version": 2', b'"version": 1'), "version 1 of the packed format, .* reads 2"),
        (replaced("manifest.json", b'"count": 10', b'"count": 11'), "altered: its checksum"),
        (edited("count", 11), "contradicts itself in files"),
        (edited("count", True), "contradicts itself in count"),
        (edited("stride", 300), "contradicts itself in stride"),
        (edited("patch", 4), "contradicts itself in patch"),
        (edited("class_names", [["a"]]), "contradicts itself in class_names"),
        (edited("blocks", []), "contradicts itself in blocks"),
        (edited("files", {}), "contradicts itself in files"),
        (edited("heldout", 5), "split.npy' does not fit the manifest"),
        (edited("surprise", 1), "does not have the fields it must have .surprise"),
        (truncated("images.u8", 1), "images.u8' has 3,199 bytes instead of 3,200"),
        (lambda folder: (folder / "images.u8").unlink(), "images.u8' is missing"),
        (lambda folder: (folder / "labels.npy").unlink(), "labels.npy' is missing"),
        (truncated("split.npy", 1), "split.npy' has"),
        (replaced("split.npy", b"NUMPY", b"numpy"), "split.npy' was altered"),
        (replaced("labels.npy", b"<i4", b"<f4"), "labels.npy' was altered"),
    ],
)
def test_a_damaged_set_is_named_on_opening(packed, damage, message):
    damage(packed)
    with pytest.raises(UserError, match=message) as raised:
        open_packed(packed)
    assert "\n" not in str(raised.value)


def test_no_folder_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no packed set at"):
        open_packed(tmp_path / "none")


def test_wrong_arrays_with_right_checksums_are_found(packed):
    import hashlib

    def replace(name, array):
        np.save(packed / name, array)
        content = (packed / name).read_bytes()
        files = json.loads((packed / "manifest.json").read_text())["files"]
        files[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        edited("files", files)(packed)

    replace("labels.npy", np.zeros((9, 0), np.int32))
    with pytest.raises(UserError, match=r"labels.npy' is int32 \(9, 0\), must be int32 \(10, 0\)"):
        open_packed(packed)
    replace("labels.npy", np.full((10, 1), 3, np.int32))
    edited("label_names", ["kind"])(packed)
    edited("class_names", [["a", "b", "c"]])(packed)
    edited("class_counts", [[0, 0, 1, 9]])(packed)
    with pytest.raises(UserError, match="names classes that the manifest lacks"):
        open_packed(packed)
    replace("labels.npy", np.array([[-1]] * 9 + [[2]], np.int32))
    assert open_packed(packed).labels[-1].tolist() == [2]
    edited("class_counts", [[0, 1, 0, 9]])(packed)
    with pytest.raises(UserError, match="labels.npy' does not fit the manifest"):
        open_packed(packed)
    edited("class_counts", [[0, 0, 1, 9]])(packed)
    split = np.load(packed / "split.npy")
    replace("split.npy", split * 2)
    with pytest.raises(UserError, match="split.npy' does not fit"):
        open_packed(packed)


def test_every_hash_of_the_manifest_is_that_of_the_files(tmp_path, monkeypatch):
    import hashlib

    from maskdiff.packing import check, writer
    from maskdiff.packing import manifest as module

    monkeypatch.setattr(module, "BLOCK", 1000)
    monkeypatch.setattr(writer, "BLOCK", 1000)
    monkeypatch.setattr(check, "BLOCK", 1000)
    pack(open_source(str(pictures(tmp_path / "pictures", 10, 10)), Options()), tmp_path / "set", 10, 5)
    manifest = Manifest.read(tmp_path / "set")
    content = (tmp_path / "set" / "images.u8").read_bytes()
    assert manifest.blocks == [hashlib.sha256(content[:end]).hexdigest() for end in (1000, 2000, 3000, 3200)]
    for name, file in manifest.files.items():
        assert hashlib.sha256((tmp_path / "set" / name).read_bytes()).hexdigest() == file["sha256"]


def test_verify_finds_an_altered_pixel_and_where(tmp_path, monkeypatch):
    from maskdiff.packing import check, writer
    from maskdiff.packing import manifest as module

    for place in (module, check, writer):
        monkeypatch.setattr(place, "BLOCK", 1000)
    pack(open_source(str(pictures(tmp_path / "pictures", 10, 10)), Options()), tmp_path / "set", 10, 5)
    assert check.verify(tmp_path / "set").count == 10
    content = (tmp_path / "set" / "images.u8").read_bytes()
    for at, images in ((0, "0 to 3"), (999, "0 to 3"), (1000, "3 to 6"), (3199, "9 to 9")):  # the last is padding
        (tmp_path / "set" / "images.u8").write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        open_packed(tmp_path / "set")  # takes no look at pixels
        with pytest.raises(UserError, match=f"images.u8' was altered, first among images {images}; pack again"):
            check.verify(tmp_path / "set")
