"""denoising_loss, forward and backward: GB/s, beside its twin, plain PyTorch and torch.compile. See conftest.py.

The bytes are those a pass must move: bytes of the images, prediction and gradient. The peers are given the noise and
the clean patches, which a trainer without recomputation stores: they draw nothing here, and still read more.
"""

import peers
import pytest
import torch

import maskdiff_kernels as mk

BATCH, GRID, PATCH, CHANNELS, IMAGES = 64, (16, 16), 4, 3, 512
SIZE, PATCHES = PATCH * PATCH * CHANNELS, GRID[0] * GRID[1]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
VISIBLE = {"whole": 256, "tenth": 26}
TARGETS = ("eps", "v", "x0")
CASES = {
    f"{share}-{dtype}-{target}": ("cpp", "reference", "torch", "torch_compiled")
    for share in VISIBLE
    for dtype in DTYPES
    for target in TARGETS
}


def build(case: str, device="cpu"):
    share, name, target, how = case.split("-")
    dtype, visible = DTYPES[name], VISIBLE[share]
    generator = torch.Generator().manual_seed(0)
    patches = torch.randint(0, 256, (IMAGES, PATCHES, SIZE), dtype=torch.uint8, generator=generator).to(device)
    store, seed = mk.Store(patches, GRID, PATCH), torch.tensor([1], device=device)
    table = torch.rand(1000, 2, generator=generator).to(device)
    mask = mk.Mask("patch", counts=(visible,))
    batch = mk.draw_batch(seed, torch.arange(BATCH, device=device), IMAGES, GRID, mask, flip=0.5)
    prediction, eps = (torch.randn(BATCH, visible, SIZE, generator=generator).to(device) for _ in range(2))
    prediction, x0 = prediction.to(dtype).requires_grad_(), mk.noisy_patches(store, batch, None, seed)
    alpha, sigma = table[batch.timestep][:, :, None, None].unbind(1)

    def loss_of(prediction):
        wanted = {"eps": eps, "x0": x0}[target] if target != "v" else alpha * eps - sigma * x0
        return (prediction.float() - wanted).square().flatten(1).mean(1).mean()

    if how.startswith("torch"):
        forward = peers.compiled(loss_of) if how == "torch_compiled" else loss_of

    def ours():
        loss, _ = mk.denoising_loss(prediction, store, batch, table, seed, target, backend=how)
        return loss.detach(), *torch.autograd.grad(loss, prediction)

    work = BATCH * visible * SIZE * ((target != "eps") + 2 * dtype.itemsize)
    if how.startswith("torch"):
        return lambda: torch.autograd.grad(forward(prediction), prediction), work, "bytes"
    return ours, work, "bytes"


@pytest.mark.parametrize("case", CASES)
def test_denoising_loss(in_turns, case):
    in_turns(build, case, CASES[case])
