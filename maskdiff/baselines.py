"""Two yardsticks for our training step, in plain PyTorch without any maskdiff kernel, and the plain U-ViT they train.

PlainUViT is written apart from maskdiff.model on purpose: tests hold one against the other.
"""

import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .diffusion import Diffusion, DiffusionConfig
from .model import ModelConfig

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v [B, H, L, d] -> [B, H, L, d]


def explicit_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return scores.softmax(dim=-1) @ v


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


class PlainBlock(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int, qkv_bias: bool, with_skip: bool, attend: Attend):
        super().__init__()
        self.heads = heads
        self.attend = attend
        if with_skip:
            self.skip = nn.Linear(width * 2, width)
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, width * 3, bias=qkv_bias)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if skip is not None:
            x = self.skip(torch.cat((x, skip), dim=-1))
        b, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(b, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        x = x + self.proj(self.attend(q, k, v).transpose(1, 2).reshape(b, length, width))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class PlainUViT(nn.Module):
    """U-ViT as a paper's reader would write it. Parameter names and shapes equal maskdiff.model.UViT's."""

    def __init__(self, config: ModelConfig, attend: Attend = explicit_attention):
        super().__init__()
        self.config = config
        width, side = config.width, config.image_size // config.patch
        rows = (2 if config.classes else 1) + (side * side if config.position == "learned" else 0)
        self.position = nn.Parameter(torch.randn(rows, width) * 0.02)
        if config.classes:
            self.label_table = nn.Parameter(torch.randn(sum(config.classes), width))
            self.unconditional = nn.Parameter(torch.randn(width) * 0.02)
        self.patch_embed = nn.Linear(config.patch * config.patch * config.channels, width)
        if config.time_mlp:
            self.time_embed = nn.Sequential(nn.Linear(width, width * 4), nn.SiLU(), nn.Linear(width * 4, width))
        middle = config.blocks // 2
        self.blocks = nn.ModuleList(
            PlainBlock(width, config.heads, int(width * config.mlp_ratio), config.qkv_bias, i > middle, attend)
            for i in range(config.blocks)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, config.patch * config.patch * config.channels)

    def special_tokens(self, t: Tensor, label: Tensor | None) -> Tensor:
        half = self.config.width // 2
        frequencies = torch.exp(-np.log(10000.0) * torch.arange(0, half, dtype=torch.float32) / half).to(t.device)
        phase = t.float().unsqueeze(1) * frequencies.unsqueeze(0)
        time_token = torch.cat((torch.cos(phase), torch.sin(phase)), dim=-1).to(self.position.dtype)
        if self.config.time_mlp:
            time_token = self.time_embed(time_token)
        if not self.config.classes:
            return time_token.unsqueeze(1)
        rows = []
        for i in range(len(t)):
            row, found, start = torch.zeros_like(self.unconditional), False, 0
            for attribute, count in enumerate(self.config.classes):
                value = -1 if label is None else int(label[i, attribute])
                if value >= 0:
                    row, found = row + self.label_table[start + value], True
                start += count
            rows.append(row if found else self.unconditional)
        return torch.stack((torch.stack(rows), time_token), dim=1)

    def transform(self, x: Tensor) -> Tensor:
        stack: list[Tensor] = []
        middle = self.config.blocks // 2
        for i, block in enumerate(self.blocks):
            x = block(x, stack.pop()) if i > middle else block(x)
            if i < middle:
                stack.append(x)
        return self.head(self.norm(x))

    def forward_visible(self, patches: Tensor, t: Tensor, ids: Tensor | None, label: Tensor | None = None) -> Tensor:
        """Gathered before embedding: patches [B, K, P*P*C], ids [B, K] (None = all) -> [B, K, P*P*C]."""
        special = self.special_tokens(t, label)
        count = special.shape[1]
        position = self.position[count:]
        x = self.patch_embed(patches)
        if self.config.position == "learned":
            x = x + (position if ids is None else F.embedding(ids, position))
        return self.transform(torch.cat((special + self.position[:count], x), dim=1))[:, count:]

    def forward_image(self, image: Tensor, t: Tensor, hidden: Tensor | None, label: Tensor | None = None) -> Tensor:
        """As published: embed the whole image by convolution, then drop hidden tokens by boolean indexing.

        image [B, C, H, W], hidden [B, extras + n] bool or None -> [B, K, P*P*C].
        """
        patch, channels = self.config.patch, self.config.channels
        kernel = self.patch_embed.weight.reshape(-1, patch, patch, channels).permute(0, 3, 1, 2)
        x = F.conv2d(image, kernel, self.patch_embed.bias, stride=patch).flatten(2).transpose(1, 2)
        special = self.special_tokens(t, label)
        if self.config.position == "learned":
            x = torch.cat((special, x), dim=1) + self.position
        else:
            x = torch.cat((special + self.position, x), dim=1)
        if hidden is not None:
            x = x[~hidden].reshape(len(x), -1, x.shape[-1])
        return self.transform(x)[:, special.shape[1] :]


def _patches(images: Tensor, patch: int) -> Tensor:  # [B, C, H, W] -> [B, n, P*P*C]
    b, c, h, w = images.shape
    grid = images.view(b, c, h // patch, patch, w // patch, patch).permute(0, 2, 4, 3, 5, 1)
    return grid.reshape(b, (h // patch) * (w // patch), patch * patch * c)


class StrongBaseline:
    """The best plain PyTorch we know: visible patches gathered before anything is computed on them.

    bf16 by autocast or fp32, the faster of SDPA and explicit attention at this length, fused AdamW, foreach EMA, random
    numbers drawn in the loop, no wait for the device; torch.compile on request.
    """

    def __init__(
        self,
        config: ModelConfig,
        images: Tensor,  # [N, C, H, W] uint8
        mask_rate: float,  # of the patches, drawn per image; 0 = dense
        batch: int,
        precision: str = "fp32",  # or "bf16"
        compile: bool = False,
        diffusion: DiffusionConfig | None = None,
        lr: float = 2e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.01,
        ema: float = 0.999,
        clip: float | None = None,
    ):
        self.images, self.batch, self.precision, self.ema, self.clip = images, batch, precision, ema, clip
        self.patch = config.patch
        self.device = images.device
        self.visible = config.patches - int(mask_rate * config.patches)
        self.dense = self.visible == config.patches
        self.diffusion = Diffusion(diffusion or DiffusionConfig("linear")).to(self.device)
        self.attention = self._faster_attention(config)
        attend = sdpa_attention if self.attention == "sdpa" else explicit_attention
        self.model = PlainUViT(config, attend).to(self.device)
        self.forward = (
            torch.compile(self.model.forward_visible, dynamic=False) if compile else self.model.forward_visible
        )
        self.parameters: list[Tensor] = list(self.model.parameters())
        self.averages = [parameter.detach().clone() for parameter in self.parameters]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=lr,
            betas=betas,
            weight_decay=weight_decay,
            fused=True,
            capturable=self.device.type == "cuda",  # so that the whole step can be a CUDA graph
        )

    def step(self) -> Tensor:
        """One training step; returns the loss, a scalar tensor that nothing waited for."""
        index = torch.randint(len(self.images), (self.batch,), device=self.device)
        x0 = _patches(self.images[index], self.patch)
        ids = None
        if not self.dense:
            order = torch.rand(x0.shape[:2], device=self.device).argsort(dim=1)
            ids = order[:, : self.visible].contiguous()
            x0 = x0.gather(1, ids[..., None].expand(-1, -1, x0.shape[2]))
        x0 = x0.float() * (2 / 255) - 1
        t = torch.randint(self.diffusion.config.timesteps, (self.batch,), device=self.device)
        noise = torch.randn_like(x0)
        alpha, sigma = self.diffusion.alpha_sigma[t].view(-1, 2, 1, 1).unbind(1)
        x_t = alpha * x0 + sigma * noise
        target = self.diffusion.to_target(x0, noise, t)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            prediction = self.forward(x_t, t, ids)
        loss = F.mse_loss(prediction.float(), target)
        loss.backward()
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.clip, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(self.averages, self.parameters, 1 - self.ema)
        return loss.detach()

    def _faster_attention(self, config: ModelConfig) -> str:
        """Times forward + backward of both on the shape at hand. One whose scores find no memory is the slower."""
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        shape = (self.batch, self.visible + config.extras, 3, config.heads, config.width // config.heads)
        qkv = torch.randn(shape, device=self.device, dtype=dtype, requires_grad=True)
        best = {}
        for name, attend in (("sdpa", sdpa_attention), ("explicit", explicit_attention)):
            try:
                best[name] = sorted(self._seconds(attend, qkv) for _ in range(6))[1]
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
        return min(best, key=lambda name: best[name])

    def _seconds(self, attend: Attend, qkv: Tensor) -> float:
        start = time.perf_counter()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            out = attend(*qkv.permute(2, 0, 3, 1, 4))
        out.backward(out.detach())
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


class PublishedBaseline:
    """A step as the authors' code (github.com/jiachenlei/maskdm, 2023-11) takes it, MaskDiT's much alike.

    fp32: their fp16 needs a GPU. Their data workers' share (decoding, masks promoted to float64 per image) is left out,
    which is in their favour. Kept: noise for the whole image, all patches embedded and positioned before hidden ones
    are dropped, boolean indexing there and in the target, explicit attention, the loss read back and tested for NaN at
    each step, AdamW one tensor at a time on all parameters, EMA in a Python loop.
    """

    def __init__(
        self,
        config: ModelConfig,
        images: Tensor,  # [N, C, H, W] uint8
        mask_rate: float,
        batch: int,
        diffusion: DiffusionConfig | None = None,
        lr: float = 2e-4,
        betas: tuple[float, float] = (0.99, 0.99),
        weight_decay: float = 0.03,
        ema: float = 0.999,
        clip: float | None = None,
    ):
        self.images, self.batch, self.ema, self.clip = images, batch, ema, clip
        self.patch, self.patches, self.extras = config.patch, config.patches, config.extras
        self.device = images.device
        self.masked = int(mask_rate * config.patches)
        self.diffusion = Diffusion(diffusion or DiffusionConfig("linear")).to(self.device)
        self.model = PlainUViT(config).to(self.device)
        self.average = PlainUViT(config).to(self.device)
        self.average.load_state_dict(self.model.state_dict())
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=lr, betas=betas, weight_decay=weight_decay, foreach=False, fused=False
        )
        self.random = np.random.default_rng()

    def step(self) -> float:
        """One training step; returns the loss."""
        index = torch.randint(len(self.images), (self.batch,), device=self.device)
        x0 = self.images[index].float() / 255 * 2 - 1
        row = np.hstack([np.zeros(self.patches - self.masked), np.ones(self.masked)])
        drawn = np.stack([np.hstack([np.zeros(self.extras), self.random.permutation(row)]) for _ in range(self.batch)])
        hidden = torch.from_numpy(drawn).to(self.device).to(torch.bool)
        t = torch.randint(self.diffusion.config.timesteps, (self.batch,), device=self.device)
        noise = torch.randn_like(x0)
        alpha, sigma = self.diffusion.alpha_sigma[t].view(-1, 2, 1, 1, 1).unbind(1)
        prediction = self.model.forward_image(alpha * x0 + sigma * noise, t, hidden)
        target = _patches(self.diffusion.to_target(x0, noise, t), self.patch)
        target = target[~hidden[:, self.extras :]].reshape(self.batch, -1, target.shape[-1])
        loss = F.mse_loss(prediction, target, reduction="none").flatten(1).mean(1).mean()
        total = loss.item()
        if torch.isnan(loss).sum() != 0:
            print("loss is not a number")
        loss.backward()
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for average, current in zip(self.average.parameters(), self.model.parameters(), strict=True):
                average.sub_((average - current).mul_(1 - self.ema))
        return total
