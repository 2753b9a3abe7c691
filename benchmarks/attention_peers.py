"""Attention's peers, as a user would call them on a packed qkv tensor, and the problem that all are given.

Every contestant does the same work: packed qkv in, the output in [.., H * d], and its gradient arriving in the packed
tensor. A peer's factory prepares whatever a user would keep from step to step (masks, offsets, compiled code).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peers import compiled as by_compiler
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import maskdiff_kernels as mk

Attend = Callable[[Tensor], Tensor]  # qkv -> out
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WORDS = {dtype: word for word, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Problem:
    """Sequences of some lengths: equal ones are [B, L, 3, H, d], ragged ones [T, 3, H, d] with cu_seqlens."""

    lengths: tuple[int, ...]
    heads: int
    width: int
    dtype: torch.dtype
    device: torch.device = torch.device("cpu")
    ragged: bool = False

    @property
    def longest(self) -> int:
        return max(self.lengths)

    def offsets(self, dtype: torch.dtype = torch.int32) -> Tensor:  # [S + 1]
        return torch.tensor([0, *self.lengths], device="cpu").cumsum(0).to(dtype).to(self.device)

    def sequences(self) -> Tensor:  # [T]
        """The number of each token's sequence."""
        lengths = torch.tensor(self.lengths, device=self.device)
        return torch.arange(len(self.lengths), device=self.device).repeat_interleave(lengths)

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Random qkv, which requires its gradient, and the gradient of the output."""
        shape = (sum(self.lengths),) if self.ragged else (len(self.lengths), self.longest)
        generator = torch.Generator(self.device).manual_seed(0)
        draw = functools.partial(torch.randn, generator=generator, device=self.device)
        qkv = draw((*shape, 3, self.heads, self.width)).to(self.dtype)
        return qkv.requires_grad_(), draw((*shape, self.heads * self.width)).to(self.dtype)

    def fixed(self, backward: bool = True) -> dict[str, Any]:
        """What a row of records.py says of it."""
        mix = "equal" if not self.ragged else f"ragged {min(self.lengths)} to {self.longest}"
        mean, passes = round(sum(self.lengths) / len(self.lengths)), "forward + backward" if backward else "forward"
        shape = {"length": mean, "longest": self.longest, "ragged": self.ragged, "width": self.width}
        shape |= {"batch": len(self.lengths), "heads": self.heads, "backward": backward}
        words = f"L {mean} {mix}, d {self.width}, {len(self.lengths)} x {self.heads}, {passes}"
        return {"op": "attention", "case": words, "shape": shape, "dtype": WORDS[self.dtype]}

    def work(self, backward: bool = True) -> dict[str, float]:
        return {"bytes": self.bytes(backward), "flops": self.flops(backward)}

    def flops(self, backward: bool = True) -> float:
        """The products of a forward, and of a backward that computes the scores again: 4 and 10 L^2 d a pair."""
        return (14 if backward else 4) * sum(length**2 for length in self.lengths) * self.width * self.heads

    def bytes(self, backward: bool = True) -> float:
        """What must cross memory once: qkv, output and log-sum-exp; backward also both gradients."""
        vector, tokens = self.width * self.dtype.itemsize, sum(self.lengths) * self.heads
        return tokens * (4 * vector + 4 + (8 * vector + 4 if backward else 0))

    def run(self, attend: Attend, backward: bool = True) -> Callable[[], tuple[Tensor, ...]]:
        """The call to time: the output, and the gradient of qkv."""
        qkv, grad = self.tensors()
        if not backward:
            qkv.requires_grad_(False)
            return lambda: (attend(qkv).contiguous(),)

        def both() -> tuple[Tensor, Tensor]:
            out = attend(qkv).contiguous()
            return out.detach(), torch.autograd.grad(out, qkv, grad)[0].contiguous()

        return both

    def judge(self) -> Callable[[tuple[Tensor, ...]], str]:
        """Says what is wrong with the output and the gradient; "" if nothing is.

        The first two and the last two sequences are computed in float64; an error, in the Euclidean norm, may be twice
        (a gradient's: three times) that of explicit products in the same dtype, plus one rounding.
        """
        qkv, grad = (x.detach().flatten(0, 0 if self.ragged else 1) for x in self.tensors())
        ends = self.offsets().tolist()
        count = len(self.lengths)
        places = [slice(ends[s], ends[s + 1]) for s in sorted({0, min(1, count - 1), max(count - 2, 0), count - 1})]

        def plainly(dtype: torch.dtype) -> list[Tensor]:
            parts = [_out_and_gradient(qkv[at].to(dtype), grad[at].to(dtype)) for at in places]
            return [torch.cat(tensors) for tensors in zip(*parts, strict=True)]

        exact, plain = plainly(torch.float64), plainly(self.dtype)
        shapes = grad.shape, qkv.shape

        def judgement(got: tuple[Tensor, ...]) -> str:
            for i, (name, tensor) in enumerate(zip(("output", "gradient"), got, strict=False)):
                tensor = tensor.flatten(0, 0 if self.ragged else 1)
                if tensor.shape != shapes[i] or tensor.dtype != self.dtype:
                    return f"{name}: {tensor.dtype} {list(tensor.shape)}"
                part = torch.cat([tensor[at] for at in places])
                error, peer = ((x.double() - exact[i]).norm().item() for x in (part, plain[i]))
                allowed = (2 + i) * peer + torch.finfo(self.dtype).eps / 2 * exact[i].norm().item()
                if not error <= allowed or not tensor.isfinite().all():
                    return f"{name}: error {error:.2e}, explicit products have {peer:.2e}"
            return ""

        return judgement


def _out_and_gradient(qkv: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:  # [L, 3, H, d], [L, H * d]
    qkv = qkv.clone().requires_grad_()
    q, k, v = qkv.permute(1, 2, 0, 3)
    weights = torch.softmax(q @ k.mT * qkv.shape[-1] ** -0.5, -1)
    out = (weights @ v).transpose(0, 1).flatten(1)
    return out.detach(), torch.autograd.grad(out, qkv, grad)[0]


def ours(problem: Problem, backend: str) -> Attend:
    """maskdiff's op by one of its backends."""
    packing: dict[str, Any] = {}
    if problem.ragged:
        packing = {"cu_seqlens": problem.offsets(), "max_seqlen": problem.longest}
    return functools.partial(mk.attention, **packing, backend=backend)


def sdpa(problem: Problem) -> Attend:
    """scaled_dot_product_attention as PyTorch picks it, on views of qkv; ragged: padded, with a mask."""

    def attend(x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = x.permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)

    return _on_equal_lengths(problem, attend)


def each(problem: Problem) -> Attend:
    """Ragged: scaled_dot_product_attention of one sequence after the other, without padding."""

    def attend(qkv: Tensor) -> Tensor:
        outs = []
        for part in qkv.split(list(problem.lengths)):  # [L, 3, H, d]
            q, k, v = part.permute(1, 2, 0, 3).unsqueeze(1).unbind(0)  # [1, H, L, d]
            outs.append(F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1).flatten(1))
        return torch.cat(outs)

    return attend


def pinned(problem: Problem, backend: SDPBackend) -> Attend:
    """The same by one of its kernels; ragged: on nested tensors."""
    if not problem.ragged:
        attend = sdpa(problem)

        def equal(qkv: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return attend(qkv)

        return equal
    offsets, shortest, longest = problem.offsets(torch.int64), min(problem.lengths), problem.longest

    def ragged(qkv: Tensor) -> Tensor:
        nest = torch.nested.nested_tensor_from_jagged
        q, k, v = (
            nest(x, offsets, min_seqlen=shortest, max_seqlen=longest).transpose(1, 2)  # [S, H, L, d]
            for x in qkv.unbind(1)
        )
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).values().flatten(1)

    return ragged


def explicit(problem: Problem) -> Attend:
    """Products and softmax; ragged: padded, with a mask."""

    def attend(x: Tensor, mask: Tensor | None) -> Tensor:
        sequences, length, _, heads, width = x.shape
        q, k, v = x.permute(2, 0, 3, 1, 4).reshape(3, sequences * heads, length, width).unbind(0)
        scores = torch.baddbmm(q.new_empty(()), q, k.mT, beta=0, alpha=width**-0.5)
        if mask is not None:
            scores = (scores.view(sequences, heads, length, length) + mask).flatten(0, 1)
        out = torch.bmm(torch.softmax(scores, -1), v)
        return out.view(sequences, heads, length, width).transpose(1, 2).reshape(sequences, length, heads * width)

    return _on_equal_lengths(problem, attend)


def _on_equal_lengths(
    problem: Problem,
    attend: Callable[[Tensor, Tensor | None], Tensor],  # ([S, L, 3, H, d], mask [S, 1, 1, L] or None) -> [S, L, H * d]
) -> Attend:
    """Ragged sequences are padded to the longest, and packed again; where each token goes is found once."""
    if not problem.ragged:
        return lambda qkv: attend(qkv, None)
    sequences, longest, sequence = len(problem.lengths), problem.longest, problem.sequences()
    places = sequence * longest + torch.arange(len(sequence), device=problem.device) - problem.offsets()[sequence]
    mask = torch.full((sequences, 1, 1, longest), -torch.inf, device=problem.device, dtype=problem.dtype)
    mask.view(-1)[places] = 0

    def ragged(qkv: Tensor) -> Tensor:
        padded = qkv.new_zeros(sequences * longest, *qkv.shape[1:]).index_copy(0, places, qkv)
        return attend(padded.unflatten(0, (sequences, longest)), mask).flatten(0, 1).index_select(0, places)

    return ragged


def compiled(problem: Problem) -> Attend:
    """The same by torch.compile."""
    return by_compiler(explicit(problem))


def varlen(problem: Problem) -> Attend:
    """torch.nn.attention.varlen: FlashAttention by offsets."""
    from torch.nn.attention.varlen import varlen_attn

    offsets, longest = problem.offsets(), problem.longest

    def attend(qkv: Tensor) -> Tensor:
        q, k, v = qkv.flatten(0, -4).unbind(1)
        out = varlen_attn(q, k, v, offsets, offsets, longest, longest)
        return out.flatten(1).view(*qkv.shape[:-3], -1)

    return attend


def flex(problem: Problem, compile: bool = True) -> Attend:
    """FlexAttention, compiled; ragged: one long sequence with a mask of documents by blocks of 128."""
    from torch.nn.attention.flex_attention import flex_attention

    run = by_compiler(flex_attention) if compile else flex_attention
    mask = _document_mask(problem) if problem.ragged else None

    def attend(qkv: Tensor) -> Tensor:
        q, k, v = (qkv[None] if problem.ragged else qkv).permute(2, 0, 3, 1, 4).unbind(0)
        out = run(q, k, v, block_mask=mask).transpose(1, 2).flatten(2)
        return out[0] if problem.ragged else out

    return attend


def _document_mask(problem: Problem, size: int = 128) -> Any:
    """What create_block_mask would find by trying every pair of tokens: sequences are contiguous."""
    from torch.nn.attention.flex_attention import BlockMask

    sequence, offsets = problem.sequences(), problem.offsets(torch.int64)
    tokens, device = len(sequence), problem.device
    blocks = -(-tokens // size)
    first = torch.arange(blocks, device=device) * size
    last = (first + size - 1).clamp(max=tokens - 1)
    low = offsets[sequence[first]] // size
    high = (offsets[sequence[last] + 1] - 1) // size
    count = (high - low + 1).int()[None, None]
    index = (low[:, None] + torch.arange(blocks, device=device)) % blocks

    def same(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return sequence[q] == sequence[k]

    return BlockMask.from_kv_blocks(
        count, index.int()[None, None], BLOCK_SIZE=size, mask_mod=same, seq_lengths=(tokens, tokens)
    )


def fmha(problem: Problem) -> Attend:
    """memory_efficient_attention of mslk or xformers; ragged: a block-diagonal mask, made once."""
    from maskdiff_kernels.ops.attention import xformers

    package, mask = xformers.fmha(), None
    if problem.ragged:
        mask = package.attn_bias.BlockDiagonalMask.from_seqlens(list(problem.lengths), device=problem.device)

    def attend(qkv: Tensor) -> Tensor:
        q, k, v = (qkv[None] if problem.ragged else qkv).unbind(2)
        return package.memory_efficient_attention(q, k, v, attn_bias=mask).flatten(2).view(*qkv.shape[:-3], -1)

    return attend


ANYWHERE: dict[str, Callable[[Problem], Attend]] = {"torch_sdpa": sdpa, "torch_explicit": explicit}
RAGGED: dict[str, Callable[[Problem], Attend]] = {"torch_each": each}  # beside them, where lengths differ
ON_CUDA: dict[str, Callable[[Problem], Attend]] = {
    "torch_flash": functools.partial(pinned, backend=SDPBackend.FLASH_ATTENTION),
    "torch_cudnn": functools.partial(pinned, backend=SDPBackend.CUDNN_ATTENTION),
    "torch_efficient": functools.partial(pinned, backend=SDPBackend.EFFICIENT_ATTENTION),
    "torch_varlen": varlen,
    "torch_explicit": explicit,
    "torch_compiled": compiled,
    "torch_flex": flex,
    "fmha": fmha,
}


def peers(device: torch.device, ragged: bool) -> dict[str, Callable[[Problem], Attend]]:
    """By name, the factories of what maskdiff's attention is measured beside on a device."""
    if device.type == "cuda":
        return ON_CUDA
    return {**ANYWHERE, **RAGGED} if ragged else ANYWHERE
