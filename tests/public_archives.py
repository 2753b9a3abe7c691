"""Small archives with the names and layout of CelebA's, FFHQ's and CelebA-HQ's, for docs/reproduce.md."""

import io
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn


def portrait(number: int, width: int, height: int) -> Image.Image:
    """A soft oval on a coloured ground: different for every number."""
    down, across = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    shift = 0.3 * np.sin(number)
    oval = 1 / (1 + np.exp(12 * ((across - shift) ** 2 + 0.6 * down**2 - 0.35)))[..., None]
    ground, skin = (np.array([90 + 70 * np.sin(number * k + i) for i in range(3)]) for k in (1.3, 0.7))
    return Image.fromarray(np.uint8(ground * (1 - oval) + (60 + skin * 0.8) * oval))


def encoded(number: int, width: int, height: int, kind: str) -> bytes:
    stream = io.BytesIO()
    portrait(number, width, height).save(stream, kind, compress_level=1)
    return stream.getvalue()


def zipped(path: Path, names: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.mkdir(f"{path.stem}/")
        for name, content in names.items():
            archive.writestr(f"{path.stem}/{name}", content)


def celeba(folder: Path, count: int = 60) -> None:
    """img_align_celeba.zip, 178 x 218 JPEG, and the partition: 0 training, 1 validation, 2 test."""
    names = [f"{number:06}.jpg" for number in range(1, count + 1)]
    zipped(folder / "img_align_celeba.zip", {name: encoded(i, 178, 218, "jpeg") for i, name in enumerate(names)})
    parts = [0] * (8 * count // 10) + [1] * (count // 10) + [2] * (count // 10)
    lines = [f"{name} {part}\n" for name, part in zip(names, parts, strict=True)]
    (folder / "list_eval_partition.txt").write_text("".join(lines))


def ffhq(folder: Path, count: int = 40) -> None:
    """thumbnails128x128.zip and, of fewer pictures, images1024x1024.zip: PNG in folders of a thousand."""
    for name, size, some in (("thumbnails128x128", 128, count), ("images1024x1024", 1024, 2)):
        numbers = [1000 * (i % 2) + i for i in range(some)]
        files = {f"{n // 1000 * 1000:05}/{n:05}.png": encoded(100 + n, size, size, "png") for n in numbers}
        zipped(folder / f"{name}.zip", files)


def celeba_hq(folder: Path, count: int = 40) -> None:
    """data256x256/00001.jpg, ..., and the same as Parquet files of two splits, as on the hub."""
    import pyarrow
    import pyarrow.parquet

    files = [encoded(300 + i, 256, 256, "jpeg") for i in range(count)]
    (folder / "data256x256").mkdir()
    for i, content in enumerate(files, 1):
        (folder / "data256x256" / f"{i:05}.jpg").write_bytes(content)
    data = folder / "celeba-hq" / "data"
    data.mkdir(parents=True)
    splits = {
        "train-00000-of-00002": files[:15],
        "train-00001-of-00002": files[15:30],
        "validation-00000-of-00001": files[30:],
    }
    for split, some in splits.items():
        images = [{"bytes": content, "path": None} for content in some]
        table = pyarrow.table({"image": images, "label": [i % 2 for i in range(len(some))]})
        pyarrow.parquet.write_table(table, data / f"{split}-3f1a.parquet")


class Features(nn.Module):
    """Called as the public Inception is: [N, 3, H, W] uint8 to [N, F] float."""

    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        small = nn.functional.adaptive_avg_pool2d(images.float() / 255, 4)
        return small.flatten(1)


def inception(folder: Path) -> None:
    """A TorchScript file of its convention. By the public one's name none but the public one is taken."""
    torch.jit.script(Features()).save(folder / "stand-in.pt")


def write(folder: Path) -> None:
    """All that docs/reproduce.md begins with."""
    for part in (celeba, ffhq, celeba_hq, inception):
        part(folder)
