"""The U-ViT that maskdiff trains: patches in, patches out, on the visible ones alone or on the whole image."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import whole_block
from .errors import UserError
from .layers import attention, branch, gelu, join, layer_norm, sincos_table, timestep_embedding
from .ragged import Packing


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a UViT. Raises UserError where the parts do not fit together."""

    image_size: int = 32
    """side of the images in pixels; they are square"""
    channels: int = 3
    """colour channels of the images"""
    patch: int = 4
    """side of a patch in pixels"""
    width: int = 128
    """channels of a token, D; a multiple of 4 and of heads"""
    blocks: int = 5
    """transformer blocks, an odd number: half in, one in the middle, half out"""
    heads: int = 2
    """attention heads; the op attention takes heads of 32, 64 or 128 channels, PyTorch's own any"""
    mlp_ratio: float = 4.0
    """width inside a block's MLP over width"""
    qkv_bias: bool = False
    """gives queries and values a bias"""
    time_mlp: bool = False
    """puts a two-layer MLP on the time token"""
    classes: tuple[int, ...] = ()
    """number of values of each label attribute, none: unlabelled; training sets it by the data (data.labels)"""
    position: str = "learned"
    """learned: a table tells the model where each patch lies; none: nothing does"""
    init: str = "fan-in"
    """initial weights: fan-in, or authors for those of MaskDM's code"""

    def __post_init__(self) -> None:
        for name in ("image_size", "channels", "patch", "width", "blocks", "heads"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name} must be at least 1, got {getattr(self, name)}")
        if self.image_size % self.patch:
            raise UserError(
                f"images of {self.image_size} pixels cannot be cut into patches of {self.patch}: "
                f"choose a patch size that divides {self.image_size}"
            )
        if self.blocks % 2 == 0:
            raise UserError(f"model.blocks must be odd (half in, one in the middle, half out), got {self.blocks}")
        if self.width % self.heads or self.width % 4:
            raise UserError(f"model.width must be divisible by 4 and by heads = {self.heads}, got {self.width}")
        if self.position not in ("learned", "none"):
            raise UserError(f"model.position must be 'learned' or 'none', got {self.position!r}")
        if self.init not in ("fan-in", "authors"):
            raise UserError(f"model.init must be 'fan-in' or 'authors', got {self.init!r}")
        if any(count < 1 for count in self.classes):
            raise UserError(f"model.classes must count at least one value per attribute, got {self.classes}")

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across."""
        return (self.image_size // self.patch,) * 2

    @property
    def patches(self) -> int:
        """n, the patches of an image."""
        return (self.image_size // self.patch) ** 2

    @property
    def patch_dim(self) -> int:
        """P * P * C, the values of a patch."""
        return self.patch * self.patch * self.channels

    @property
    def extras(self) -> int:
        """Tokens before the patches: the label's (where there are labels), then the time's."""
        return 2 if self.classes else 1

    @property
    def hidden(self) -> int:
        """Width inside the MLP."""
        return round(self.width * self.mlp_ratio)


SIZES: dict[str, dict[str, int]] = {
    "nano": {"width": 96, "blocks": 5, "heads": 3},
    "tiny": {"width": 128, "blocks": 5, "heads": 2},
    "mini": {"width": 256, "blocks": 7, "heads": 4},
    "small": {"width": 512, "blocks": 13, "heads": 8},
    "base": {"width": 768, "blocks": 13, "heads": 12},
    "large": {"width": 1024, "blocks": 17, "heads": 16},
}


def patchify(
    images: Tensor,  # [B, C, H, W]
    patch: int,
) -> Tensor:  # [B, n, P * P * C], values in the order (row, column, channel)
    """Cuts images into patches, row by row."""
    batch, channels, height, width = images.shape
    cut = images.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, patch * patch * channels)


def unpatchify(
    patches: Tensor,  # [B, n, P * P * C]
    patch: int,
    grid: tuple[int, int],  # patches down, across
) -> Tensor:  # [B, C, H, W]
    """Puts patches together again: the inverse of patchify."""
    batch = patches.shape[0]
    down, across = grid
    cut = patches.reshape(batch, down, across, patch, patch, -1)
    return cut.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, down * patch, across * patch)


class Block(nn.Module):
    """A pre-norm transformer block, with a long skip connection in front where `skip`."""

    def __init__(self, config: ModelConfig, skip: bool):
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.skip = nn.Linear(2 * width, width) if skip else None
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=config.qkv_bias)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, config.hidden)
        self.fc2 = nn.Linear(config.hidden, width)

    def forward(
        self,
        x: Tensor,  # [T, D], the tokens of all sequences
        lengths: tuple[int, ...],  # (B, L), or (T,) with the two below
        cu_seqlens: Tensor | None = None,  # [B + 1] int32
        max_seqlen: int | None = None,
        skip: Tensor | None = None,  # [T, D]
    ) -> Tensor:  # [T, D]
        if whole_block.takes(self, x):
            return whole_block.run(self, x, lengths, cu_seqlens, max_seqlen, skip)
        if self.skip is not None and skip is not None:
            x = self.skip(torch.cat([x, skip], dim=1))
        normed, stream = branch(x, self.norm1, self.proj)
        qkv = self.qkv(normed)
        mixed = attention(qkv.view(*lengths, 3, self.heads, x.shape[1] // self.heads), cu_seqlens, max_seqlen)
        x = join(stream, mixed.view_as(x), self.proj)
        normed, stream = branch(x, self.norm2, self.fc2)
        return join(stream, gelu(self.fc1(normed)), self.fc2)


class UViT(nn.Module):
    """U-ViT (Bao et al., arXiv 2209.12152) as MaskDM uses it (arXiv 2306.11363): masked patches are simply absent.

    Tokens are [label, time, patches...]; `position` has a row for each. In a model without positions it has none for
    patches, which are then a set: in another order they get the same predictions. Weights and biases of Linear layers
    may be of another dtype (bf16) than the rest: activations run in theirs; norm weights, position and label tables
    stay fp32.
    """

    label_first: Tensor  # [A] each attribute's first row in the label table
    recompute = False  # True: of each block its input alone is kept for the backward pass, which computes it again

    def __init__(self, config: ModelConfig):
        super().__init__()
        width = config.width
        self.config = config
        self.patch_embed = nn.Linear(config.patch_dim, width)
        self.time_embed = (
            nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))
            if config.time_mlp
            else None
        )
        placed = config.patches if config.position == "learned" else 0
        self.position = nn.Parameter(torch.empty(config.extras + placed, width))
        if config.classes:
            self.label_table = nn.Parameter(torch.empty(sum(config.classes), width))
            self.unconditional = nn.Parameter(torch.empty(width))
            # On the CPU by name: weights are loaded into a model that was built on the meta device.
            first = torch.tensor([sum(config.classes[:a]) for a in range(len(config.classes))], device="cpu")
            self.register_buffer("label_first", first, persistent=False)
        half = config.blocks // 2
        self.blocks = nn.ModuleList(Block(config, skip=index > half) for index in range(config.blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, config.patch_dim)
        self.reset_parameters()

    def forward(
        self,
        x: Tensor,  # [B, K, P * P * C] noisy patches, any float dtype; ragged: [M, P * P * C]
        timestep: Tensor,  # [B] integer or float, in [0, T)
        label: Tensor | None = None,  # [B, A] integer; -1 = missing, all missing = unconditional, as is None
        keep_ids: Tensor | None = None,  # [B, K] which patch each is; None: all n of them, in order; ragged: [M]
        cu_patches: Tensor | None = None,  # ragged: [B + 1] int32, sample b owns patches cu[b]:cu[b + 1] of x
        most: int | None = None,  # ragged: the most patches that a sample has, or more
    ) -> Tensor:  # [B, K, P * P * C] in x's dtype; ragged: [M, P * P * C]
        """Predicts eps, x0 or v (whatever it was trained for) of the visible patches.

        Samples of different lengths stand one after another, with no padding: they attend within themselves alone.
        """
        config = self.config
        batch, count = len(timestep), x.shape[-2]
        if keep_ids is None and count != config.patches:
            raise ValueError(f"x has {count} patches, an image {config.patches}: pass keep_ids for a part of them")
        if (cu_patches is None) != (x.dim() == 3) or (cu_patches is None) != (most is None):
            raise ValueError("x is [B, K, P * P * C], or [M, P * P * C] beside keep_ids [M], cu_patches and most")
        extra_rows, patch_rows = self.position.tensor_split([config.extras])
        dtype = self.head.weight.dtype
        patches = self.patch_embed(x.to(dtype))
        if config.position == "learned":  # with bf16 products the fp32 rows make these sums fp32
            rows = patch_rows if keep_ids is None else F.embedding(keep_ids, patch_rows)  # its backward: deterministic
            patches = patches + rows
        time = timestep_embedding(timestep, config.width)
        if self.time_embed is not None:
            time = self.time_embed(time.to(dtype))
        extras = [time + extra_rows[-1]]  # [B, D] each
        if config.classes:
            extras.insert(0, self.embed_label(label, batch) + extra_rows[0])
        elif label is not None:
            raise UserError("this model was made without labels: leave the labels out")
        if cu_patches is None or most is None:
            stream = torch.cat([*(extra[:, None] for extra in extras), patches], dim=1)
            out = self.transform(stream.to(dtype).view(-1, config.width), (batch, -1))
            visible = out.view(batch, -1, config.patch_dim)[:, config.extras :]
        else:
            packing = Packing(cu_patches, count, config.extras)
            stream = packing.pack(extras, patches).to(dtype)
            out = self.transform(stream, (len(stream),), packing.cu_seqlens, most + config.extras)
            visible = packing.patches(out, count)
        return visible.to(x.dtype).contiguous()

    def compile_blocks(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """Has torch.compile make kernels of each block: LayerNorm, GELU, sums fused; products and attention as before.

        Blocks alike share one compiled form, and the number of tokens is a variable in it: a new mask rate, batch or
        stage compiles nothing. Rounding may differ by what fusing saves.
        """
        for block in self.blocks:
            block.compile(backend=backend, dynamic=True)

    def transform(
        self,
        stream: Tensor,  # [T, D]
        lengths: tuple[int, ...],  # (B, L), or (T,) with the two below
        cu_seqlens: Tensor | None = None,  # [B + 1] int32
        max_seqlen: int | None = None,
    ) -> Tensor:  # [T, P * P * C]
        """The blocks and the head, token by token."""
        skips: list[Tensor] = []
        half = self.config.blocks // 2
        for index, block in enumerate(self.blocks):
            layer: Callable[..., Tensor] = block
            if self.recompute and torch.is_grad_enabled():  # nothing in a block is random
                layer = partial(checkpoint, block, use_reentrant=False, preserve_rng_state=False)
            stream = layer(stream, lengths, cu_seqlens, max_seqlen, skips.pop() if index > half else None)
            if index < half:
                skips.append(stream)
        return self.head(layer_norm(stream, self.norm))

    def embed_label(
        self,
        label: Tensor | None,  # [B, A] integer, -1 = missing
        batch: int,
    ) -> Tensor:  # [B, D] float32
        """The sum of the embeddings of the attributes that are there; the unconditional one where none is."""
        if label is None:
            return self.unconditional.expand(batch, -1)
        if label.dim() != 2 or label.shape[1] != len(self.config.classes):
            raise ValueError(f"labels must be [B, {len(self.config.classes)}], got {list(label.shape)}")
        there = label >= 0
        each = F.embedding(label.clamp(min=0).long() + self.label_first, self.label_table)
        summed = (each * there[..., None]).sum(1)
        return torch.where(there.any(1, keepdim=True), summed, self.unconditional)

    def predict(
        self,
        x_t: Tensor,  # [B, C, H, W] noisy images in [-1, 1] units
        t: Tensor,  # [B] integer or float, in [0, T)
        labels: Tensor | None = None,  # [B, A], or [B] with one attribute; -1 = missing
        keep_ids: Tensor | None = None,  # [B, K] visible patches
    ) -> Tensor:  # [B, C, H, W]; with keep_ids [B, K, P * P * C]
        """The model on images: predicts for the whole of each, or for its visible patches alone.

        Raises ValueError for labels that it does not have; on a GPU that check would wait for the device and is left
        out.
        """
        config = self.config
        expected = (config.channels, config.image_size, config.image_size)
        if x_t.dim() != 4 or tuple(x_t.shape[1:]) != expected:
            raise ValueError(f"x_t must be [B, {', '.join(map(str, expected))}], got {list(x_t.shape)}")
        if labels is not None and labels.dim() == 1:
            labels = labels[:, None]
        if labels is not None and labels.device.type == "cpu":
            check_labels(labels, config.classes)
        patches = patchify(x_t, config.patch)
        if keep_ids is None:
            return unpatchify(self(patches, t, labels), config.patch, config.grid)
        visible = patches.gather(1, keep_ids.long()[..., None].expand(-1, -1, config.patch_dim))
        return self(visible, t, labels, keep_ids)

    def resized(self, image_size: int) -> "UViT":
        """A copy for square images of another size: a table of positions is interpolated (bicubic, as ViTs do it).

        Raises UserError for a size that is no multiple of the patch.
        """
        patch = self.config.patch
        if image_size < patch or image_size % patch:
            near = max(1, round(image_size / patch)) * patch
            raise UserError(f"images of {image_size} pixels are no whole number of patches of {patch}: {near} would be")
        model = copy.deepcopy(self)
        model.config = replace(self.config, image_size=image_size)
        if self.config.position == "none":
            return model
        extra_rows, rows = self.position.detach().split([self.config.extras, self.config.patches])
        table = rows.t().reshape(1, -1, *self.config.grid)
        table = F.interpolate(table, model.config.grid, mode="bicubic", align_corners=False)
        model.position = nn.Parameter(torch.cat([extra_rows, table.flatten(2)[0].t()]))
        return model

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Starts the weights anew from torch's global generator.

        "authors": truncated normal of 0.02 everywhere, as MaskDM. "fan-in": variance-preserving products, residual
        branches started at 0.3 and the head at 0.1 of that, positions at 2-D sine-cosine: in short runs this reaches a
        tenth less held-out loss.
        """
        fan_in = self.config.init == "fan-in"
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                std = 0.02
                if fan_in:
                    std = module.in_features**-0.5
                    std *= 0.3 if name.endswith((".proj", ".fc2")) else 0.1 if name == "head" else 1.0
                nn.init.trunc_normal_(module.weight, std=std)  # cut at +-2, as theirs: in effect a normal
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        nn.init.trunc_normal_(self.position, std=0.02)
        if fan_in and self.config.position == "learned":
            self.position[self.config.extras :] = sincos_table(*self.config.grid, self.config.width)
        if self.config.classes:
            # The label token starts as large as the time token, whose sinusoids have a mean square of 1/2.
            nn.init.normal_(self.label_table, std=(2 * len(self.config.classes)) ** -0.5 if fan_in else 1.0)
            nn.init.trunc_normal_(self.unconditional, std=0.02)


def check_labels(
    labels: Tensor,  # [B, A] integer, on the CPU
    classes: tuple[int, ...],
) -> None:
    """Raises UserError, a ValueError, for a label that an attribute does not have."""
    for attribute, (column, values) in enumerate(zip(labels.unbind(1), classes, strict=False)):
        if wrong := column[(column < -1) | (column >= values)].tolist():
            raise UserError(f"label {wrong[0]} of attribute {attribute}: it takes 0 to {values - 1}, or -1 for missing")


def cast_products(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts weights and biases of Linear layers in place, for sampling in bf16; norms and tables stay as they are."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.to(dtype)
