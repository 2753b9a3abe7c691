"""Counted floating-point operations of a training step: the yardstick that speed-ups are held against.

Only matrix products count, 2 per multiply-add, attention's among them; a training step is three forwards (backward
takes two products for each of the forward's). Products that need no gradient of their input (the patch embedding's) are
counted as if they did: the same for every mask rate.
"""

from collections.abc import Sequence

from .model import ModelConfig


def forward_parts(
    config: ModelConfig,
    visible: int,  # K, patches that the image shows
) -> dict[str, float]:
    """FLOPs of one image's forward by part."""
    width, length = config.width, visible + config.extras
    linear = 2.0 * length * width * width
    half = config.blocks // 2
    return {
        "embed": 2.0 * visible * config.patch_dim * width,
        "time": 2.0 * 8 * width * width if config.time_mlp else 0.0,
        "qkv": config.blocks * 3 * linear,
        "attention": config.blocks * 4.0 * length * length * width,
        "proj": config.blocks * linear,
        "mlp": config.blocks * 4.0 * length * width * config.hidden,
        "skip": half * 2 * linear,
        "head": 2.0 * length * width * config.patch_dim,
    }


def step_flops(
    config: ModelConfig,
    counts: Sequence[int],  # patches that the images of a group show: one number where all show as many
) -> float:
    """FLOPs of a training step, forward and backward, for each image of the batch: the mean over a group.

    Attention grows with the square of the length, so a range of rates takes more than its mean rate.
    """
    return 3.0 * sum(sum(forward_parts(config, count).values()) for count in counts) / len(counts)


def ideal(config: ModelConfig, counts: Sequence[int]) -> float:
    """How many times faster than the dense step one with such counts would be, did time follow FLOPs."""
    return step_flops(config, [config.patches]) / step_flops(config, counts)
