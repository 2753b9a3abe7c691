"""FLOPs of attention for PyTorch's counter, which cannot look inside the op: FlopCounterMode(custom_mapping=FLOPS).

Not registered with the counter at import: that would import Triton wherever it is installed.
"""

from collections.abc import Callable

from torch import Tensor

from maskdiff_kernels.ops.attention.op import _attention, _backward


def _products(
    qkv: Tensor,  # [B, L, 3, H, d] or [T, 3, H, d]
    cu_seqlens: Tensor | None,  # [S + 1] int32; read back: counting may wait
    count: int,  # products of [L, d] x [d, L] for each sequence and head
) -> int:
    heads, width = qkv.shape[-2:]
    pairs = qkv.shape[0] * qkv.shape[1] ** 2 if cu_seqlens is None else sum(n * n for n in cu_seqlens.diff().tolist())
    return count * 2 * heads * width * pairs


def forward(qkv: Tensor, cu_seqlens: Tensor | None, *_: object, **__: object) -> int:
    return _products(qkv, cu_seqlens, 2)


def backward(
    grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor | None, *_: object, **__: object
) -> int:
    """Scores are made again: five products, as PyTorch counts its own fused attention."""
    return _products(qkv, cu_seqlens, 5)


for _formula in (forward, backward):
    vars(_formula)["_get_raw"] = True  # the counter then hands tensors over, not shapes

FLOPS: dict[object, Callable[..., int]] = {
    _attention.overloadpacket: forward,
    _backward.overloadpacket: backward,
}
