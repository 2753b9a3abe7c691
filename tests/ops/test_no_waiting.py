"""The references read nothing back from a device, nor copy anything to it that it would have to wait for.

They run on tensors without values: whatever needs one, as the length of a result does, is an error there.
"""

from collections.abc import Callable

import pytest
import torch
from watching import NoWaiting

import maskdiff_kernels as mk
from maskdiff_kernels.ops.adamw_ema import fused
from maskdiff_kernels.ops.adamw_ema import reference as adamw
from maskdiff_kernels.ops.adamw_ema.state import Update
from maskdiff_kernels.ops.attention import explicit, sdpa
from maskdiff_kernels.ops.attention import reference as attention
from maskdiff_kernels.ops.denoising_loss import reference as loss
from maskdiff_kernels.ops.draw_batch import reference as draw
from maskdiff_kernels.ops.gelu import reference as gelu
from maskdiff_kernels.ops.layer_norm import reference as layer_norm
from maskdiff_kernels.ops.noisy_patches import reference as noisy
from maskdiff_kernels.ops.samples import Samples

DEVICE = torch.device("meta")
GRID = (4, 6)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """Python's numbers do not become tensors by torch.tensor, which copies them and waits. Values are not there."""

    def refused(*arguments: object, **named: object) -> None:
        raise AssertionError("torch.tensor makes the host wait for the device")

    monkeypatch.setattr(torch, "tensor", refused)
    monkeypatch.setattr(torch, "as_tensor", refused)
    with NoWaiting(), DEVICE:
        yield


def samples(ragged: bool, slots: bool = False, noise: bool = True) -> Samples:
    kept, batch = (30,) if ragged else (5, 6), 5
    return Samples(
        torch.empty(7, 24, 48, dtype=torch.uint8),
        GRID,
        4,
        torch.empty(30, dtype=torch.int32) if slots else None,
        torch.empty(batch, dtype=torch.int64),
        torch.empty(batch, dtype=torch.int64),
        torch.empty(kept, dtype=torch.int32),
        torch.empty(batch + 1, dtype=torch.int32) if ragged else None,
        torch.empty(batch, dtype=torch.bool),
        torch.empty(batch, dtype=torch.int64),
        torch.empty(50, 2) if noise else None,
        torch.empty(1, dtype=torch.int64),
    )


def test_what_waits_is_noticed():
    x = torch.empty(3, dtype=torch.int64)
    for waits in (
        lambda: bool((x > 0).all()),
        lambda: x.tolist(),
        lambda: x[x > 0],
        lambda: torch.bincount(x),
        lambda: x.repeat_interleave(x),
        lambda: torch.tensor([1, 2]),
        lambda: torch.ones(3, device="cpu").to(DEVICE),
        lambda: x.copy_(torch.ones(3, device="cpu")),
    ):
        with pytest.raises((RuntimeError, NotImplementedError, AssertionError)):
            waits()


MASKS = [
    (11, mk.Mask("dense", counts=(24,))),
    (9, mk.Mask("patch", counts=(6,))),
    (11, mk.Mask("block", 2, (4, 8))),
    (9, mk.Mask("crop", counts=(4, 16))),
]  # 9: all that an order's walk meets are in range


@pytest.mark.parametrize(("images", "mask"), MASKS, ids=lambda value: getattr(value, "kind", ""))
def test_draw_batch(images: int, mask: mk.Mask):
    seed, n, ids = (torch.empty(count, dtype=torch.int64) for count in (1, 4, images))
    arguments = (seed, n, ids, images, GRID, mask.kind, mask.size, mask.counts, 50, 2**31, 2**31)
    image_ids, keep_ids, *_ = draw.run(draw.Draw(*arguments))
    assert image_ids.device == DEVICE and keep_ids.numel() == 4 // len(mask.counts) * sum(mask.counts)


@pytest.mark.parametrize("ragged", [False, True])
def test_noisy_patches(ragged: bool):
    for slots, noise in ((False, True), (True, False)):
        assert noisy.run(samples(ragged, slots, noise), torch.bfloat16).device == DEVICE


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("target", ["eps", "x0", "v"])
def test_denoising_loss(ragged: bool, target: str):
    given = samples(ragged)
    prediction = torch.empty(*given.keep_ids.shape, 48)
    for weight, needs_grad in ((None, False), (torch.empty(50), True)):
        mean, per_sample, error = loss.run(prediction, given, target, weight, needs_grad)
    assert loss.run_backward(error, given.cu_patches, mean, per_sample).shape == prediction.shape


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("module", [attention, sdpa, explicit], ids=lambda module: module.__name__.split(".")[-1])
def test_attention(ragged: bool, module):
    qkv = torch.empty((12, 3, 2, 32) if ragged else (3, 4, 3, 2, 32))
    sequences = (torch.empty(4, dtype=torch.int32), 9, 0.5) if ragged else (None, None, 0.5)
    out, lse = module.run(qkv, *sequences)
    assert module.run_backward(out, qkv, out, lse, *sequences).shape == qkv.shape


def test_gelu():
    x = torch.empty(5, 7)
    assert gelu.run(x).shape == x.shape and gelu.run_backward(x, x, True)[1].shape == x.shape[1:]


def test_layer_norm():
    x, weight = torch.empty(5, 7, dtype=torch.bfloat16), torch.empty(7)
    out, summed = layer_norm.run(x, weight, weight, x[0], 1e-5)
    assert out.shape == summed.shape == x.shape and out.dtype == x.dtype


@pytest.mark.parametrize("run", [pytest.param(adamw.run, id="reference"), pytest.param(fused.run, id="torch")])
def test_adamw_ema(monkeypatch, run: Callable):
    monkeypatch.setattr(torch, "_fused_adamw_", lambda *_, **__: None)  # PyTorch's own affair; needs values
    flats = [torch.empty(20) for _ in range(5)]
    low, counts, grads = torch.empty(8, dtype=torch.bfloat16), [torch.empty(()) for _ in range(2)], [12, 8]
    layout = ([0, 12], [12, 8], [True, False], [torch.empty(count) for count in grads])
    run(Update(*flats, low, *counts, *layout, torch.empty(2), 0.9, 0.99, 1e-8, 0.1, 0.999, 0.99, -1, 6.9, 3))
