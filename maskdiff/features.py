"""What turns images into features to compare them by: the public Inception file, others like it, a built-in one."""

import hashlib
import http.client
import os
import urllib.error
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .data import cache_folder
from .errors import UserError, first_line
from .packing.writer import locked
from .precision import resolve_device

INCEPTION = "inception-2015-12-05"
# NVIDIA's TorchScript translation of the network that FID is defined by (StyleGAN2-ADA, EDM, clean-fid use it)
INCEPTION_URL = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"

Net = Callable[[Tensor], Tensor]  # [B, 3, H, W] uint8 -> [B, F] float32


class Extractor:
    """Gives the features of images, on its device and without gradients. `load` makes them."""

    def __init__(self, net: Net, name: str, digest: str, device: torch.device) -> None:
        self._net, self._device = net, device
        self.name = name  # "inception-2015-12-05" for that very file alone, "builtin", or the file's stem
        self.digest = digest  # 16 hex digits of the file's SHA-256, or of what the built-in computes
        self.width = self(torch.zeros(2, 32, 32, 3, dtype=torch.uint8)).shape[1]  # F

    @property
    def title(self) -> str:
        """What its Frechet distance is called: FID with the public Inception file, and with no other."""
        return "FID" if self.name == INCEPTION else f"Frechet distance ({self.name})"

    @torch.no_grad()
    def __call__(
        self,
        images: Tensor,  # [B, H, W, C] uint8, C = 1 (taken as grey) or 3
    ) -> Tensor:  # [B, F] float32, on the extractor's device
        """The features of one batch. Raises UserError for images of another kind, and where a feature is no number."""
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[3] not in (1, 3):
            raise UserError(f"features are of uint8 images [B, H, W, 1 or 3], not {images.dtype} {list(images.shape)}")
        planes = images.to(self._device).permute(0, 3, 1, 2).expand(-1, 3, -1, -1).contiguous()
        # On a GPU convolutions would round to tf32, whose 10 bits would show in the distances.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            found = self._net(planes).float()
        if not found.isfinite().all():
            raise UserError(f"{self.name} gives features that are no finite numbers for these images")
        return found

    def features(
        self,
        batches: Iterable[Tensor],  # of [B, H, W, C] uint8
    ) -> Tensor:  # [N, F] float32, on the CPU
        """The features of many images, a batch at a time."""
        found = [self(batch).cpu() for batch in batches]
        return torch.cat(found) if found else torch.empty(0, self.width)


def load(spec: str | os.PathLike | None = None, device: str | torch.device = "auto") -> Extractor:
    """Opens an extractor.

    Args:
        spec: None or "builtin"; "inception", which is fetched once (96 MB), checked and kept in the cache; or a
            TorchScript file of that calling convention: model(uint8 [B, 3, H, W], return_features=True) -> [B, F].
        device: where it runs: auto, cpu, cuda.

    A file gets its stem as its name. Raises UserError where there is no such file, where it is of another convention,
    and where it calls itself `inception-2015-12-05` but is not the public file.
    """
    place = resolve_device(device) if isinstance(device, str) else device
    if spec is None or spec == "builtin":
        return _builtin(place)
    path = _inception() if spec == "inception" else Path(spec)
    if not path.is_file():
        raise UserError(f"--features {spec}: no such file; give inception, builtin, or a TorchScript file")
    sha256, name = _sha256(path), path.stem
    if sha256 == INCEPTION_SHA256:
        name = INCEPTION
    elif name in (INCEPTION, "builtin"):
        raise UserError(
            f"{path} is not what its name says: its SHA-256 is {sha256[:16]}...; fetch it again, or name it otherwise"
        )
    net = _torchscript(path, place)
    try:
        return Extractor(net, name, sha256[:16], place)
    except (RuntimeError, AttributeError, IndexError, TypeError) as error:
        raise UserError(
            f"{path} does not take model(uint8 [B, 3, H, W], return_features=True) -> [B, F]: {first_line(error)}"
        ) from None


def _torchscript(path: Path, device: torch.device) -> Net:
    try:
        model = torch.jit.load(str(path), map_location=device).eval()
    except (RuntimeError, ValueError):
        raise UserError(f"{path} is no TorchScript file, or it is damaged: fetch it again, or export it anew") from None

    def net(planes: Tensor) -> Tensor:
        found = model(planes, return_features=True)
        if not isinstance(found, Tensor) or found.dim() != 2 or len(found) != len(planes):
            raise TypeError(f"it gives {list(found.shape) if isinstance(found, Tensor) else type(found).__name__}")
        return found

    return net


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _inception() -> Path:
    """The public file out of the cache; fetched first where it is not there, or damaged."""
    path = cache_folder() / f"{INCEPTION}.pt"
    if path.is_file() and _sha256(path) == INCEPTION_SHA256:
        return path
    with locked(path):
        if path.is_file() and _sha256(path) == INCEPTION_SHA256:  # another process was faster
            return path
        try:  # written beside its place, and renamed when its hash is right
            torch.hub.download_url_to_file(INCEPTION_URL, str(path), INCEPTION_SHA256)
        except (urllib.error.URLError, http.client.HTTPException, OSError, RuntimeError) as error:
            raise UserError(
                f"{INCEPTION_URL} could not be fetched: {first_line(error)}; try again, or fetch it by other means and "
                "give the file with --features"
            ) from None
    return path


# ---- the built-in

SIDE, LEVELS, FILTERS, SIZE, CELLS = 64, 4, 32, 5, 2
DEFINITION = "fixed filters on a pyramid, version 1"


def _builtin(device: torch.device) -> Extractor:
    """How strongly fixed random filters answer, on four scales, in the four quarters of an image; and its colours.

    Images are scaled to 64 px. Rectified random filters tell noise, blur, texture and layout apart without training
    (Saxe et al., 2011); they know nothing of what an image shows. F = 4 * 32 * 4 + 48 = 560.
    """
    generator = torch.Generator().manual_seed(0)
    filters = torch.rand(LEVELS, FILTERS, 3, SIZE, SIZE, generator=generator)
    said = f"{DEFINITION}: {SIDE} {CELLS} {list(filters.shape)}".encode()
    digest = hashlib.sha256(said + filters.numpy().tobytes()).hexdigest()
    filters -= filters.mean((2, 3, 4), keepdim=True)  # a flat surface gives no answer
    filters /= filters.square().sum((2, 3, 4), keepdim=True).sqrt()
    filters = filters.to(device)

    def net(planes: Tensor) -> Tensor:
        x = planes.float() / 127.5 - 1
        if x.shape[2:] != (SIDE, SIDE):
            x = F.interpolate(x, (SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False)
        found = []
        for level, weights in enumerate(filters):
            answers = F.conv2d(F.pad(x, [SIZE // 2] * 4, "replicate"), weights).abs()
            gain = 2 ** (LEVELS - 1 - level)  # images have half the contrast at half the scale
            found.append(gain * F.adaptive_avg_pool2d(answers, CELLS).flatten(1))
            x = F.avg_pool2d(x, 2)
        return torch.cat([*found, x.flatten(1)], dim=1)

    return Extractor(net, "builtin", digest[:16], device)
