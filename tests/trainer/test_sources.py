"""Every kind of source packed: pixels, labels, order, subsets, crops; and what is no source."""

import io
import json
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from picture_files import encoded, noise
from PIL import Image

from maskdiff.data import open_packed, prepare
from maskdiff.errors import UserError
from maskdiff.packing.decode import Frame, decode, from_pixels
from maskdiff.packing.labels import of_files
from maskdiff.packing.look import RECIPES, Look
from maskdiff.packing.manifest import Manifest
from maskdiff.packing.sources import Options, open_source
from maskdiff.packing.writer import pack

SIDE = 8
CLASSES = ("ant", "bee", "cat")


def pixels(number: int, height: int = SIDE, width: int = SIDE) -> np.ndarray:
    return noise(number, height, width)


def name(number: int) -> str:
    return f"{CLASSES[number % 3]}/{number:03}.png"


COUNT = 150
ORDER = sorted(range(COUNT), key=name)  # of files sorted by name
PNGS = {number: encoded(pixels(number)) for number in range(COUNT)}


def folder(root: Path) -> str:
    for number in range(COUNT):
        path = root / "pictures" / name(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PNGS[number])
    return str(root / "pictures")


def zipped(root: Path) -> str:
    with zipfile.ZipFile(root / "p.zip", "w") as archive:
        for number in range(COUNT):
            archive.writestr(name(number), PNGS[number])
    return str(root / "p.zip")


def tarred(mode: str):
    def build(root: Path) -> str:
        path = root / "p.tar"
        with tarfile.open(path, f"w:{mode}") as archive:
            for number in ORDER:
                member = tarfile.TarInfo(name(number))
                member.size = len(PNGS[number])
                archive.addfile(member, io.BytesIO(PNGS[number]))
        return str(path)

    return build


FEATURES = {"image": {"_type": "Image"}, "label": {"names": list(CLASSES), "_type": "ClassLabel"}}


def table(root: Path, name_: str, numbers, features=FEATURES, group: int = 40, label=lambda number: number % 3) -> Path:
    pa = pytest.importorskip("pyarrow", reason="pyarrow is an extra")
    parquet = pytest.importorskip("pyarrow.parquet")
    values = [{"bytes": PNGS[number], "path": name(number)} for number in numbers]
    columns = {
        "image": pa.array(values, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        "label": pa.array([label(number) for number in numbers]),
    }
    made = pa.table(columns)
    if features:
        made = made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    parquet.write_table(made, root / name_, row_group_size=group)
    return root / name_


def parquet_file(root: Path) -> str:
    return str(table(root, "p.parquet", ORDER))


def parquet_folder(root: Path) -> str:
    (root / "set" / "data").mkdir(parents=True)
    table(root / "set" / "data", "train-00001-of-00002.parquet", ORDER[70:])
    table(root / "set" / "data", "train-00000-of-00002.parquet", ORDER[:70])
    table(root / "set" / "data", "test-00000-of-00001.parquet", range(5))
    return str(root / "set")


def npz(root: Path) -> str:
    labels = np.array([number % 3 for number in ORDER], np.uint8)
    np.savez(root / "p.npz", images=np.stack([pixels(number) for number in ORDER]), labels=labels)
    return str(root / "p.npz")


def npy(root: Path) -> str:
    np.save(root / "p.npy", np.stack([pixels(number) for number in ORDER]).transpose(0, 3, 1, 2))
    return str(root / "p.npy")


def hf(root: Path) -> str:
    datasets = pytest.importorskip("datasets", reason="datasets is an extra")
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list(CLASSES)))
    values = {
        "image": [{"bytes": PNGS[number], "path": None} for number in ORDER],
        "label": [number % 3 for number in ORDER],
    }
    loaded = datasets.Dataset.from_dict(values, features=features)
    datasets.DatasetDict({"train": loaded, "test": loaded.select(range(3))}).save_to_disk(root / "hub")
    return f"hf:{root / 'hub'}"


KINDS = {
    "folder": folder,
    "zip": zipped,
    "tar": tarred(""),
    "tar.gz": tarred("gz"),
    "tar.xz": tarred("xz"),
    "parquet": parquet_file,
    "parquet folder": parquet_folder,
    "npz": npz,
    "npy": npy,
    "hf": hf,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_source_is_the_same_set(kind, tmp_path):
    source = open_source(KINDS[kind](tmp_path), Options())
    assert source.count == COUNT
    pack(source, tmp_path / "out", SIDE, 4)
    packed = open_packed(tmp_path / "out")
    assert np.array_equal(packed.images(range(COUNT)).numpy(), np.stack([pixels(number) for number in ORDER]))
    if kind == "npy":
        assert packed.class_names == []
        return
    names = [str(number) for number in range(3)] if kind == "npz" else list(CLASSES)
    attribute = {"folder": "class", "zip": "class", "npz": "labels"}.get(kind.partition(".")[0].replace("tar", "zip"))
    assert packed.label_names == [attribute or "label"] and packed.class_names == [names]
    assert packed.labels[:, 0].tolist() == [number % 3 for number in ORDER]
    assert Manifest.read(tmp_path / "out").class_counts == [[50, 50, 50, 0]]


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "parquet folder", "hf", "npz"])
def test_bytes_do_not_depend_on_workers_or_interruptions(kind, tmp_path):
    source = open_source(KINDS[kind](tmp_path), Options())
    for workers in (1, 2):
        pack(source, tmp_path / f"by{workers}", SIDE, 4, workers=workers)
    jobs = list(source.jobs(SIDE, 4))
    assert len(jobs) == 3
    for start in range(4):
        rest = list(source.jobs(SIDE, 4, start))
        assert [item.name for job in rest for item in job.items] == [
            item.name for job in jobs[start:] for item in job.items
        ]
        assert [[item.labels for item in job.items] for job in rest] == [
            [item.labels for item in job.items] for job in jobs[start:]
        ]
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / f"by{n}").iterdir()} for n in (1, 2))
    assert one == two


@pytest.mark.parametrize("kind", KINDS)
def test_subsets_are_nested_and_the_same_every_time(kind, tmp_path):
    spec, found = KINDS[kind](tmp_path), {}
    for subset, count in ((None, 150), ("10%", 15), ("1%", 2), ("0.1%", 1), ("40", 40), ("100%", 150)):
        source = open_source(spec, Options(subset=subset))
        names = [item.name for job in source.jobs(SIDE, 4) for item in job.items]
        assert len(names) == len(set(names)) == source.count == count
        assert names == [
            item.name for job in open_source(spec, Options(subset=subset)).jobs(SIDE, 4) for item in job.items
        ]
        found[subset] = names
    order = found[None]
    for small, large in (("0.1%", "1%"), ("1%", "10%"), ("10%", "40"), ("40", None)):
        assert set(found[small]) < set(found[large])
        assert found[small] == [name for name in order if name in set(found[small])]


def test_a_list_says_which_pictures_are_taken(tmp_path):
    spec = zipped(tmp_path)
    names = [item.name for job in open_source(spec, Options()).jobs(SIDE, 4) for item in job.items]

    def taken(text, value="", **more) -> list[str]:
        (tmp_path / "list.txt").write_text(text)
        chosen = open_source(spec, Options(only=f"{tmp_path}/list.txt{value}", **more))
        hashes.add(chosen.recipe()["only"])
        return [item.name for job in chosen.jobs(SIDE, 4) for item in job.items]

    hashes: set[str] = set()
    ends = [name.rpartition("/")[2] for name in names]
    partition = "".join(f"{end} {number % 3}\n" for number, end in enumerate(ends))  # as CelebA's
    assert taken(partition, ":0") == names[::3] and taken(partition, ":2") == names[2::3]
    assert taken("image_id,partition\n" + partition.replace(" ", ","), ":1") == names[1::3]
    assert taken(f"{names[7]}\n\n{ends[3]}\n") == [names[3], names[7]]
    assert set(taken(partition, ":0", subset="3")) < set(names[::3]) and len(hashes) == 5
    assert "only" not in open_source(spec, Options()).recipe()
    for text, value, words in (
        (partition, ":3", "no line of .* is a name with 3 behind it"),
        ("", "", "no line of .* is a name"),
        (f"{ends[0]}\nabsent.png\n", "", "1 of its names are not in .*'absent.png' first"),
    ):
        with pytest.raises(UserError, match=words):
            taken(text, value)
    with pytest.raises(UserError, match="cannot be read: No such file"):
        open_source(spec, Options(only="absent.txt:0"))


def test_a_subset_keeps_what_is_held_out(tmp_path):
    spec = folder(tmp_path)
    held = {}
    for subset in (None, "20%"):
        pack(open_source(spec, Options(subset=subset)), tmp_path / f"{subset}", SIDE, 4, heldout=0.3)
        packed = open_packed(tmp_path / f"{subset}")
        held[subset] = {
            bytes(image.numpy().tobytes()): int(number) in set(packed.heldout_ids.tolist())
            for number, image in enumerate(packed.images(range(len(packed))))
        }
    assert len(held["20%"]) == 30 and len(set(held["20%"].values())) == 2
    assert all(held[None][image] == side for image, side in held["20%"].items())


@pytest.mark.parametrize("subset", ["0", "0%", "101%", "-3", "many", "nan%", "1e3", "151", "inf%", "%", ""])
def test_subsets_that_are_none(subset, tmp_path):
    with pytest.raises(UserError, match="subset"):
        open_source(folder(tmp_path), Options(subset=subset))


def test_the_trainer_takes_any_source(tmp_path):
    for kind in ("tar.gz", "parquet", "npy", "hf"):
        spec = KINDS[kind](tmp_path)
        packed = prepare(spec, SIDE, 4, cache=tmp_path / "cache")
        assert len(packed) == COUNT and prepare(spec, SIDE, 4, cache=tmp_path / "cache").path == packed.path
    assert len(list((tmp_path / "cache").glob("[!.]*"))) == 4


# ---- labels


def csv(root: Path, text: str) -> str:
    path = root / "labels.csv"
    path.write_text(text, encoding="utf-8")
    return str(path)


def labels_of(source) -> tuple[dict[str, list[str]], dict[str, tuple[int, ...]]]:
    return source.labels, {item.name: item.labels for job in source.jobs(SIDE, 4) for item in job.items}


def test_labels_from_csv(tmp_path):
    spec = folder(tmp_path)
    rows = [
        f"{name(number)},{'10 9 x'.split()[number % 3]},{'' if number % 2 else 'yes'}" for number in range(1, COUNT)
    ]
    file = csv(tmp_path, "\n".join(["image,size,glasses", *rows]))
    names, labels = labels_of(open_source(spec, Options(labels=file)))
    assert names == {"size": ["9", "10", "x"], "glasses": ["yes"]}
    assert labels[name(0)] == (-1, -1) and labels[name(3)] == (1, -1) and labels[name(4)] == (0, 0)
    names, labels = labels_of(open_source(spec, Options(labels=f"{file}:glasses")))
    assert names == {"glasses": ["yes"]} and labels[name(4)] == (0,)


def test_labels_from_csv_by_the_last_part_of_a_name_and_with_tabs(tmp_path):
    spec = zipped(tmp_path)
    file = csv(tmp_path, "﻿kind\tfile_name\n" + "\n".join(f'"k{n}"\t{n:03}.png' for n in range(COUNT)))
    names, labels = labels_of(open_source(spec, Options(labels=file)))
    assert names["kind"] == sorted(f"k{n}" for n in range(COUNT))
    assert labels[name(7)] == (names["kind"].index("k7"),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "hold no row"),
        ("file,kind\n", "hold no row"),
        ("file,kind\na.png,1,2\n", "row 1 has 3 cells, the first line 2"),
        ("file,kind\nnowhere.png,1\n", "name none of the pictures"),
        ("file\nant/000.png\n", "no column beside 'file'"),
        ("file,kind,kind\nant/000.png,1,1\n", "name a column twice"),
        ("file,kind\nant/000.png,1\n./ant/000.png,2\n", "row 2 names 'ant/000.png' once more"),
        ("file,kind\nant/000.png,1\n,2\n", "row 2 names no file"),
        ("file,kind\nant/000.png,\n", "no picture has a label in 'kind'"),
        ('file,kind\nant/000.png,"open\n', "are no CSV"),
    ],
)
def test_csv_files_that_give_no_labels(text, message, tmp_path):
    spec = folder(tmp_path)
    with pytest.raises(UserError, match=message):
        open_source(spec, Options(labels=csv(tmp_path, text)))


def test_other_labels_of_the_same_classes_are_other_data(tmp_path):
    """Packing that was broken off must not go on with them."""
    spec, recipes = folder(tmp_path), []
    for first, second in (("a", "b"), ("b", "a"), ("a", "b")):
        file = csv(tmp_path, f"file,kind\n{name(0)},{first}\n{name(1)},{second}\n")
        recipes.append(open_source(spec, Options(labels=file)).recipe())
    assert recipes[0] == recipes[2] != recipes[1]


def test_csv_files_that_cannot_be_read(tmp_path):
    spec = folder(tmp_path)
    (tmp_path / "latin.csv").write_bytes(b"file,kind\nant/000.png,caf\xe9\n")
    with pytest.raises(UserError, match="are not UTF-8"):
        open_source(spec, Options(labels=str(tmp_path / "latin.csv")))
    with pytest.raises(UserError, match="cannot be read: No such file"):
        open_source(spec, Options(labels="absent.csv"))
    with pytest.raises(UserError, match="have no column 'b'; there are file, kind"):
        open_source(spec, Options(labels=csv(tmp_path, "file,kind\nant/000.png,1\n") + ":b"))


@pytest.mark.parametrize("above", ["", "./", "photos/", "./all/photos/"])
def test_folders_above_the_classes_are_no_classes(above):
    names = [f"{above}cats/1.png", f"{above}dogs/small/2.png", f"{above}cats/3.png"]
    found = of_files("folders", names)
    assert found.names == {"class": ["cats", "dogs"]} and found.rows[:, 0].tolist() == [0, 1, 0]
    with pytest.raises(UserError, match="labels from folders need"):
        of_files("folders", [*names, f"{above}4.png"])


def test_labels_are_wanted_or_not(tmp_path):
    spec = folder(tmp_path)
    assert open_source(spec, Options(labels="none")).labels == {}
    assert open_source(f"{spec}/ant", Options()).labels == {}
    with pytest.raises(UserError, match="two folders or more"):
        open_source(f"{spec}/ant", Options(labels="folders"))
    (tmp_path / "pictures" / "loose.png").write_bytes(PNGS[0])
    assert open_source(spec, Options()).labels == {}
    with pytest.raises(UserError, match="labels 'colour' are not of files"):
        open_source(spec, Options(labels="colour"))


def test_labels_of_tables(tmp_path):
    kinds = {"label": lambda number: ("x", None)[number % 2]}
    path = str(table(tmp_path, "a.parquet", range(4), features=None, label=kinds["label"]))
    assert labels_of(open_source(path, Options())) == (
        {"label": ["x"]},
        {f"a.parquet#{n}": (-(n % 2),) for n in range(4)},
    )
    assert open_source(path, Options(labels="none")).labels == {}
    with pytest.raises(UserError, match="no column 'size' of labels; there are image, label"):
        open_source(path, Options(labels="size"))
    wrong = str(table(tmp_path, "b.parquet", range(4), label=lambda number: number))
    with pytest.raises(UserError, match="'label' holds 3, and has names for 0 to 2"):
        open_source(wrong, Options())
    floats = str(table(tmp_path, "c.parquet", range(4), features=None, label=lambda number: number / 8))
    with pytest.raises(UserError, match="labels are whole numbers or texts"):
        open_source(floats, Options())


def test_splits_and_names_of_hub_data(tmp_path):
    spec = hf(tmp_path)
    assert open_source(f"{spec}:test", Options()).count == 3
    with pytest.raises(UserError, match="has no split 'val'; there are train, test"):
        open_source(f"{spec}:val", Options())
    with pytest.raises(UserError, match="give hf:"):
        open_source(spec[3:], Options())
    with pytest.raises(UserError, match="no column 'nope' of pictures; it has image"):
        open_source(spec, Options(column="nope"))


def test_hub_data_of_picture_files(tmp_path, monkeypatch):
    """A folder of files by the library's own loader: pictures are paths there."""
    datasets = pytest.importorskip("datasets", reason="datasets is an extra")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub-cache")
    source = open_source(f"hf:{folder(tmp_path)}", Options())
    pack(source, tmp_path / "out", SIDE, 4)
    packed = open_packed(tmp_path / "out")
    assert packed.class_names == [list(CLASSES)] and len(packed) == COUNT
    pairs = zip(packed.images(range(COUNT)), packed.labels, strict=True)
    found = {image.numpy().tobytes(): int(label) for image, label in pairs}
    assert found == {pixels(number).tobytes(): number % 3 for number in range(COUNT)}


def test_hub_data_that_is_not_there(tmp_path, monkeypatch):
    pytest.importorskip("datasets", reason="datasets is an extra")
    with pytest.raises(UserError, match="cannot load hf:.* by the datasets library: "):
        open_source(f"hf:{tmp_path / 'nowhere'}", Options())


@pytest.mark.parametrize(
    ("module", "kind", "message"),
    [("pyarrow.parquet", "parquet", "needs pyarrow, .*pip install pyarrow"), ("datasets", "hf", "needs datasets")],
)
def test_extras_that_are_absent(module, kind, message, tmp_path, monkeypatch):
    spec = KINDS[kind](tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=message):
        open_source(spec, Options())


# ---- pixels


def test_arrays_of_every_type(tmp_path):
    gray = np.array([[[0, 128], [255, 64]]], np.uint8)
    whole = np.repeat(gray[..., None], 3, -1)
    for array in (
        gray,
        gray[..., None],
        gray[:, None],
        gray.astype(np.uint16) * 257,
        (gray / 255).astype(np.float32),
        gray / 255,
    ):
        np.save(tmp_path / "a.npy", array)
        [job] = open_source(str(tmp_path / "a.npy"), Options()).jobs(2, 1)
        assert np.array_equal(from_pixels(job.items[0].content, job.frame), whole[0]), array.dtype
    np.save(tmp_path / "b.npy", gray > 100)
    [job] = open_source(str(tmp_path / "b.npy"), Options()).jobs(2, 1)
    assert from_pixels(job.items[0].content, job.frame)[..., 0].tolist() == [[0, 255], [255, 0]]
    clear = np.dstack([whole[0], np.zeros((2, 2), np.uint8)])[None]
    np.save(tmp_path / "c.npy", clear)
    [job] = open_source(str(tmp_path / "c.npy"), Options(Look(background="#010203"))).jobs(2, 1)
    assert from_pixels(job.items[0].content, job.frame).reshape(-1, 3).tolist() == [[1, 2, 3]] * 4


def test_floats_beyond_0_to_1_are_rejects(tmp_path):
    array = np.full((4, 8, 8), 0.5)
    array[1, 0, 0], array[2, 0, 0], array[3, 0, 0] = 1.01, np.nan, -0.1
    np.save(tmp_path / "a.npy", array)
    pack(open_source(str(tmp_path / "a.npy"), Options()), tmp_path / "out", 8, 4)
    manifest = Manifest.read(tmp_path / "out")
    assert manifest.count == 1 and manifest.rejects == [[str(i), "floats beyond 0 to 1"] for i in (1, 2, 3)]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": np.zeros((2, 8, 8), np.int64)}, "holds int64; it takes bool, uint8"),
        ({"a": np.zeros((2, 8), np.uint8)}, "no array of 3 or 4 dimensions"),
        ({"a": np.zeros((2, 8, 8), np.uint8), "b": np.zeros((2, 8, 8), np.uint8)}, "a, b: name one with --column"),
        ({"a": np.zeros((2, 8, 8, 5), np.uint8)}, r"shape \[2, 8, 8, 5\]; it takes"),
        ({"a": np.zeros((0, 8, 8), np.uint8)}, r"shape \[0, 8, 8\]"),
        ({"a": np.zeros((2, 8, 8), np.uint8), "y": np.zeros(3)}, r"labels 'y' have shape \[3\] for 2 pictures"),
        ({"a": np.array([None, {}])}, "arrays of objects are not read"),
        ({}, "no array of 3 or 4 dimensions"),
    ],
)
def test_arrays_that_are_no_pictures(arrays, message, tmp_path):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=message):
        open_source(str(tmp_path / "a.npz"), Options())


def test_a_column_chooses_the_array(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros((2, 8, 8), np.uint8), z=np.ones((3, 8, 8), np.uint8), kind=np.arange(3))
    source = open_source(str(tmp_path / "a.npz"), Options(column="z", labels="kind"))
    assert source.count == 3 and source.labels == {"kind": ["0", "1", "2"]}
    with pytest.raises(UserError, match="has no array 'q'; there are x, z, kind"):
        open_source(str(tmp_path / "a.npz"), Options(column="q"))
    with pytest.raises(UserError, match="--column q: a folder of pictures has no columns"):
        open_source(folder(tmp_path), Options(column="q"))


def test_celeba_recipes_are_the_papers():
    """The crops by plain slices of a picture of CelebA's size, scaled by Pillow as torchvision does."""
    picture = pixels(1, 218, 178)
    bilinear = Image.Resampling.BILINEAR
    for crop, cut in (
        ("celeba64", picture[121 - 64 : 121 + 64, 89 - 64 : 89 + 64]),
        ("celeba64-140", picture[39 : 39 + 140, 19 : 19 + 140]),
        ("celeba128", picture[20 : 20 + 178]),
    ):
        size = RECIPES[crop].size
        expected = np.asarray(Image.fromarray(cut).resize((size, size), bilinear))
        found = decode(encoded(picture), Look(crop).frame(size)).astype(int)
        inner = np.abs(found - expected)[1:-1, 1:-1]  # at the edge the filter reaches beyond the crop
        assert inner.max() == 0, crop


@pytest.mark.parametrize("crop", ["centre", "centre:300", "40,100,320"])
def test_a_jpeg_is_shrunk_while_it_is_decoded_and_lies_in_the_same_place(crop):
    y, x = np.mgrid[0:480, 0:640]
    picture = np.stack([x * 255 // 639, y * 255 // 479, (x + y) % 256 // 4], -1).astype(np.uint8)
    frame = Look(crop).frame(32)
    exact = decode(encoded(picture), frame).astype(int)
    shrunk = decode(encoded(picture, "JPEG", quality=97), frame).astype(int)
    assert np.abs(exact - shrunk)[..., :2].max() <= 6


def test_a_crop_that_does_not_fit_is_a_reject(tmp_path):
    root = tmp_path / "pictures"
    root.mkdir()
    for size in (8, 16):
        (root / f"{size}.png").write_bytes(encoded(pixels(0, size, size)))
    for crop in ("centre:12", "4,4,12"):
        pack(open_source(str(root), Options(Look(crop))), tmp_path / crop, 8, 4)
        assert Manifest.read(tmp_path / crop).rejects == [["8.png", "8 x 8 pixels: the crop does not fit"]]


def test_a_given_crop_is_of_the_upright_picture():
    upright = pixels(3, 16, 24)
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = Image.fromarray(upright).transpose(Image.Transpose.ROTATE_90)
    for crop in ((2, 1, 8), (8,)):
        frame = Frame(8, crop, "lanczos", (0, 0, 0))
        assert np.array_equal(decode(encoded(stored, exif=exif), frame), decode(encoded(upright), frame))


@pytest.mark.parametrize(
    "crop", ["center", "centre:0", "1,2", "1,2,0", "a,b,c", "-1,0,5", "celeba", "centre:" + "9" * 9]
)
def test_crops_that_are_none(crop, tmp_path):
    with pytest.raises(UserError, match="no crop .*; there are centre, centre:SIDE, LEFT,TOP,SIDE, celeba64"):
        open_source(folder(tmp_path), Options(Look(crop)))


def test_filters_differ_and_are_named():
    picture = encoded(pixels(5, 64, 64))
    found = {name: decode(picture, Look(filter=name).frame(16)).tobytes() for name in ("lanczos", "bicubic", "box")}
    assert len(set(found.values())) == 3
    with pytest.raises(UserError, match="no filter 'cubic'; there are lanczos, bicubic"):
        Look(filter="cubic").frame(16)


def test_only_the_first_frame_of_an_animation():
    first, second = Image.new("RGB", (8, 8), (200, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 200))
    for format, slack in (("GIF", 0), ("WEBP", 3), ("PNG", 0)):
        content = encoded(first, format, save_all=True, append_images=[second])
        assert np.abs(decode(content, Look().frame(8)).astype(int) - (200, 0, 0)).max() <= slack


def test_a_transparent_gif_lies_on_the_background():
    image = Image.new("P", (8, 8), 0)
    image.putpalette([9, 9, 9, 5, 5, 5])
    content = encoded(image, "GIF", transparency=0)
    assert decode(content, Look(background="#102030").frame(8)).reshape(-1, 3).tolist() == [[16, 32, 48]] * 64


def test_prepare_gives_labels_crops_and_subsets(tmp_path):
    packed = prepare(folder(tmp_path), SIDE, 4, cache=tmp_path / "cache", crop="centre:8")
    assert torch.equal(packed.labels[:, 0], torch.tensor([number % 3 for number in ORDER], dtype=torch.int32))
    few = prepare(folder(tmp_path), SIDE, 4, cache=tmp_path / "cache", subset="10%")
    assert len(few) == 15 and few.path != packed.path
