"""maskdiff_kernels: the compute ops of maskdiff. Knows nothing of training.

`draw_batch` says what a batch of samples shows, `noisy_patches` makes the model's input of it, `layer_norm` normalises
its tokens, `attention` mixes them, `gelu` is the activation between its products, `denoising_loss` scores the model's
output, `adamw_ema` updates the weights. Each has a plain PyTorch twin and compiled kernels; `backends` tells which can
run here, `using` has others run than would be chosen.
"""

from maskdiff_kernels import philox
from maskdiff_kernels.dispatch import backends, chosen, using
from maskdiff_kernels.library import LibraryError, cpu_level, source_version
from maskdiff_kernels.ops.adamw_ema.averages import PowerEma
from maskdiff_kernels.ops.adamw_ema.op import adamw_ema
from maskdiff_kernels.ops.adamw_ema.state import AdamState
from maskdiff_kernels.ops.attention.flops import FLOPS
from maskdiff_kernels.ops.attention.op import WIDTHS as ATTENTION_WIDTHS
from maskdiff_kernels.ops.attention.op import attention
from maskdiff_kernels.ops.denoising_loss.op import denoising_loss
from maskdiff_kernels.ops.draw_batch.op import Batch, Mask, draw_batch
from maskdiff_kernels.ops.gather import gather_patches
from maskdiff_kernels.ops.gelu.op import gelu
from maskdiff_kernels.ops.layer_norm.op import layer_norm
from maskdiff_kernels.ops.noisy_patches.op import noisy_patches
from maskdiff_kernels.ops.samples import Store

__all__ = [
    "ATTENTION_WIDTHS",
    "FLOPS",
    "AdamState",
    "Batch",
    "LibraryError",
    "Mask",
    "PowerEma",
    "Store",
    "adamw_ema",
    "attention",
    "backends",
    "chosen",
    "cpu_level",
    "denoising_loss",
    "draw_batch",
    "gather_patches",
    "gelu",
    "layer_norm",
    "noisy_patches",
    "philox",
    "source_version",
    "using",
]
