"""maskdiff_kernels: the compute ops of maskdiff. Knows nothing of training.

`draw_batch` says what a batch of samples shows, `noisy_patches` makes the model's input of it, `attention` mixes its
tokens, `denoising_loss` scores the model's output. Each has a plain PyTorch twin and compiled kernels; `backends` tells
which can run here.
"""

from maskdiff_kernels import philox
from maskdiff_kernels.dispatch import backends, chosen
from maskdiff_kernels.library import LibraryError, cpu_level, source_version
from maskdiff_kernels.ops.attention.op import WIDTHS as ATTENTION_WIDTHS
from maskdiff_kernels.ops.attention.op import attention
from maskdiff_kernels.ops.denoising_loss.op import denoising_loss
from maskdiff_kernels.ops.draw_batch.op import Batch, Mask, draw_batch
from maskdiff_kernels.ops.noisy_patches.op import noisy_patches
from maskdiff_kernels.ops.samples import Store

__all__ = [
    "ATTENTION_WIDTHS",
    "Batch",
    "LibraryError",
    "Mask",
    "Store",
    "attention",
    "backends",
    "chosen",
    "cpu_level",
    "denoising_loss",
    "draw_batch",
    "noisy_patches",
    "philox",
    "source_version",
]
