"""noisy_patches: GB/s of bytes read and numbers written, beside its twin and PyTorch. See conftest.py.

torch gathers the visible patches and draws noise for them alone, torch_compiled does that by torch.compile; torch_whole
does as published trainers do: noise on whole images, tokens dropped afterwards. None of them mirrors.
"""

import peers
import pytest
import torch

import maskdiff_kernels as mk

BATCH, GRID, PATCH, CHANNELS, IMAGES = 64, (16, 16), 4, 3, 512
SIZE, PATCHES = PATCH * PATCH * CHANNELS, GRID[0] * GRID[1]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
VISIBLE = {"whole": 256, "half": 128, "tenth": 26}
SHAPES = [f"{share}-{dtype}" for share in VISIBLE for dtype in DTYPES]
CASES = {shape: ("cpp", "reference", "torch", "torch_compiled", "torch_whole") for shape in SHAPES}
CASES |= {f"{shape}-gather": ("cpp", "reference") for shape in SHAPES}


def build(case: str, device="cpu"):
    share, name, *_, how = case.split("-")
    dtype, visible = DTYPES[name], VISIBLE[share]
    generator = torch.Generator().manual_seed(0)
    patches = torch.randint(0, 256, (IMAGES, PATCHES, SIZE), dtype=torch.uint8, generator=generator).to(device)
    store, seed = mk.Store(patches, GRID, PATCH), torch.tensor([1], device=device)
    mask = mk.Mask("patch", counts=(visible,))
    batch = mk.draw_batch(seed, torch.arange(BATCH, device=device), IMAGES, GRID, mask, flip=0.5)
    table = None if "gather" in case else torch.rand(1000, 2, generator=generator).to(device)
    work = BATCH * visible * SIZE * (1 + dtype.itemsize)
    keep_ids, rows = batch.keep_ids.long(), torch.arange(BATCH, device=device)[:, None]

    def gathered():
        x0 = patches[batch.image_ids[:, None], keep_ids].float().mul_(2 / 255).sub_(1)
        alpha, sigma = table[batch.timestep][:, :, None, None].unbind(1)
        return (alpha * x0 + sigma * torch.randn_like(x0)).to(dtype)

    def whole():
        x0 = patches[batch.image_ids].float().mul_(2 / 255).sub_(1)
        alpha, sigma = table[batch.timestep][:, :, None, None].unbind(1)
        return (alpha * x0 + sigma * torch.randn_like(x0)).to(dtype)[rows, keep_ids]

    plain = {"torch": gathered, "torch_compiled": gathered, "torch_whole": whole}
    if how in plain:
        return peers.compiled(plain[how]) if how == "torch_compiled" else plain[how], work, "bytes"
    return lambda: mk.noisy_patches(store, batch, table, seed, dtype, how), work, "bytes"


@pytest.mark.parametrize("case", CASES)
def test_noisy_patches(in_turns, case):
    in_turns(build, case, CASES[case])
