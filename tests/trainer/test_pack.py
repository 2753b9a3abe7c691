"""Packing: rejects, copies, bytes that hang neither on workers nor on interruptions, whole or absent; the command."""

import builtins
import errno
import hashlib
import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from picture_files import encoded, noise
from PIL import Image

from maskdiff.errors import UserError
from maskdiff.packing import layout, workers
from maskdiff.packing.check import verify
from maskdiff.packing.look import Look
from maskdiff.packing.manifest import Manifest
from maskdiff.packing.sources import Options, open_source
from maskdiff.packing.writer import _split, pack

SHARED = Path(__file__).parents[2].parent / "shared" / "data"


@pytest.fixture
def folder(tmp_path):
    """Twelve pictures in two sub-folders, and three files that are none."""
    root = tmp_path / "pictures"
    for i in range(12):
        path = root / f"part{i % 2}" / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(noise(i, 32)))
    whole = (root / "part0" / "00.png").read_bytes()
    (root / "part0" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (root / "part1" / "empty.jpg").write_bytes(b"")
    (root / "part1" / "text.webp").write_text("no picture")
    (root / "notes.txt").write_text("not looked at")
    (root / ".hidden.png").write_bytes(whole)
    return root


def read(packed: Path) -> dict[str, str]:
    """What tells a packed set's files from others; their bytes would make long messages."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(packed.iterdir())}


def test_bytes_do_not_depend_on_workers_or_on_folder_and_zip_beyond_the_recipe(folder, tmp_path):
    for count in (1, 2, 3):
        pack(open_source(str(folder), Options()), tmp_path / f"by{count}", 16, 4, workers=count)
    assert read(tmp_path / "by1") == read(tmp_path / "by2") == read(tmp_path / "by3")
    archive = tmp_path / "pictures.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(folder.rglob("*"), reverse=True):
            file.write(path, path.relative_to(folder))
    pack(open_source(str(archive), Options()), tmp_path / "zipped", 16, 4, workers=2)
    a, b = Manifest.read(tmp_path / "by1"), Manifest.read(tmp_path / "zipped")
    assert a.files == b.files and a.rejects == b.rejects and a.hash == b.hash
    assert a.recipe["kind"] == "folder" and b.recipe["kind"] == "zip"


def test_broken_files_are_left_out_and_told_of(folder, tmp_path, capsys):
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    os.mkfifo(folder / "pipe.png")
    pack(open_source(str(folder), Options()), tmp_path / "out", 16, 4)
    manifest = Manifest.read(tmp_path / "out")
    assert manifest.count == 12
    reasons = dict(manifest.rejects)
    assert set(reasons) == {"gone.png", "pipe.png", "part0/cut.png", "part1/empty.jpg", "part1/text.webp"}
    assert "truncated" in reasons["part0/cut.png"]
    assert reasons["part1/text.webp"] == "not a PNG, JPEG, WebP or GIF image"
    assert reasons["pipe.png"] == "not a regular file"
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert "5 files" in line and "gone.png" in line and line.count("(") == 3


def test_files_are_taken_in_the_order_of_their_names(folder, tmp_path):
    from maskdiff.data import open_packed

    pack(open_source(str(folder), Options()), tmp_path / "out", 32, 4)
    images = open_packed(tmp_path / "out").images(range(12))
    for at, i in enumerate([0, 2, 4, 6, 8, 10, 1, 3, 5, 7, 9, 11]):
        assert np.array_equal(images[at], noise(i, 32))


def test_only_broken_files_is_an_error_that_leaves_nothing(tmp_path):
    root = tmp_path / "broken"
    root.mkdir()
    for i in range(5):
        (root / f"{i}.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(i))
    with pytest.raises(UserError, match=r"no usable image in 'broken': 5 files: '0.png' \(.*, \.\.\."):
        pack(open_source(str(root), Options()), tmp_path / "out" / "set", 16, 4)
    assert list((tmp_path / "out").iterdir()) == []


def zipped(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


def test_a_zip_with_damaged_and_encrypted_members(tmp_path):
    archive = zipped(
        tmp_path / "z.zip", {f"{i}.png": encoded(noise(i, 32)) for i in range(4)} | {"__MACOSX/0.png": b"x"}
    )
    content = bytearray(archive.read_bytes())
    with zipfile.ZipFile(archive) as file:
        infos = file.infolist()
    content[infos[1].header_offset + 60] ^= 0xFF  # its pixels
    directory = content.index(b"PK\x01\x02", content.index(b"PK\x01\x02") + 1)  # the entry of 1.png
    directory = content.index(b"PK\x01\x02", directory + 1)  # of 2.png
    content[directory + 8] |= 1  # says that it is encrypted
    archive.write_bytes(content)
    pack(open_source(str(archive), Options()), tmp_path / "out", 16, 4)
    manifest = Manifest.read(tmp_path / "out")
    assert manifest.count == 2 and [name for name, _ in manifest.rejects] == ["1.png", "2.png"]
    assert manifest.rejects[1][1] == "encrypted"


def test_a_picture_of_too_many_pixels_is_a_reject(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    archive = zipped(tmp_path / "z.zip", {"a.png": encoded(noise(0, 16)), "bomb.png": encoded(noise(1, 64))})
    pack(open_source(str(archive), Options()), tmp_path / "out", 16, 4, workers=1)
    assert Manifest.read(tmp_path / "out").rejects == [["bomb.png", "too many pixels"]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: zipped(path, {}), "no picture in the zip"),
        (lambda path: zipped(path, {"readme.txt": b"hello"}), "no picture in the zip"),
        (lambda path: path.write_bytes(b""), "is an empty file"),
        (lambda path: path.write_bytes(b"PK\x03\x04" + bytes(100)), "is not a readable zip"),
        (
            lambda path: path.write_bytes(zipped(path, {"a.png": bytes(999)}).read_bytes()[:-30]),
            "is not a readable zip",
        ),
        (lambda path: path.mkdir(), "no picture in the folder"),
    ],
)
def test_a_source_without_pictures_is_an_error(make, message, tmp_path):
    make(tmp_path / "data.zip")
    with pytest.raises(UserError, match=message):
        open_source(str(tmp_path / "data.zip"), Options())


def test_an_unknown_background_is_an_error(folder):
    with pytest.raises(UserError, match="'whiteish' is no colour"):
        open_source(str(folder), Options(Look(background="whiteish")))


def test_links_that_lead_back_end(folder):
    (folder / "part0" / "again").symlink_to(folder)
    assert open_source(str(folder), Options()).count == 15


def test_names_that_are_not_utf8(folder, tmp_path):
    odd = os.path.join(os.fsencode(folder), b"caf\xe9.png")
    with open(odd, "wb") as file:
        file.write(b"broken")
    pack(open_source(str(folder), Options()), tmp_path / "out", 16, 4)
    assert "caf\udce9.png" in dict(Manifest.read(tmp_path / "out").rejects)


def test_an_existing_target_is_an_error(folder, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists"):
        pack(open_source(str(folder), Options()), tmp_path / "out", 16, 4)


def test_split_follows_content():
    keys = np.random.default_rng(0).integers(0, 2**64, 20_000, dtype=np.uint64)
    split = _split(keys, 0.02)
    assert abs(int(split.sum()) - 400) < 5 * np.sqrt(400 * 0.98)
    part = np.random.default_rng(1).permutation(20_000)[:5000]
    assert np.array_equal(_split(keys[part], 0.02), split[part])  # whatever else is in the set
    assert not _split(keys, 0.0).any()
    assert _split(keys[:10], 1e-9).tolist().count(1) == 1
    assert _split(keys[:10], 0.999999).tolist().count(0) == 1
    assert _split(np.zeros(5, np.uint64), 0.02).tolist() == [0] * 5  # five copies of one image: nothing to hold out


SCRIPT = """
import sys
from maskdiff import data
data.prepare(sys.argv[1], 32, 4, cache=sys.argv[2], workers=int(sys.argv[3]))
"""


def run(*arguments, **options) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", SCRIPT, *map(str, arguments)], stderr=subprocess.PIPE, **options)


def test_killed_half_way_the_next_try_goes_on(tmp_path, capsys):
    from maskdiff import data

    process = run("faces:1200", tmp_path, 2)
    for _ in range(600):
        written = list(tmp_path.glob(".faces*/images.u8"))
        if written and written[0].stat().st_size:
            break
        time.sleep(0.1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert written and not list(tmp_path.glob("faces*"))
    time.sleep(2)  # the workers find their input ended
    commands = [Path(f"/proc/{pid}/cmdline") for pid in children]
    assert len(children) == 2 and not [path for path in commands if path.exists() and path.read_bytes()]
    resumed = data.prepare("faces:1200", 32, 4, cache=tmp_path)
    assert re.search(r"going on with faces-1200.*: [\d,]+ images are packed already", capsys.readouterr().err)
    assert read(resumed.path) == read(data.prepare("faces:1200", 32, 4, cache=tmp_path / "fresh").path)


class Stopping:
    """A source that is interrupted before some job."""

    def __init__(self, source, stop: int) -> None:
        self._source, self._stop = source, stop

    def __getattr__(self, name):
        return getattr(self._source, name)

    def jobs(self, image_size, patch, start=0):
        for number, job in enumerate(self._source.jobs(image_size, patch, start), start):
            if number == self._stop:
                raise KeyboardInterrupt
            yield job


@pytest.fixture
def many(tmp_path):
    """200 small pictures in two classes, every ninth a copy of the one before it, some broken: four jobs."""
    for i in range(200):
        path = tmp_path / "many" / "ab"[i % 2] / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"broken" if i % 50 == 4 else encoded(noise(i - (i % 9 == 8), 8)))
    return open_source(str(tmp_path / "many"), Options())


def nothing(partial: Path) -> None:
    pass


def cut(name: str, by: int):
    return lambda partial: os.truncate(partial / name, (partial / name).stat().st_size - by)


def flipped(name: str, at: int):
    def flip(partial: Path) -> None:
        content = bytearray((partial / name).read_bytes())
        content[at] ^= 1
        (partial / name).write_bytes(content)

    return flip


def grown(partial: Path) -> None:
    with open(partial / "images.u8", "ab") as file:
        file.write(b"rows that the journal does not know")


@pytest.mark.parametrize("dedupe", [False, True])
@pytest.mark.parametrize(
    ("damage", "goes_on"),
    [
        (nothing, True),
        (cut("images.u8", 1), True),
        (cut("journal", 1), True),
        (cut("journal", 3000), True),
        (grown, True),
        (flipped("images.u8", -1), True),
        (flipped("images.u8", 5), False),
        (flipped("journal", 3), False),
        (lambda partial: (partial / "images.u8").write_bytes(b""), False),
        (lambda partial: (partial / "journal").unlink(), False),
    ],
)
def test_what_a_crash_left_is_gone_on_from_as_far_as_it_is_whole(many, damage, goes_on, dedupe, tmp_path, capsys):
    pack(many, tmp_path / "unbroken", 8, 4, dedupe=dedupe)
    for stop in (2, 3):
        with pytest.raises(KeyboardInterrupt):
            pack(Stopping(many, stop), tmp_path / "set", 8, 4, dedupe=dedupe)
        assert not (tmp_path / "set").exists()
    damage(tmp_path / ".set.partial")
    capsys.readouterr()
    pack(many, tmp_path / "set", 8, 4, dedupe=dedupe)
    assert ("going on with set: " in capsys.readouterr().err) == goes_on
    assert read(tmp_path / "set") == read(tmp_path / "unbroken") and not (tmp_path / ".set.partial").exists()


def test_what_another_recipe_left_is_not_gone_on_from(many, tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt):
        pack(Stopping(many, 2), tmp_path / "set", 8, 4, heldout=0.5)
    pack(many, tmp_path / "set", 8, 4)
    pack(many, tmp_path / "unbroken", 8, 4)
    assert read(tmp_path / "set") == read(tmp_path / "unbroken") and "going on" not in capsys.readouterr().err


def test_copies_are_reported_or_left_out(many, tmp_path, capsys):
    pack(many, tmp_path / "all", 8, 4)
    assert "22 of the images equal an earlier one: 'b/" in capsys.readouterr().err
    pack(many, tmp_path / "once", 8, 4, dedupe=True)
    both, once = Manifest.read(tmp_path / "all"), Manifest.read(tmp_path / "once")
    assert both.count == 196 and once.count == 174 and once.copies == [] and len(both.copies) == 22
    assert [[name, f"a copy of {of}"] for name, of in both.copies] == [
        reject for reject in once.rejects if reject[1].startswith("a copy")
    ]
    left = {name for name, _ in both.copies}
    kept = [i for i, name in enumerate(names_of(many, both)) if name not in left]
    images = [np.fromfile(tmp_path / name / "images.u8", np.uint8).reshape(-1, 192) for name in ("all", "once")]
    assert np.array_equal(images[0][kept], images[1])
    assert len(np.unique(images[1], axis=0)) == 174
    labels = [np.load(tmp_path / name / "labels.npy") for name in ("all", "once")]
    assert np.array_equal(labels[0][kept], labels[1])


def names_of(source, manifest: Manifest) -> list[str]:
    rejected = {name for name, _ in manifest.rejects}
    return [item.name for job in source.jobs(8, 4) for item in job.items if item.name not in rejected]


def test_a_stale_half_is_replaced(tmp_path):
    from maskdiff import data

    first = data.prepare("faces:20", 32, 4, cache=tmp_path / "a")
    partial = tmp_path / "b" / f".{first.path.name}.partial"
    partial.mkdir(parents=True)
    (partial / "images.u8").write_bytes(b"half")
    (partial / "journal").write_bytes(b"no line\n")
    again = data.prepare("faces:20", 32, 4, cache=tmp_path / "b")
    assert read(first.path) == read(again.path) and not partial.exists()


def test_a_full_disk_is_one_clear_error_and_keeps_what_was_there(tmp_path):
    """The limit on the size of a file stands in for a full disk: the same kind of error from the same calls."""
    from maskdiff import data

    before = read(data.prepare("faces:20", 32, 4, cache=tmp_path).path)
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, 1 << 18))  # noqa: E731
    process = run("faces:400", tmp_path, 1, preexec_fn=limit)
    _, errors = process.communicate()
    last = errors.decode().strip().splitlines()[-1]
    assert process.returncode and "UserError: cannot write the packed set" in last and "MASKDIFF_CACHE" in last
    [kept] = [path for path in tmp_path.iterdir() if not path.name.startswith(".")]
    assert read(kept) == before
    limited = data.prepare("faces:400", 32, 4, cache=tmp_path)  # there is room now
    assert read(limited.path) == read(data.prepare("faces:400", 32, 4, cache=tmp_path / "fresh").path)
    assert not list(tmp_path.glob(".*partial"))


@pytest.mark.parametrize("name", ["images.u8", "journal", "labels.npy", "split.npy", "manifest.json"])
def test_a_disk_that_is_full_at_any_file_keeps_what_is_packed(name, many, tmp_path, monkeypatch):
    """Every write to this file fails, as it does on a full disk."""
    pack(many, tmp_path / "unbroken", 8, 4)
    real = builtins.open

    def full(path, *arguments, **options):
        file = real(path, *arguments, **options)
        if str(path).endswith(name) and file.writable():
            text = isinstance(file, io.TextIOBase)
            file = io.BufferedWriter(FullDisk())
            return io.TextIOWrapper(file) if text else file
        return file

    with monkeypatch.context() as patch:
        for module in (builtins, io):
            patch.setattr(module, "open", full)
        with pytest.raises(UserError, match="cannot write the packed set .*No space left on device.*make room"):
            pack(many, tmp_path / "set", 8, 4)
        assert not (tmp_path / "set").exists()
    pack(many, tmp_path / "set", 8, 4)
    assert read(tmp_path / "set") == read(tmp_path / "unbroken")


class FullDisk(io.RawIOBase):
    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, *place) -> int:
        return 0

    def truncate(self, size=None) -> int:
        return 0

    def write(self, content) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_no_room_is_told_before_any_work(folder, tmp_path, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10_000, 9_000, 1000))
    with pytest.raises(UserError, match=r"needs [\d,]+ bytes and 1,000 are free"):
        pack(open_source(str(folder), Options()), tmp_path / "out", 32, 4)
    assert not (tmp_path / "out").exists()


def test_workers_keep_the_order():
    assert list(workers.ordered_map(abs, range(-40, 0), 3)) == list(range(40, 0, -1))


def test_a_worker_that_dies_or_fails_is_an_error_not_a_hang(tmp_path, monkeypatch):
    (tmp_path / "cursed.py").write_text(
        "import os\ndef die(n):\n    os.kill(os.getpid(), 9)\ndef fail(n):\n    raise ValueError('cursed')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import cursed

    with pytest.raises(UserError, match="ended with status -9"):
        list(workers.ordered_map(cursed.die, range(10), 2))
    with pytest.raises(RuntimeError, match="cursed"):
        list(workers.ordered_map(cursed.fail, range(10), 2))


def test_workers_do_not_load_pytorch():
    script = "import sys, maskdiff.faces, maskdiff.packing.worker_main; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(("name", "count"), [("noto-emoji-128.zip", 3573), ("emojitwo-128.zip", 2005)])
def test_real_pictures(name, count, tmp_path):
    from maskdiff import data

    if not (SHARED / name).exists():
        pytest.skip(f"{name} is not there; see shared/data")
    packed = data.prepare(SHARED / name, 32, 4, cache=tmp_path)
    assert verify(packed.path).count == count
    assert len(packed) == count and not json.loads((packed.path / "manifest.json").read_text())["rejects"]
    images = packed.images(range(0, count, 7)).numpy()
    corners = images[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners == 255).all(axis=(1, 2)).mean() > 0.5  # transparent corners became white
    different = len(np.unique(images.reshape(len(images), -1), axis=0))
    assert images.std(axis=(1, 2, 3)).min() > 0 and different > 0.95 * len(images)


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs `maskdiff pack` in this process; gives its exit status and what it printed."""
    from maskdiff import pack as module
    from maskdiff.errors import run_command

    def command(*words) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["maskdiff pack", *map(str, words)])
        status = 0
        try:
            run_command(module.main)
        except SystemExit as end:
            status = int(end.code or 0)
        said = capsys.readouterr()
        return status, said.out, said.err

    return command


def test_the_command_packs_checks_and_shows(folder, tmp_path, command):
    out, sheet = tmp_path / "out", tmp_path / "sheets" / "sheet.png"
    status, said, errors = command(folder, out, "--image-size", 16, "--labels", "folders", "--dedupe", "--workers", 2)
    assert (
        status == 0
        and "12 images of 16 px, patch 4, 1 held out, 3 rejects, 0 copies, labels: class (2 classes)" in said
    )
    assert "warning: pictures: left out 3 files: " in errors
    assert Manifest.read(out).recipe["dedupe"] is True
    status, said, _ = command(out, "--verify", "--show", sheet)
    assert status == 0 and "all is as it was packed: 12 images" in said
    with Image.open(sheet) as shown:
        pixels = np.asarray(shown.convert("RGB"))
    first = np.fromfile(out / "images.u8", np.uint8).reshape(12, -1)[:1]
    expected = layout.Shape(16, 3, 4).images(first)[0].repeat(4, 0).repeat(4, 1)  # 64 px on the sheet
    assert np.array_equal(pixels[4:68, 4:68], expected)


def test_the_command_takes_a_recipe_and_a_subset(folder, tmp_path, command):
    assert command(folder, tmp_path / "out", "--crop", "celeba128", "--subset", "50%", "--labels", "none")[0] == 2
    status, said, _ = command(folder, tmp_path / "out", "--crop", "centre:20", "--subset", "50%", "--labels", "none")
    assert status == 0 and "images of 64 px" in said and "labels: none" in said
    manifest = Manifest.read(tmp_path / "out")
    assert manifest.recipe["crop"] == [20] and manifest.recipe["subset"] == "50%" and manifest.count <= 8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{folder}"], "give SOURCE OUT to pack, or a packed set with --verify or --show FILE"),
        (["{folder}", "--verify"], "is no packed set: it has no manifest.json"),
        (["{folder}", "{folder}"], "exists; remove it first"),
        (["{folder}", "{tmp}/x", "--workers", "0"], "--workers is 0; give 1 or more"),
        (["{folder}", "{tmp}/x", "--heldout", "1"], "heldout is a share from 0 to below 1"),
        (["{folder}", "{tmp}/x", "--patch", "7"], "image size 64 is not divisible by patch 7"),
        (["{folder}", "{tmp}/x", "--crop", "middle"], "no crop 'middle'"),
        (["{folder}", "{tmp}/x", "--subset", "all"], "subset 'all' is no part"),
        (["{folder}", "{tmp}/x", "--only", "absent.txt"], "--only absent.txt: "),
        (["{tmp}/nowhere", "{tmp}/x"], "no data at "),
        (["faces:3", "{tmp}/set", "--show", "{tmp}/sheet.jpg"], "give the name of a .png file"),
    ],
)
def test_what_the_command_refuses_in_one_line(words, message, folder, tmp_path, command):
    status, _, errors = command(*(word.format(folder=folder, tmp=tmp_path) for word in words))
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(lines) == 1 and message in lines[0] and not (tmp_path / "x").exists()


def test_a_packed_set_is_not_packed_again(many, tmp_path, command):
    pack(many, tmp_path / "set", 8, 4)
    assert "is a packed set already" in command(tmp_path / "set", tmp_path / "again")[2]
    content = bytearray((tmp_path / "set" / "images.u8").read_bytes())
    content[100] ^= 1
    (tmp_path / "set" / "images.u8").write_bytes(content)
    status, _, errors = command(tmp_path / "set", "--verify")
    assert status == 2 and "images.u8' was altered, first among images 0 to 195; pack again" in errors
