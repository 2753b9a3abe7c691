"""Hostile files: each becomes a reject line or a clear error; nothing crashes, hangs, or is written anywhere else."""

import io
import os
import struct
import subprocess
import sys
import tarfile
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from picture_files import encoded, noise
from PIL import Image

from maskdiff.data import open_packed
from maskdiff.errors import UserError
from maskdiff.packing import archives, items
from maskdiff.packing.manifest import Manifest
from maskdiff.packing.sources import Options, open_source
from maskdiff.packing.writer import pack

SIDE = 16


def picture(number: int) -> Image.Image:
    return Image.fromarray(noise(number, SIDE))


GOOD = {format: encoded(picture(0), format, **({"lossless": True} if format == "WEBP" else {}))
        for format in ("PNG", "JPEG", "WEBP", "GIF")}  # fmt: skip


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *more: bytes, pixels: bytes = b"") -> bytes:
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + head
        + b"".join(more)
        + png_chunk(b"IDAT", zlib.compress(pixels))
        + png_chunk(b"IEND", b"")
    )


def exif(content: bytes) -> bytes:
    return encoded(picture(0), exif=content)


def oriented(kind: int, count: int, value: bytes) -> bytes:
    """A picture whose orientation is of this TIFF type: 2 text, 3 short, 5 rational, 12 double."""
    entry = struct.pack("<HHI", 0x0112, kind, count) + value.ljust(4, b"\0")
    return exif(b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + entry + bytes(4))


GRAY = bytes([0, *range(SIDE)]) * SIDE  # rows of pixels, each behind its filter byte

# Every one of these must be left out, for a reason of which this is a part.
BAD = {
    "empty": (b"", "an empty file"),
    "text": (b"no picture at all", "not a PNG, JPEG, WebP or GIF image"),
    "magic": (b"\x89PNG\r\n\x1a\n", "not a PNG"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a PNG"),
    "bmp": (encoded(picture(0), "BMP"), "not a PNG"),
    "tiff": (encoded(picture(0), "TIFF"), "not a PNG"),
    "bomb": (png(60_000, 60_000, pixels=b"\0" * 100), "too many pixels"),
    "gif-bomb": (GOOD["GIF"][:6] + b"\xff\xff\xff\xff" + GOOD["GIF"][10:], "too many pixels"),
    "no-width": (png(0, 16, pixels=GRAY), ""),
    "no-pixels": (png(16, 16), ""),
    "few-pixels": (png(16, 16, pixels=GRAY[:99]), ""),
    "wrong-sum": (GOOD["PNG"][:20] + b"\xee" + GOOD["PNG"][21:], ""),
    "text-bomb": (
        png(16, 16, png_chunk(b"zTXt", b"k\0\0" + zlib.compress(b"\0" * (80 << 20))), pixels=GRAY),
        "Decompressed",
    ),
} | {
    f"{format}-{share}": (GOOD[format][: len(GOOD[format]) * share // 100], "")
    for format in GOOD
    for share in (5, 50, 90)
}  # fmt: skip

# These are odd, and pictures all the same.
ODD = {
    "jpeg-named-png": GOOD["JPEG"],
    "webp-named-png": GOOD["WEBP"],
    "exif-garbage": exif(b"Exif\0\0" + bytes(range(256))),
    "exif-cut": exif(b"Exif\0\0MM\0*\0\0\0\x08\0\xff"),
    "exif-loop": exif(b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\x08\0\0\0"),
    "exif-0": oriented(3, 1, b"\0\0"),
    "exif-99": oriented(3, 1, b"c\0"),
    "exif-text": oriented(2, 4, b"abc\0"),
    "exif-many": oriented(3, 2, b"\1\0\6\0"),
    "exif-nowhere": oriented(5, 1, b"\xff\xff\xff\x7f"),
    "exif-endless": oriented(12, 1 << 31, b"\x08"),
    "trailing": GOOD["PNG"] + b"more bytes" * 100,
}


def folder(root: Path, files: dict[str, bytes]) -> str:
    root.mkdir()
    for name, content in files.items():
        (root / name).write_bytes(content)
    return str(root)


def zipped(path: Path, files: dict[str, bytes]) -> str:
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        warnings.simplefilter("ignore")  # of names that come twice
        for name, content in files.items():
            archive.writestr(name, content)
    return str(path)


def tarred(path: Path, files: dict[str, bytes], mode: str = "w") -> str:
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return str(path)


def parquet(path: Path, files: dict[str, bytes]) -> str:
    pa = pytest.importorskip("pyarrow", reason="pyarrow is an extra")
    pytest.importorskip("pyarrow.parquet").write_table(pa.table({"image": list(files.values())}), path)
    return str(path)


def everything() -> dict[str, bytes]:
    bad = {f"bad-{name}.png": content for name, (content, _) in BAD.items()}
    return bad | {f"odd-{name}.png": content for name, content in ODD.items()}


@pytest.mark.parametrize("kind", [folder, zipped, tarred, parquet])
@pytest.mark.parametrize("workers", [1, 2])
def test_every_hostile_picture_is_a_reject_and_every_odd_one_a_picture(kind, workers, tmp_path):
    files = everything()
    source = open_source(kind(tmp_path / "source", files), Options())
    names = dict(zip(source._reader.names(), files, strict=False)) if kind is parquet else {}
    before = set(tmp_path.rglob("*"))
    pack(source, tmp_path / "out", SIDE, 4, workers=workers)
    manifest = Manifest.read(tmp_path / "out")
    reasons = {names.get(name, name): reason for name, reason in manifest.rejects}
    assert set(reasons) == {name for name in files if name.startswith("bad")}
    assert manifest.count == len(ODD)
    for name, (_, part) in BAD.items():
        reason = reasons[f"bad-{name}.png"]
        assert part in reason and reason and "\n" not in reason and " at 0x" not in reason, (name, reason)
    new = set(tmp_path.rglob("*")) - before
    assert {path.relative_to(tmp_path).parts[0] for path in new} <= {"out"}


def test_odd_pictures_have_the_right_pixels(tmp_path):
    files = {f"{name}.png": content for name, content in ODD.items() if "jpeg" not in name}
    pack(open_source(folder(tmp_path / "b", files), Options()), tmp_path / "out", SIDE, 4)
    for name, image in zip(sorted(files), open_packed(tmp_path / "out").images(range(len(files))).numpy(), strict=True):
        expected = picture(0).transpose(Image.Transpose.ROTATE_270) if name == "exif-loop.png" else picture(0)
        assert np.array_equal(image, np.asarray(expected)), name


OUTSIDE = ["../../outside.png", "/absolute.png", "a/../../b.png", "..\\windows.png", "C:\\c.png", "c:/c.png", ".."]


@pytest.mark.parametrize("kind", [zipped, tarred])
def test_names_that_lead_out_of_an_archive_are_rejects(kind, tmp_path):
    files = {name: GOOD["PNG"] for name in OUTSIDE} | {"a/good..png": GOOD["PNG"]}
    source = open_source(kind(tmp_path / "archive", files), Options())
    pack(source, tmp_path / "out", SIDE, 4)
    manifest = Manifest.read(tmp_path / "out")
    assert manifest.count == 1
    assert {name for name, _ in manifest.rejects} == set(OUTSIDE) - {".."}
    assert {reason for _, reason in manifest.rejects} == {"a name that leads out of the archive"}
    assert set(tmp_path.iterdir()) == {tmp_path / "archive", tmp_path / "out"} and not Path("/absolute.png").exists()


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_members_of_a_tar_that_are_no_files(mode, tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, mode) as archive:
        for kind, name in (
            (tarfile.SYMTYPE, "link.png"),
            (tarfile.LNKTYPE, "hard.png"),
            (tarfile.FIFOTYPE, "pipe.png"),
            (tarfile.CHRTYPE, "device.png"),
            (tarfile.DIRTYPE, "folder.png"),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
        member = tarfile.TarInfo("good.png")
        member.size = len(GOOD["PNG"])
        archive.addfile(member, io.BytesIO(GOOD["PNG"]))
    pack(open_source(str(path), Options()), tmp_path / "out", SIDE, 4)
    manifest = Manifest.read(tmp_path / "out")
    assert manifest.count == 1
    assert manifest.rejects == [[f"{name}.png", "not a regular file"] for name in ("link", "hard", "pipe", "device")]


def test_a_name_that_comes_twice_counts_once(tmp_path):
    with warnings.catch_warnings(), zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        warnings.simplefilter("ignore")
        for number in range(3):
            archive.writestr("same.png", encoded(picture(number)))
    pack(open_source(str(tmp_path / "a.zip"), Options()), tmp_path / "out", SIDE, 4)
    assert Manifest.read(tmp_path / "out").rejects == [["same.png", "another file of this name follows"]] * 2
    assert np.array_equal(open_packed(tmp_path / "out").images([0])[0].numpy(), np.asarray(picture(2)))


@pytest.mark.parametrize("kind", [folder, zipped, tarred])
def test_files_that_are_too_large_are_not_read(kind, tmp_path, monkeypatch):
    files = {"big.png": GOOD["PNG"] + bytes(5000), "good.png": GOOD["PNG"]}
    monkeypatch.setattr(items, "MOST_BYTES", 4000)
    pack(open_source(kind(tmp_path / "source", files), Options()), tmp_path / "out", SIDE, 4, workers=1)
    assert Manifest.read(tmp_path / "out").rejects == [["big.png", "larger than 0 GiB"]]


def test_a_large_member_of_a_compressed_tar_is_not_read(tmp_path, monkeypatch):
    files = {"big.png": GOOD["PNG"] + bytes(5000), "good.png": GOOD["PNG"]}
    monkeypatch.setattr(archives, "MOST_BYTES", 4000)
    path = tarred(tmp_path / "a.tar.gz", files, "w:gz")
    pack(open_source(path, Options()), tmp_path / "out", SIDE, 4, workers=1)
    assert Manifest.read(tmp_path / "out").rejects == [["big.png", "larger than 0 GiB"]]


def test_odd_things_in_a_folder(tmp_path):
    root = tmp_path / "pictures"
    root.mkdir()
    (root / "good.png").write_bytes(GOOD["PNG"])
    (root / "folder.png").mkdir()
    (root / "self.png").symlink_to("self.png")
    (root / "null.png").symlink_to("/dev/null")
    with open(os.path.join(os.fsencode(root), b"caf\xe9 \n\x1b[31m.png"), "wb") as file:
        file.write(GOOD["JPEG"])
    with open(os.path.join(os.fsencode(root), b"\xff\xfe.png"), "wb") as file:
        file.write(b"broken")
    done = subprocess.run(
        [sys.executable, "-m", "maskdiff.pack", str(root), str(tmp_path / "out"), "--image-size", "16"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr and "\x1b" not in done.stderr, done.stderr
    manifest = Manifest.read(tmp_path / "out")
    assert manifest.count == 2
    assert dict(manifest.rejects) == {
        "null.png": "not a regular file",
        "self.png": "Too many levels of symbolic links",
        "\udcff\udcfe.png": "not a PNG, JPEG, WebP or GIF image",
    }


def damaged_tar(path: Path) -> None:
    tarred(path, {f"{number}.png": encoded(picture(number)) for number in range(9)})
    content = bytearray(path.read_bytes())
    second = 512 + -(-len(encoded(picture(0))) // 512) * 512
    content[second : second + 4] = b"\xff\xfe\xfd\xfc"  # the header of the second member
    path.write_bytes(content)


def shortened(build, share: float):
    def cut(path: Path) -> None:
        build(path, {f"{number}.png": encoded(picture(number)) for number in range(9)})
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])

    return cut


def lying_npz(path: Path) -> None:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (1 << 50, 8, 8)})
    zipped(path, {"a.npy": file.getvalue() + bytes(64)})


def lying_npy(path: Path) -> None:
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (1 << 40, 8, 8)})
        file.write(bytes(64))


def npy_cut(path: Path) -> None:
    np.save(path, np.zeros((3, 8, 8), np.uint8))
    os.truncate(path, path.stat().st_size - 1)


def object_npy(path: Path) -> None:
    np.save(path, np.array([print, None]), allow_pickle=True)


@pytest.mark.parametrize(
    ("file", "make", "message"),
    [
        ("a.zip", shortened(zipped, 0.9), "not a readable zip"),
        ("a.zip", shortened(zipped, 0.1), "not a readable zip"),
        ("a.zip", lambda path: path.write_bytes(b"PK\x03\x04" + bytes(99)), "not a readable zip"),
        ("a.zip", lambda path: path.write_bytes(b""), "is an empty file"),
        ("a.zip", lambda path: zipped(path, {"a.txt": b"x"}), "no picture in the zip"),
        ("a.tar", shortened(tarred, 0.5), "not a readable tar"),
        ("a.tar", damaged_tar, "not a readable tar: damaged after 1 members"),
        ("a.tar", lambda path: tarred(path, {"a.txt": b"x"}), "no picture in the tar"),
        ("a.tar", lambda path: path.write_bytes(b"no tar at all" * 99), "not a readable tar"),
        ("a.tgz", shortened(lambda path, files: tarred(path, files, "w:gz"), 0.7), "not a readable tar"),
        ("a.txz", shortened(lambda path, files: tarred(path, files, "w:xz"), 0.7), "not a readable tar"),
        ("a.parquet", shortened(parquet, 0.9), "not a readable Parquet file"),
        ("a.parquet", lambda path: path.write_bytes(b"PAR1" + bytes(99) + b"PAR1"), "not a readable Parquet file"),
        ("a.npy", npy_cut, "not a readable .npy file"),
        ("a.npy", lying_npy, "not a readable .npy file"),
        ("a.npy", object_npy, "arrays of objects are not read"),
        ("a.npz", lying_npz, "not a readable .npz file: a.npy is cut short"),
        ("a.npz", shortened(zipped, 0.9), "not a readable .npz file"),
        ("a.bin", lambda path: path.write_bytes(b"\x7fELF" + bytes(999)), "is none of what can be read"),
        ("a", lambda path: path.mkdir(), "no picture in the folder"),
        ("a", lambda path: os.mkfifo(path), "is no file and no folder"),
    ],
)
def test_sources_that_cannot_be_read_are_one_clear_error(file, make, message, tmp_path):
    make(tmp_path / file)
    with pytest.raises(UserError, match=message) as raised:
        open_source(str(tmp_path / file), Options())
    assert "\n" not in str(raised.value)


def test_a_damaged_row_group_costs_its_rows_alone(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="pyarrow is an extra")
    module = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    pictures = [encoded(picture(number)) for number in range(30)]
    module.write_table(
        pa.table({"image": pictures}), path, row_group_size=10, write_page_checksum=True, use_dictionary=False,
        compression="none",
    )  # fmt: skip
    content = bytearray(path.read_bytes())
    content[content.index(pictures[15]) + 50] ^= 0xFF
    path.write_bytes(content)
    pack(open_source(str(path), Options()), tmp_path / "out", SIDE, 4)
    manifest = Manifest.read(tmp_path / "out")
    assert manifest.count == 20
    assert [name for name, _ in manifest.rejects] == [f"a.parquet#{row}" for row in range(10, 20)]
    assert all(reason.startswith("damaged: ") for _, reason in manifest.rejects)


def test_rows_without_a_picture_are_rejects(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="pyarrow is an extra")
    module = pytest.importorskip("pyarrow.parquet")
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [None, {"bytes": None, "path": "/etc/passwd"}, {"bytes": b"x", "path": None}, {"bytes": GOOD["PNG"]}]
    module.write_table(pa.table({"picture": pa.array(rows, kind)}), tmp_path / "a.parquet")
    pack(open_source(str(tmp_path / "a.parquet"), Options()), tmp_path / "out", SIDE, 4)
    rejects = Manifest.read(tmp_path / "out").rejects
    assert [reason for _, reason in rejects] == ["no bytes in the row"] * 2 + ["not a PNG, JPEG, WebP or GIF image"]


def test_hostile_descriptions_of_a_parquet_file(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="pyarrow is an extra")
    module = pytest.importorskip("pyarrow.parquet")
    for number, text in enumerate(
        ["", "[", "[]", "{}", '{"info": 3}', '{"info": {"features": []}}', '{"info": {"features": {"image": 3}}}',
         '{"info": {"features": {"label": {"_type": "ClassLabel", "names": 7}}}}',
         '{"info": {"features": {"label": {"_type": "ClassLabel", "names": [1]}}}}', "[" * 100_000]
    ):  # fmt: skip
        table = pa.table({"image": [GOOD["PNG"]] * 2, "label": [5, 6]}).replace_schema_metadata({"huggingface": text})
        module.write_table(table, tmp_path / f"{number}.parquet")
        assert open_source(str(tmp_path / f"{number}.parquet"), Options()).labels == {"label": ["5", "6"]}
