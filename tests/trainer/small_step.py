"""A small model and images for tests of the step: 16 patches, labels, flips, dropped labels."""

import torch

from maskdiff import masking
from maskdiff.config import OptimConfig
from maskdiff.diffusion import Diffusion, DiffusionConfig
from maskdiff.model import ModelConfig, UViT
from maskdiff.optim import FlatState
from maskdiff.step import Objective, Source
from maskdiff_kernels import Mask, Store

BATCH, SEED = 8, torch.tensor([1234])
MODEL = ModelConfig(image_size=16, channels=3, patch=4, width=64, blocks=3, heads=2, classes=(3, 2))


def setup(target="v", dtype=torch.float32, min_snr=None, backend="cpp", device="cpu", ema_every=1):
    generator = torch.Generator().manual_seed(0)
    patches = torch.randint(256, (20, MODEL.patches, MODEL.patch_dim), dtype=torch.uint8, generator=generator)
    labels = torch.stack(
        [torch.randint(-1, 3, (20,), generator=generator), torch.randint(2, (20,), generator=generator)], 1
    )
    store = Store(patches.to(device), MODEL.grid, MODEL.patch)
    source = Source(store, torch.arange(20, device=device), labels.int().to(device))
    diffusion = Diffusion(DiffusionConfig(schedule="cosine", target=target, min_snr=min_snr)).to(device)
    objective = Objective(diffusion.alpha_sigma, diffusion.weight, target, 0.5, 0.25, backend)
    torch.manual_seed(0)
    return FlatState(UViT(MODEL).to(device), OptimConfig(ema_every=ema_every), dtype), source, objective


def mask_of(text: str) -> Mask:
    return masking.resolve(masking.parse_mask(text), MODEL.grid, BATCH)
