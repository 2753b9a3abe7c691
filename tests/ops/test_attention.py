"""attention on the CPU: the fp64 rule at every length, ragged against one by one, the same bits twice, errors."""

import pytest
import torch

from maskdiff_kernels import attention
from maskdiff_kernels.library import cpu_levels, use_cpu_level

LENGTHS = [1, 2, 15, 16, 17, 25, 27, 31, 32, 33, 49, 63, 64, 65, 77, 100, 127, 129, 144, 196, 255, 257, 417]


def plain(qkv, scale=None):
    """softmax(scale q k^T) v of [B, L, 3, H, d], in its own dtype."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    scores = (q @ k.transpose(-1, -2)) * (scale or qkv.shape[-1] ** -0.5)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def both(function, qkv, grad):
    leaf = qkv.detach().clone().requires_grad_()
    out = function(leaf)
    (gradient,) = torch.autograd.grad(out, leaf, grad.to(out.dtype))
    return out.detach().double(), gradient.double()


def check(qkv, **options):
    grad = torch.randn(*qkv.shape[:2], qkv.shape[3] * qkv.shape[4]).to(qkv.dtype)
    truth = both(plain, qkv.double(), grad)
    same = both(plain, qkv, grad)
    ours = both(lambda x: attention(x, backend="cpp", **options), qkv, grad)
    for name, factor, a, b, t in zip(("output", "gradient"), (2, 3), ours, same, truth, strict=True):
        allowed = factor * (b - t).abs().max() + torch.finfo(qkv.dtype).eps * t.abs().max()
        assert (a - t).abs().max() <= allowed, f"{name}: {(a - t).abs().max():.2e}, allowed {allowed:.2e}"


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fp64_rule_at_every_length(length, dtype):
    check(torch.randn(2, length, 3, 2, 64).to(dtype))


@pytest.mark.parametrize("dim", [32, 64, 128])
@pytest.mark.parametrize("level", cpu_levels())
def test_every_width_and_instruction_set(dim, level):
    with use_cpu_level(level):
        check(torch.randn(2, 65, 3, 3, dim))


def test_ragged_equals_one_by_one():
    lengths = [0, 5, 64, 0, 17, 17, 130, 1]
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    qkv, grad = torch.randn(sum(lengths), 3, 2, 64), torch.randn(sum(lengths), 128)
    out, gradient = both(lambda x: attention(x, cu, 130, backend="cpp"), qkv, grad)
    for first, last in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        if first == last:
            continue
        alone = both(lambda x: attention(x, backend="cpp"), qkv[None, first:last], grad[None, first:last])
        assert torch.equal(out[first:last], alone[0][0]) and torch.equal(gradient[first:last], alone[1][0])


def test_strided_input_is_read_in_place():
    wide = torch.randn(3, 40, 2, 3, 2, 64)
    check(wide[:, 3:36, 1])


def test_same_bits_twice_and_for_any_thread_count():
    qkv, grad = torch.randn(3, 129, 3, 2, 64), torch.randn(3, 129, 128)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            results.append(both(lambda x: attention(x, backend="cpp"), qkv, grad))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(results[0], result, strict=True))


@pytest.mark.parametrize("backend", ["sdpa", "explicit", "reference"])
def test_other_choices_agree(backend):
    qkv, grad = torch.randn(2, 33, 3, 2, 64), torch.randn(2, 33, 128)
    ours, other = (both(lambda x, b=b: attention(x, backend=b), qkv, grad) for b in ("cpp", backend))
    for a, b in zip(ours, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_errors_and_second_derivatives():
    qkv = torch.randn(2, 4, 3, 2, 64, requires_grad=True)
    with pytest.raises((ValueError, TypeError), match="max_seqlen"):
        attention(torch.randn(4, 3, 2, 64), torch.tensor([0, 4], dtype=torch.int32))
    with pytest.raises((ValueError, TypeError), match="48"):
        attention(torch.randn(2, 4, 3, 2, 48))
    (grad,) = torch.autograd.grad(attention(qkv).square().sum(), qkv)
    assert torch.isfinite(grad).all()
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(attention(qkv).square().sum(), qkv, create_graph=True)
