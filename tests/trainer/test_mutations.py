"""Mutated packed sets, configurations, checkpoints and pictures: clear errors only, no crash, no silent acceptance.

Each test tries MASKDIFF_MUTATIONS examples (default 80, always the same; 5000 is a thorough run); hypothesis prints the
smallest one that fails.
"""

import copy
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("hypothesis", reason="hypothesis is an extra")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from maskdiff import checkpoint, options, presets
from maskdiff.config import config_to_dict, flatten
from maskdiff.data import open_packed
from maskdiff.errors import UserError
from maskdiff.packing.check import verify
from maskdiff.packing.decode import DecodeJob, Frame, decode_chunk
from maskdiff.packing.items import Item
from maskdiff.packing.layout import Shape, keys_of
from maskdiff.packing.manifest import _sha256
from maskdiff.packing.sources import Options, open_source
from maskdiff.packing.writer import pack

COUNT = int(os.environ.get("MASKDIFF_MUTATIONS", "80"))
mutations = settings(
    max_examples=COUNT,
    deadline=None,
    derandomize=COUNT <= 80,  # the same every time, unless one looks for more
    database=None,
    suppress_health_check=list(HealthCheck),
)

JUNK = st.sampled_from(
    [None, True, False, 0, 1, -1, 2, 3, 7, 255, 2**31, 2**63, 10**400, -(10**400), 0.0, 0.5, -1.5, 1e308, "", "x", "0",
     "-1", "dense", "\ud800", "\0", "../..", "é" * 300, [], [[]], {}, {"a": 1}, [None], [0], ["x", "y"], float("nan"),
     float("inf")]
).map(copy.deepcopy)  # fmt: skip


@st.composite
def byte_edits(draw, content: bytes) -> bytes:
    """A few cuts, flips, insertions and repetitions."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        length = draw(st.sampled_from([1, 2, 8, 64]))
        kind = draw(st.sampled_from(["cut", "flip", "set", "insert", "delete", "repeat", "zero"]))
        part = content[at : at + length]
        put = {
            "cut": b"",
            "flip": bytes(byte ^ 1 << draw(st.integers(0, 7)) for byte in part[:1]) + part[1:],
            "set": draw(st.binary(min_size=len(part), max_size=len(part))),
            "insert": draw(st.binary(min_size=1, max_size=9)) + part,
            "delete": b"",
            "repeat": part * 2,
            "zero": bytes(len(part)),
        }[kind]
        content = content[:at] + put + (b"" if kind == "cut" else content[at + length :])
    return content


def places(value, path: tuple = ()) -> list[tuple]:
    """The paths of everything in a JSON value but itself."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, item in items for place in [(*path, key), *places(item, (*path, key))]]


@st.composite
def json_edits(draw, value):
    """A few values replaced by junk, left out, or added."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        found = places(value)
        if not found:
            return value
        *path, key = draw(st.sampled_from(found))
        owner = value
        for step in path:
            owner = owner[step]
        kind = draw(st.sampled_from(["replace", "replace", "remove", "add", "nudge"]))
        if kind == "remove":
            del owner[key]
        elif kind == "add" and isinstance(owner, dict):
            owner[draw(st.sampled_from(["extra", "", "count", f"{key} ", str(key).upper()]))] = draw(JUNK)
        elif kind == "add":
            owner.insert(key, draw(JUNK))
        elif kind == "nudge" and type(owner[key]) in (int, float):
            owner[key] += draw(st.sampled_from([-1, 1, 4, 1000]))
        else:
            owner[key] = draw(JUNK)
    return value


def same_json(one: bytes, other: bytes) -> bool:
    try:
        return json.loads(one) == json.loads(other)
    except (ValueError, RecursionError):
        return False


def restored(folder: Path, files: dict[str, bytes]) -> None:
    for path in folder.iterdir():
        path.unlink()
    for name, content in files.items():
        (folder / name).write_bytes(content)


# ---- packed sets


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> tuple[Path, dict[str, bytes]]:
    root = tmp_path_factory.mktemp("packed")
    for number in range(6):
        path = root / "pictures" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (10, 10, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    (root / "pictures" / "a" / "bad.png").write_bytes(b"none")
    pack(open_source(str(root / "pictures"), Options()), root / "set", 10, 5)
    return root / "set", {path.name: path.read_bytes() for path in (root / "set").iterdir()}


def looked_at(folder: Path) -> None:
    """Opens a set as the trainer does, checks it, and reads all of it."""
    opened = open_packed(folder)
    assert opened.images(range(len(opened))).shape == (
        len(opened),
        opened.image_size,
        opened.image_size,
        opened.channels,
    )
    assert sorted([*opened.train_ids.tolist(), *opened.heldout_ids.tolist()]) == list(range(len(opened)))
    for a, names in enumerate(opened.class_names):
        assert -1 <= int(opened.labels[:, a].min()) and int(opened.labels[:, a].max()) < len(names)
    verify(folder)


@mutations
@given(data=st.data())
def test_altered_files_of_a_packed_set(packed, data):
    folder, files = packed
    name = data.draw(st.sampled_from(sorted(files)))
    content = data.draw(byte_edits(files[name]))
    restored(folder, files | {name: content})
    if content == files[name] or (name == "manifest.json" and same_json(content, files[name])):
        looked_at(folder)
    else:
        with pytest.raises(UserError):
            looked_at(folder)


@mutations
@given(data=st.data())
def test_altered_manifests_with_the_right_checksum(packed, data):
    """As by one who means it: what contradicts the files or itself is found, the rest is another valid set."""
    folder, files = packed
    content = json.loads(files["manifest.json"])
    content.pop("checksum")
    content = data.draw(json_edits(content))
    if isinstance(content, dict):
        content["checksum"] = _sha256(content)
    restored(folder, files | {"manifest.json": json.dumps(content).encode()})
    try:
        looked_at(folder)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        before = json.loads(files["manifest.json"])
        changed = {key for key in before if before[key] != content.get(key)} - {"checksum"}
        free = {"recipe", "rejects", "copies", "class_names", "label_names", "patch"}  # the files say nothing of these
        assert changed <= free


# ---- pictures


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> dict[str, bytes]:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    made, root = {}, tmp_path_factory.mktemp("pictures")
    for name, saved, more in (
        ("a.png", image, {"exif": exif}),
        ("b.jpg", image, {"exif": exif}),
        ("c.webp", image, {"exif": exif}),
        ("d.gif", image.quantize(16), {"save_all": True, "append_images": [image.quantize(4)]}),
        ("e.png", image.quantize(16), {"transparency": 3}),
        ("f.jpg", image.convert("CMYK"), {"progressive": True}),
        ("g.png", Image.fromarray(np.arange(480, dtype=np.uint16).reshape(24, 20) * 99), {}),
    ):
        saved.save(root / name, **more)
        made[name] = (root / name).read_bytes()
    return made


@mutations
@given(data=st.data())
def test_altered_pictures(pictures, data):
    """Each is an image or a reject with a reason in one line, and the packed rows are those of its pixels."""
    name = data.draw(st.sampled_from(sorted(pictures)))
    content = data.draw(byte_edits(pictures[name]))
    crop = data.draw(st.sampled_from([(), (10,), (2, 3, 8)]))
    job = DecodeJob([Item(name, content, ())], 0, Frame(8, crop, "lanczos", (1, 2, 3)), 4)
    chunk = decode_chunk(job)
    assert len(chunk.rows) + len(chunk.rejects) == 1
    assert np.array_equal(keys_of(Shape(8, 3, 4).images(chunk.rows)), chunk.keys)
    for _, reason in chunk.rejects:
        assert reason and "\n" not in reason and " at 0x" not in reason


# ---- configurations


@pytest.fixture(scope="module")
def configs(tmp_path_factory) -> tuple[Path, dict[str, dict]]:
    values = {name: config_to_dict(preset.config) for name, preset in presets.PRESETS.items()}
    return tmp_path_factory.mktemp("configs") / "c.json", {
        name: value | {"data": value["data"] | {"path": "faces:10"}} for name, value in values.items()
    }


def check_config(path: Path, content: bytes) -> None:
    """A configuration file is refused in one line, or taken exactly as it stands there."""
    path.write_bytes(content)
    try:
        command = options.parse(["--config", str(path), "--print-config"])
    except UserError as error:
        assert "\n" not in str(error)
        return
    values = json.loads(content)
    if not isinstance(values.get("stages", []), str):
        taken = flatten(config_to_dict(command.config))
        asked = {key: value for key, value in flatten(values).items() if key != "out"}
        assert {key: taken.get(key) for key in asked if asked[key] != {}} == {
            key: value for key, value in asked.items() if value != {}
        }
    assert json.loads(command.text) == config_to_dict(command.config)


@mutations
@given(data=st.data())
def test_altered_configurations(configs, data):
    path, values = configs
    value = data.draw(json_edits(values[data.draw(st.sampled_from(sorted(values)))]))
    check_config(path, json.dumps(value).encode())


@mutations
@given(data=st.data())
def test_altered_bytes_of_configurations(configs, data):
    path, values = configs
    value = values[data.draw(st.sampled_from(sorted(values)))]
    check_config(path, data.draw(byte_edits(json.dumps(value, indent=1).encode())))


HUGE = ['{"stages": "patch:0.5-0.9 x5 b2147483647"}', '{"stages": "patch:0.5-0.9 x5 t9999999999999"}']


@pytest.mark.parametrize(
    "text", [*HUGE, "[" * 200_000, '{"a":' * 200_000, "1" * 5000, '{"seed": ' + "9" * 5000 + "}", "\x00"]
)
def test_configurations_that_exhaust_a_reader(text, configs):
    check_config(configs[0], text.encode())


# ---- checkpoints


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, dict[str, bytes]]:
    run = tmp_path_factory.mktemp("run")
    config = config_to_dict(presets.get(presets.DEFAULT))
    (run / "config.json").write_text(json.dumps(config))
    tensors = {f"{kind}.w": torch.arange(6.0).reshape(2, 3) for kind in ("master", "ema")}
    path = checkpoint.save(run, 3, tensors, {"config": config, "label_names": []}, keep=1)
    return path, {file.name: file.read_bytes() for file in path.iterdir()}


@mutations
@given(data=st.data())
def test_altered_files_of_a_checkpoint(saved, data):
    path, files = saved
    name = data.draw(st.sampled_from(sorted(files)))
    content = data.draw(byte_edits(files[name]))
    restored(path, files | {name: content})
    if content == files[name] or (name == checkpoint.META and same_json(content, files[name])):
        checkpoint.load(path)
    else:
        with pytest.raises(UserError):
            checkpoint.load(path)


@mutations
@given(data=st.data())
def test_altered_checkpoints_with_the_right_hashes(saved, data):
    """As by one who means it: still no crash."""
    path, files = saved
    meta, state = json.loads(files[checkpoint.META]), files[checkpoint.STATE]
    if data.draw(st.booleans()):
        state = data.draw(byte_edits(state))
        meta["files"][checkpoint.STATE] = hashlib.sha256(state).hexdigest()
    else:
        meta = data.draw(json_edits(meta))
    if isinstance(meta, dict):
        meta["hash"] = checkpoint._meta_hash(meta)
    restored(path, {checkpoint.META: json.dumps(meta).encode(), checkpoint.STATE: state})
    for weights in ("ema", "raw"):
        try:
            config, tensors, _ = checkpoint.load_weights(path, weights)
        except UserError as error:
            assert "\n" not in str(error)
        else:
            assert all(isinstance(tensor, torch.Tensor) for tensor in tensors.values())


def test_the_fixtures_are_left_alone(packed, saved):
    """What the tests above mutate was good before."""
    for folder, files in (packed, saved):
        restored(folder, files)
    looked_at(packed[0])
    checkpoint.load(saved[0])
    shutil.rmtree(packed[0])
