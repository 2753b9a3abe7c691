"""How near drawn images come to real ones, by their features: Frechet distance, KID, precision, recall and kin."""

import hashlib
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .data import PackedSet, cache_folder
from .errors import UserError
from .features import Extractor

KEPT = 50_000  # real images, spread evenly, whose features are kept for KID and neighbours
KID_SUBSETS, KID_SIZE, KID_SEED = 100, 1000, 0
NEIGHBOURS = (3, 5)  # of precision and recall (Kynkaanniemi et al.), of density and coverage (Naeem et al.)
_FORMAT = 1  # of a cached reference
_BATCH = 256


@dataclass(frozen=True)
class Scores:
    """How drawn images compare with real ones. None: too few images for that figure."""

    frechet: float  # 0: the same mean and covariance; called FID with the public Inception file alone
    kid: float | None  # 0 on average for images of the same kind; it has no bias, so it may be negative
    kid_std: float | None  # over the random subsets
    precision: float | None  # share of drawn images within the real ones' reach
    recall: float | None  # share of real images within the drawn ones' reach
    density: float | None  # how many real images reach a drawn one, over the neighbours that define reach
    coverage: float | None  # share of real images that reach a drawn one
    count: int  # drawn images
    real_count: int


class Moments(NamedTuple):
    """Mean and covariance of features."""

    mean: Tensor  # [F] float64
    covariance: Tensor  # [F, F] float64, over count - 1


def moments(
    features: Tensor,  # [N, F], N at least 2
) -> Moments:
    """Mean and covariance, accumulated in float64 batch by batch. Raises UserError for fewer than two images."""
    count, width = features.shape
    if count < 2:
        raise UserError(f"a Frechet distance takes at least 2 images on either side, got {count}")
    mean = torch.zeros(width, dtype=torch.float64)
    for part in features.split(4096):
        mean += part.double().sum(0)
    mean /= count
    products = torch.zeros(width, width, dtype=torch.float64)
    for part in features.split(4096):
        centred = part.double() - mean
        products.addmm_(centred.T, centred)
    return Moments(mean, products / (count - 1))


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), Heusel et al., arXiv 1706.08500, eq. 6.

    The last trace is that of (R' S_b R)^(1/2) with S_a = R R', of symmetric matrices: real eigenvalues whatever the
    rank. torchmetrics' FID gives the same; here the real images' moments can be kept.
    """
    values, vectors = torch.linalg.eigh(a.covariance)
    root = vectors * values.clamp(min=0).sqrt()
    crossed = torch.linalg.eigvalsh(root.T @ b.covariance @ root).clamp(min=0).sqrt().sum()
    traces = a.covariance.trace() + b.covariance.trace()
    return float((a.mean - b.mean).square().sum() + traces - 2 * crossed)


def kernel_distance(
    real: Tensor,  # [M, F]
    drawn: Tensor,  # [N, F]
) -> tuple[float, float] | None:
    """KID and its spread over 100 random subsets, always the same: Binkowski et al., arXiv 1801.01401.

    Subsets are of 1000 images, or of half of the fewer where that is less. None below 4 images. By torchmetrics.
    """
    size = kid_size(len(real), len(drawn))
    if size is None:
        return None
    from torchmetrics.image.kid import KernelInceptionDistance

    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", "Metric `Kernel Inception Distance` will save all")
        metric = KernelInceptionDistance(torch.nn.Identity(), subsets=KID_SUBSETS, subset_size=size)
        metric.update(real.double(), real=True)
        metric.update(drawn.double(), real=False)
        torch.manual_seed(KID_SEED)
        mean, spread = metric.compute()
    return float(mean), float(spread)


def kid_size(real: int, drawn: int) -> int | None:
    """Images in a subset of KID; None where there are too few."""
    return min(KID_SIZE, min(real, drawn) // 2) if min(real, drawn) >= 4 else None


def neighbourhoods(
    real: Tensor,  # [M, F]
    drawn: Tensor,  # [N, F]
    reach: Tensor | None = None,  # [2, M] of the real images, from `reaches`
) -> tuple[float, float, float, float] | None:
    """Precision, recall, density and coverage, in one pass over the distances; None for 5 images or fewer.

    An image reaches as far as its k-th nearest neighbour on its own side: k = 3 for precision and recall (Kynkaanniemi
    et al., arXiv 1904.06991), k = 5 for density and coverage (Naeem et al., arXiv 2002.09797). Just as far counts as
    within. Distances are scikit-learn's. Raises UserError where it is absent.
    """
    if min(len(real), len(drawn)) <= max(NEIGHBOURS):
        return None
    check_neighbours()
    from sklearn.metrics import euclidean_distances

    centre = real.double().mean(0)  # what all share would cost digits
    real, drawn = real.double() - centre, drawn.double() - centre
    slack = 1e-6 * float(real.square().sum(1).mean().sqrt())  # for rounding, which must not tell equal images apart
    near, far = (reaches(real) if reach is None else reach) + slack
    drawn_near = reaches(drawn)[0] + slack
    recalled, covered = torch.zeros(2, len(real), dtype=torch.bool)
    precise = dense = 0
    for part, own in zip(drawn.split(_BATCH), drawn_near.split(_BATCH), strict=True):
        distances = torch.from_numpy(euclidean_distances(part.numpy(), real.numpy()))  # [B, M]
        precise += int((distances <= near).any(1).sum())
        dense += int((distances <= far).sum())
        recalled |= (distances <= own[:, None]).any(0)
        covered |= (distances <= far).any(0)
    count = len(drawn)
    shares = recalled.double().mean().item(), covered.double().mean().item()
    return precise / count, shares[0], dense / (NEIGHBOURS[1] * count), shares[1]


def reaches(
    features: Tensor,  # [N, F], N more than 5
) -> Tensor:  # [2, N] float64
    """How far each image's third and fifth nearest neighbours among the others are."""
    from sklearn.neighbors import NearestNeighbors

    points = (features.double() - features.double().mean(0)).numpy()
    distances, _ = NearestNeighbors(n_neighbors=max(NEIGHBOURS), algorithm="brute").fit(points).kneighbors()
    return torch.from_numpy(distances[:, [k - 1 for k in NEIGHBOURS]]).T.contiguous()


def nearest(
    points: Tensor,  # [N, F]
    others: Tensor,  # [M, F]
    count: int = 1,
) -> tuple[Tensor, Tensor]:  # [N, count] float64, ascending; [N, count] int64
    """The nearest of the others to each point: how far, and which. Raises UserError without scikit-learn."""
    check_neighbours()
    from sklearn.neighbors import NearestNeighbors

    centre = others.double().mean(0)
    found = NearestNeighbors(n_neighbors=count, algorithm="brute").fit((others.double() - centre).numpy())
    distances, which = found.kneighbors((points.double() - centre).numpy())
    return torch.from_numpy(distances), torch.from_numpy(which)


def check_neighbours() -> None:
    """Raises UserError where scikit-learn is absent: before anything is drawn, not after."""
    try:
        import sklearn.neighbors  # noqa: F401
    except ImportError:
        raise UserError(
            "precision, recall, density and coverage need scikit-learn, which is not installed; "
            "run: pip install scikit-learn"
        ) from None


@dataclass(frozen=True)
class Reference:
    """Real images as features: what drawn ones are held against."""

    moments: Moments  # of all
    features: Tensor  # [K, F] float32 of 50,000 at most, for KID and neighbours
    kept: Tensor  # [K] int64, which of the images those are
    reach: Tensor | None  # [2, K] float64, see `reaches`; None for 5 images or fewer
    count: int

    @classmethod
    def of(cls, extractor: Extractor, packed: PackedSet, ids: Tensor | None = None) -> "Reference":
        """The images of these numbers, by default the training images.

        Kept in the cache under the packed set's hash, the extractor's and the numbers; a damaged file is made anew.
        Raises UserError for fewer than two images, and without scikit-learn.
        """
        check_neighbours()
        ids = packed.train_ids if ids is None else ids
        numbers = hashlib.sha256(ids.to(torch.int64).numpy().tobytes()).hexdigest()[:16]
        name = f"{packed.hash[:16]}-{extractor.digest}-{numbers}-{_FORMAT}.safetensors"
        path = cache_folder() / "features" / name
        if path.exists() and (found := _read(path)) is not None:
            return found
        made = cls.from_features(extractor.features(progress((packed.images(part) for part in ids.split(_BATCH)), ids)))
        _write(path, made)
        return made

    @classmethod
    def from_features(
        cls,
        features: Tensor,  # [N, F], N at least 2
    ) -> "Reference":
        """Images of any kind, by their features."""
        check_neighbours()
        count = len(features)
        kept = torch.linspace(0, count - 1, min(count, KEPT), dtype=torch.float64).round().long()
        few = features[kept].float()
        reach = reaches(few) if len(few) > max(NEIGHBOURS) else None
        return cls(moments(features), few, kept, reach, count)

    def compare(
        self,
        features: Tensor,  # [N, F] of drawn images, N at least 2
    ) -> Scores:
        """Scores of drawn images. Raises UserError for features of another extractor, and for fewer than two images."""
        width = self.features.shape[1]
        if features.dim() != 2 or features.shape[1] != width:
            raise UserError(f"features are {list(features.shape)}, the real images' are [N, {width}]: of one extractor")
        kid, kid_std = kernel_distance(self.features, features) or (None, None)
        near = neighbourhoods(self.features, features, self.reach)
        precision, recall, density, coverage = near or (None, None, None, None)
        frechet = frechet_distance(self.moments, moments(features))
        return Scores(frechet, kid, kid_std, precision, recall, density, coverage, len(features), self.count)


def progress(batches: Iterator[Tensor], ids: Tensor) -> Iterator[Tensor]:
    """A progress bar over batches of these images, where there is a terminal."""
    from tqdm import tqdm

    with tqdm(total=len(ids), desc="features", unit=" images", disable=None, leave=False) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch))


def _read(path: Path) -> Reference | None:
    """A cached reference; None where the file is damaged, which is said."""
    try:
        found = load_file(path)
        tensors = [found[key] for key in ("mean", "covariance", "features", "kept", "reach")]
        mean, covariance, features, kept, reach = tensors
        fits = covariance.shape == (len(mean), len(mean)) and features.shape == (len(kept), len(mean))
        if not fits or not all(tensor.isfinite().all() for tensor in tensors):
            raise ValueError("it holds no such tensors")
        return Reference(
            Moments(mean, covariance), features, kept, reach if reach.numel() else None, int(found["count"])
        )
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        print(f"warning: {path} is damaged and made anew: {error}", file=sys.stderr)
        return None


def _write(path: Path, made: Reference) -> None:
    """Keeps a reference: whole, or not at all. A cache that cannot be written is no error."""
    tensors: dict[str, Any] = made.moments._asdict()
    tensors |= {"features": made.features, "kept": made.kept, "count": torch.tensor(made.count)}
    tensors["reach"] = torch.empty(2, 0, dtype=torch.float64) if made.reach is None else made.reach
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, partial)
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        print(f"warning: the features of the real images are not kept: {error}", file=sys.stderr)
        partial.unlink(missing_ok=True)
