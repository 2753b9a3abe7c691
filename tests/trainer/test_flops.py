"""Counted FLOPs against those that PyTorch counts of a real step."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import maskdiff_kernels
from maskdiff import flops
from maskdiff.model import SIZES, ModelConfig, UViT

CONFIGS = [
    ModelConfig(image_size=32, width=64, blocks=5, heads=2),
    ModelConfig(image_size=16, channels=1, patch=2, width=32, blocks=3, heads=1, classes=(4, 2), time_mlp=True),
    ModelConfig(image_size=16, width=128, blocks=1, heads=2, mlp_ratio=2.0),
]


def product_flops(total, left, right, out_shape=None, **_):
    return 2 * math.prod(left) * right[-1]


COUNTED = {torch.ops.aten.addmm_: product_flops, **maskdiff_kernels.FLOPS}  # PyTorch's counter knows neither


@pytest.mark.parametrize("visible", [None, 15])
@pytest.mark.parametrize("config", CONFIGS)
def test_equals_what_pytorch_counts(config, visible):
    model, batch, count = UViT(config), 2, visible or config.patches
    ids = torch.arange(count).expand(batch, -1) if visible else None
    x, t = torch.randn(batch, count, config.patch_dim), torch.zeros(batch)
    label = torch.zeros(batch, len(config.classes), dtype=torch.int64) if config.classes else None
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        out = model(x, t, label, ids)
    parts = flops.forward_parts(config, count)
    assert counter.get_total_flops() == batch * sum(parts.values())
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        out.sum().backward()
    # What is not differentiated: the noisy patches and, with an MLP on it, the sinusoids of the time.
    unneeded = parts["embed"] + (parts["time"] / 2)
    again = parts["attention"] / 2  # attention's backward makes the scores a second time
    assert counter.get_total_flops() == batch * (2 * sum(parts.values()) - unneeded + again)
    assert flops.step_flops(config, [count]) == 3 * sum(parts.values())


@pytest.mark.parametrize("config", CONFIGS)
def test_equals_what_pytorch_counts_of_samples_of_different_lengths(config):
    if config.width // config.heads not in maskdiff_kernels.ATTENTION_WIDTHS:
        pytest.skip("heads of other widths are padded")
    model, counts = UViT(config), (1, 9, 15, 4)
    ids = torch.cat([torch.arange(count) for count in counts])
    x, cu_patches = torch.randn(29, config.patch_dim), torch.tensor([0, *counts]).cumsum(0).int()
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        model(x, torch.zeros(4), None, ids, cu_patches, 15)
    assert 3 * counter.get_total_flops() == 4 * flops.step_flops(config, counts)


def test_figures_of_the_published_sizes():
    """GFLOP of a forward and the ratio at 90 % masked, worked out by hand for the small and the base model."""
    small = ModelConfig(image_size=64, **SIZES["small"])
    base = ModelConfig(image_size=256, **SIZES["base"])
    assert flops.step_flops(small, [256]) / 3e9 == pytest.approx(24.4, abs=0.05)
    assert flops.step_flops(base, [4096]) / 3e9 == pytest.approx(1483, abs=0.5)
    assert flops.ideal(small, [26]) == pytest.approx(10.2, abs=0.05)
    assert flops.ideal(small, [256]) == 1.0
