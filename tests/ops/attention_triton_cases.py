"""attention in Triton against the fp64 truth: on a GPU, or on the CPU in Triton's interpreter (TRITON_INTERPRET=1).

pytest runs this file in a process of its own (see test_attention_triton.py): what triton does is settled as it is
imported. The interpreter is slow and wrong for products of bfloat16, so it gets fewer lengths and no bfloat16.
"""

import math
import mmap

import pytest
import torch
from attention_truth import attend, both, check, offsets, random
from torch import Tensor
from torch.library import opcheck

from maskdiff_kernels import triton_package
from maskdiff_kernels.triton_package import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"
ALL = [1, 2, 15, 16, 17, *range(25, 34), 49, *range(63, 67), 77, 100, *range(127, 131), 144, 196, *range(255, 259), 417]
MIXES = [[0, 5, 0, 33, 1, 0, 17], [27] * 3, [3, 2, 140, 4, 1], [2, 65, 64, 0, 66], [0, 0], []]
# by dtype and d; the bounds of every tile, from both sides, and what masking leaves: 27, 65, 129, 257
LENGTHS: dict[tuple[torch.dtype, int], list[int]] = {
    (dtype, width): ALL for dtype in (torch.float32, torch.float16, torch.bfloat16) for width in (32, 64, 128)
}
if INTERPRETED:
    LENGTHS = {
        (torch.float16, 32): [2, 17, 33, 65, 129],
        (torch.float16, 64): [1, 2, 15, 16, 17, 27, 32, 33, 49, 63, 64, 65, 127, 128, 129, 257],
        (torch.float16, 128): [2, 31, 33, 64, 65, 128, 130],
        (torch.float32, 32): [1, 16, 33],
        (torch.float32, 64): [1, 2, 15, 16, 17, 27, 32, 33, 65, 129],
        (torch.float32, 128): [16, 17, 33],
    }
DTYPES = sorted({dtype for dtype, _ in LENGTHS}, key=str)


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """qkv [.., 3, H, d] and a gradient of the output [.., H * d]."""
    grad_out = random(*shape[:-3], math.prod(shape[-2:]), dtype=dtype, seed=1)
    return random(*shape, dtype=dtype).to(DEVICE), grad_out.to(DEVICE)


def same(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> bool:
    return torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


@pytest.mark.parametrize(("dtype", "width"), LENGTHS)
@pytest.mark.usefixtures("poisoned")
def test_against_float64(dtype, width):
    for length in LENGTHS[dtype, width]:
        sequences, heads = (2, 2) if length < 34 else (1, 1)
        qkv, grad_out = inputs(sequences, length, 3, heads, width, dtype=dtype)
        check(qkv, grad_out, both(attend("triton"), qkv, grad_out))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("poisoned")
def test_log_sum_exp(dtype):
    """[H, T], the natural logarithm."""
    for sequences, length in ((3, 17), (2, 65), (1, 130)):
        qkv, _ = inputs(sequences, length, 3, 2, 64, dtype=dtype)
        lse = torch.ops.maskdiff.attention.default(qkv, None, None, None, "triton")[1]
        q, k, _ = qkv.permute(2, 0, 3, 1, 4)
        exact, other = ((q.to(t) @ k.to(t).mT * 64**-0.5).logsumexp(-1) for t in (torch.float64, torch.float32))
        exact, other = (x.transpose(0, 1).flatten(1) for x in (exact, other))
        assert (lse - exact).abs().max() <= 2 * (other - exact).abs().max() + 2**-24 * exact.abs().max()


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, -0.7])
def test_scale(scale):
    for length in (21, 37):
        qkv, grad_out = inputs(1, length, 3, 2, 32)
        check(qkv, grad_out, both(attend("triton", scale=scale), qkv, grad_out), scale=scale)


def test_one_key_has_all():
    """Scores of hundreds: no exponential overflows, no row is lost, and keys that are not there do not count."""
    for sign in (1, -1):
        for length in (2, 9, 17, 33):
            qkv, grad_out = inputs(1, length, 3, 2, 64)
            qkv[:, :, 0], qkv[:, :, 1] = 5.0, sign * 5.0
            qkv[:, 0, 1] += 1.0  # scores of 200 or -200, key 0's 40 more
            out, grad = both(attend("triton"), qkv, grad_out)
            assert torch.equal(out, qkv[:, :1, 2].flatten(2).expand_as(out))
            expected = torch.zeros_like(grad)
            expected[:, 0, 2] = grad_out.double().sum(1).unflatten(1, (2, 64))
            torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-5)


def test_not_a_number_stays_in_its_sequence():
    lengths = [5, 40, 0, 3]
    qkv, grad_out = inputs(48, 3, 2, 64)
    qkv[20, 1, 0, 7] = torch.nan  # a key of sequence 1, head 0
    out, grad = both(attend("triton", lengths), qkv, grad_out)
    clean = torch.ones(48, 2, dtype=torch.bool, device=DEVICE)
    clean[5:45, 0] = False
    assert torch.equal(out.view(48, 2, 64).isnan().any(-1), ~clean)
    assert torch.equal(grad.isnan().any(-1).any(1), ~clean)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("poisoned")
def test_ragged_is_one_by_one(dtype):
    for lengths in MIXES:
        qkv, grad_out = inputs(sum(lengths), 3, 1, 64, dtype=dtype)
        out, grad = both(attend("triton", lengths), qkv, grad_out)
        check(qkv, grad_out, (out, grad), lengths)
        if dtype != torch.float32 or not INTERPRETED:
            longest = max(lengths, default=0)  # the same tiles
            for part, grad_part, *expected in zip(*(x.split(lengths) for x in (qkv, grad_out, out, grad)), strict=True):
                alone = both(attend("triton", [len(part)], max_seqlen=longest), part, grad_part)
                assert same(alone, tuple(expected))
            check(qkv, grad_out, both(attend("triton", lengths, max_seqlen=417), qkv, grad_out), lengths)


def test_equal_lengths_are_a_case_of_ragged():
    for length in (27, 70):
        qkv, grad_out = inputs(2, length, 3, 2, 64, dtype=torch.float16)
        packed = both(attend("triton", [length] * 2), qkv.flatten(0, 1), grad_out.flatten(0, 1))
        got = both(attend("triton"), qkv, grad_out)
        assert same((got[0].flatten(0, 1), got[1].flatten(0, 1)), packed)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_nothing_to_do(shape):
    qkv, grad_out = inputs(*shape, 3, 2, 32)
    out, grad = both(attend("triton"), qkv, grad_out)
    assert out.shape == (*shape, 64) and grad.shape == (*shape, 3, 2, 32)


@pytest.mark.usefixtures("poisoned")
def test_strides(dtype=torch.float16):
    layouts = [
        random(2, 23, 3, 2, 32, dtype=dtype)[:, 3:20],
        random(2, 17, 3, 3, 45, dtype=dtype)[:, :, :, 1:, 7:39],
        random(3, 2, 2, 17, 32, dtype=dtype).permute(1, 3, 0, 2, 4),
        random(2, 17, 2, 3, 32, dtype=dtype).transpose(2, 3),
        random(1, 17, 3, 1, 32, dtype=dtype).expand(2, 17, 3, 2, 32),
        random(17, 2, 3, 2, 32, dtype=dtype).transpose(0, 1),
    ]
    grads = [
        random(2, 17, 75, dtype=dtype, seed=1)[..., 5:69],
        random(17, 2, 64, dtype=dtype, seed=1).transpose(0, 1),
        random(2, 64, 17, dtype=dtype, seed=1).mT,  # not dense
        torch.ones(1, 1, 1, dtype=dtype).expand(2, 17, 64),  # as sum() gives it
    ]
    for i, layout in enumerate(layouts):
        for grad_out in grads if i == 0 else grads[:1]:
            qkv, grad_out = layout.to(DEVICE), grad_out.to(DEVICE)
            got = both(attend("triton"), qkv, grad_out)
            assert same(got, both(attend("triton"), qkv.contiguous(), grad_out.contiguous()))
        if i < 2:
            got = both(attend("triton", [17]), qkv[1], grad_out[1])
            assert same(got, both(attend("triton", [17]), qkv[1].contiguous(), grad_out[1].contiguous()))


def far_apart(shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    """Random float16 at strides that reach beyond 2^31 elements; of the memory, only what is used is there."""
    elements = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + 1
    if INTERPRETED:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
        memory = torch.frombuffer(mmap.mmap(-1, 2 * elements, flags=flags), dtype=torch.float16)
    else:
        memory = torch.empty(elements, dtype=torch.float16, device=DEVICE)
    return memory.as_strided(shape, strides).copy_(random(*shape))


@pytest.mark.parametrize("strides", [(2**31 + 64, 192, 64, 32), (64, 2**30 + 64, 2**27, 32), (4096, 192, 64, 2**31)])
def test_offsets_beyond_32_bits(strides):
    qkv = far_apart((2, 4, 3, 2, 32), (*strides, 1))
    for grad_strides in ((256, 64, 1), (2**31 + 64, 64, 1), (64, 2**30, 1)):
        grad_out = far_apart((2, 4, 64), grad_strides)
        got = both(attend("triton"), qkv, grad_out)
        assert same(got, both(attend("triton"), qkv.contiguous(), grad_out.contiguous()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_twice(dtype):
    for lengths in ([27, 3], [3, 0, 70]) if INTERPRETED else MIXES:
        qkv, grad_out = inputs(sum(lengths), 3, 1, 64, dtype=dtype)
        assert same(*(both(attend("triton", lengths), qkv, grad_out) for _ in range(2)))


@pytest.mark.parametrize("lengths", [None, [5, 0, 12]])
def test_opcheck(lengths):
    op, backward = torch.ops.maskdiff.attention.default, torch.ops.maskdiff.attention_backward.default
    packing = (None, None) if lengths is None else (offsets(lengths).to(DEVICE), 12)
    qkv, _ = inputs(*((17,) if lengths else (1, 9)), 3, 2, 64)
    qkv = qkv[..., 1:, :32]
    opcheck(op, (qkv, *packing, 0.5, "triton"))
    out, lse = op(qkv, *packing, 0.5, "triton")
    opcheck(backward, (torch.ones_like(out), qkv, out, lse, *packing, 0.5, "triton"))


def test_it_is_there():
    assert triton_package.load().startswith("Triton 3.")
