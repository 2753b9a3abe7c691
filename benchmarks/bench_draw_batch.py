"""draw_batch: images a second, beside its twin and what a trainer would use: plain PyTorch, also by torch.compile.

See conftest.py.
"""

import functools

import peers
import pytest
import torch

import maskdiff_kernels as mk

BATCH, IMAGES = 256, 100_000
MASKS = {
    "dense-256": ((16, 16), mk.Mask("dense")),
    "patch-26-of-256": ((16, 16), mk.Mask("patch", counts=(26,))),
    "block4-32-of-256": ((16, 16), mk.Mask("block", 4, (32,))),
    "crop-25-of-256": ((16, 16), mk.Mask("crop", counts=(25,))),
    "patch-409-of-4096": ((64, 64), mk.Mask("patch", counts=(409,))),
    "patch-ragged-26-to-128": ((16, 16), mk.Mask("patch", counts=tuple(range(26, 129, 6))[:16])),
}
CASES = {mask: ("cpp", "reference", "torch", "torch_compiled") for mask in MASKS}


def build(case: str, device="cpu"):
    name, how = case.rsplit("-", 1)
    grid, mask = MASKS[name]
    seed, n = torch.tensor([1], device=device), torch.arange(BATCH, device=device)
    if how.startswith("torch"):
        draw = functools.partial(plain, grid, mask, device)
        return peers.compiled(draw) if how == "torch_compiled" else draw, BATCH, "images"
    return (
        lambda: mk.draw_batch(seed, n, IMAGES, grid, mask, flip=0.5, label_dropout=0.1, backend=how),
        BATCH,
        "images",
    )


def plain(grid: tuple[int, int], mask: mk.Mask, device):
    """The usual way, with a generator's state: argsort of noise, for masks of one length."""
    size = mask.size if mask.kind == "block" else 1
    places = grid[0] * grid[1] // size**2
    shown = max(mask.counts or (places,)) // size**2
    kept = torch.rand(BATCH, places, device=device).argsort(1)[:, :shown].sort(1).values
    image_ids = torch.randint(0, IMAGES, (BATCH,), device=device)
    timestep = torch.randint(0, 1000, (BATCH,), device=device)
    flip, drop_label = (torch.rand(BATCH, device=device) < share for share in (0.5, 0.1))
    return image_ids, kept, timestep, flip, drop_label


@pytest.mark.parametrize("case", CASES)
def test_draw_batch(in_turns, case):
    in_turns(build, case, CASES[case])
