"""attention: fp64 truth of the output and its gradient, ragged against one by one, layouts, the same bits, errors."""

import inspect
import itertools
import os
import types
from pathlib import Path

import pytest
import torch
from attention_truth import attend, both, check, offsets, plain, random
from torch import Tensor
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode
from wide import build

import maskdiff_kernels as mk
from maskdiff_kernels import dispatch, library, triton_package
from maskdiff_kernels.ops.attention import cpp, cuda, xformers
from maskdiff_kernels.ops.attention import op as attention_op

ROOT = Path(__file__).resolve().parents[2]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LENGTHS = [1, 2, 15, 16, 17, *range(25, 34), 49, *range(63, 67), 77, 100, *range(127, 131), 144, 196, *range(255, 259)]
LENGTHS.append(417)
WIDTHS = {32: (1, 17, 33, 130), 64: LENGTHS, 128: (2, 27, 65, 129)}
MIXES = [[0, 5, 0, 33, 1, 0, 17], [27] * 4, [3, 2, 300, 4, 1], [2, 65, 64, 66, 63], [0, 0], []]
OTHERS = ["sdpa", "explicit"]


def taken(backend: str, qkv: Tensor, length: int | None = None) -> bool:
    """Whether an implementation takes such a tensor: some are for short sequences, 16-bit numbers or whole vectors."""
    can_take = getattr(dispatch._OPS["attention"][backend].module, "can_take", None)
    return can_take is None or can_take(qkv, qkv.shape[1] if length is None else length)[0]


def some_dtype(backend: str) -> torch.dtype:
    """float32 where the implementation takes it."""
    return torch.float32 if taken(backend, random(1, 1, 3, 1, 64)) else torch.bfloat16


def some_dtypes(backend: str) -> list[torch.dtype]:
    """The C++ multiplies bfloat16 by instructions of its own."""
    return [torch.float32, torch.bfloat16] if backend == "cpp" else [some_dtype(backend)]


# ---- truth ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.usefixtures("poisoned")
def test_against_float64(implementation, width, dtype):
    lengths = WIDTHS[width] if implementation not in OTHERS else WIDTHS[width][:5]
    lengths = [n for n in lengths if taken(implementation, random(1, n, 3, 1, width, dtype=dtype))]
    if not lengths:
        pytest.skip(f"{implementation} takes no {dtype} [.., 3, H, {width}]")
    for length in lengths:
        qkv = random(2, length, 3, 5, width, dtype=dtype)
        grad_out = random(2, length, 5 * width, dtype=dtype, seed=1)
        check(qkv, grad_out, both(attend(implementation), qkv, grad_out), backend=implementation)


@pytest.mark.parametrize("dtype", DTYPES)
def test_log_sum_exp(level, dtype):
    """What other implementations' backward would read: [H, T], the natural logarithm."""
    for backend, length in itertools.product(("cpp", "reference"), (1, 17, 65, 257)):
        qkv = random(3, length, 3, 2, 64, dtype=dtype)
        lse = torch.ops.maskdiff.attention.default(qkv, None, None, None, backend)[1]
        q, k, _ = qkv.permute(2, 0, 3, 1, 4)
        exact, other = ((q.to(t) @ k.to(t).mT * 64**-0.5).logsumexp(-1) for t in (torch.float64, torch.float32))
        exact, other = (x.transpose(0, 1).flatten(1) for x in (exact, other))  # [H, B * L]
        peer_error, rounding = (other - exact).abs().max(), 2**-24 * exact.abs().max()
        assert (lse - exact).abs().max() <= 2 * peer_error + rounding


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, -0.7, -6.0])
def test_scale(implementation, scale):
    for dtype in some_dtypes(implementation):
        qkv, grad_out = random(2, 37, 3, 3, 32, dtype=dtype), random(2, 37, 96, dtype=dtype, seed=1)
        got = both(attend(implementation, scale=scale), qkv, grad_out)
        check(qkv, grad_out, got, scale=scale, backend=implementation)


def test_one_key_has_all(implementation):
    """Scores of hundreds: no exponential overflows, no row is lost, and keys that are not there do not count."""
    for dtype, sign, length in itertools.product(some_dtypes(implementation), (1, -1), (2, 9, 17, 33)):
        qkv, grad_out = random(1, length, 3, 2, 64, dtype=dtype), random(1, length, 128, dtype=dtype, seed=1)
        qkv[:, :, 0], qkv[:, :, 1] = 5.0, sign * 5.0
        qkv[:, 0, 1] += 1.0  # scores of 200 or -200, key 0's 40 more
        out, grad = both(attend(implementation), qkv, grad_out)
        assert torch.equal(out, qkv[:, :1, 2].flatten(2).expand_as(out))
        expected = torch.zeros_like(grad)
        expected[:, 0, 2] = grad_out.double().sum(1).unflatten(1, (2, 64)).to(dtype)
        tolerance = max(1e-5, torch.finfo(dtype).eps)
        torch.testing.assert_close(grad, expected, rtol=tolerance, atol=tolerance)


def test_not_a_number_stays_in_its_sequence(implementation):
    lengths = [5, 40, 0, 3]
    for dtype in some_dtypes(implementation):
        qkv, grad_out = random(48, 3, 2, 64, dtype=dtype), random(48, 128, dtype=dtype, seed=1)
        qkv[20, 1, 0, 7] = torch.nan  # a key of sequence 1, head 0
        got = both(attend(implementation, lengths), qkv, grad_out)
        clean = torch.ones(48, 2, dtype=torch.bool)
        clean[5:45, 0] = False
        assert torch.equal(got[0].view(48, 2, 64).isnan().any(-1), ~clean)
        assert torch.equal(got[1].isnan().any(-1).any(1), ~clean)


# ---- ragged ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("poisoned")
def test_ragged_is_one_by_one(implementation, dtype):
    if not taken(implementation, random(1, 1, 3, 1, 64, dtype=dtype)):
        pytest.skip(f"{implementation} takes no {dtype}")
    for lengths in MIXES:
        qkv = random(sum(lengths), 3, 3, 64, dtype=dtype)
        grad_out = random(sum(lengths), 192, dtype=dtype, seed=1)
        if not taken(implementation, qkv, max(lengths, default=0)):
            continue
        out, grad = both(attend(implementation, lengths), qkv, grad_out)
        check(qkv, grad_out, (out, grad), lengths, backend=implementation)
        if implementation == "cpp":
            alone = [
                both(attend(implementation), part[None], grad_part[None])
                for part, grad_part in zip(qkv.split(lengths), grad_out.split(lengths), strict=True)
            ]
            assert torch.equal(out, torch.cat([out[:0], *(x[0] for x, _ in alone)]))
            assert torch.equal(grad, torch.cat([grad[:0], *(x[0] for _, x in alone)]))
            again = both(attend(implementation, lengths, max_seqlen=417), qkv, grad_out)
            assert torch.equal(again[0], out) and torch.equal(again[1], grad)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_nothing_to_do(implementation, shape):
    dtype = some_dtype(implementation)
    qkv, grad_out = random(*shape, 3, 2, 32, dtype=dtype), random(*shape, 64, dtype=dtype)
    out, grad = both(attend(implementation), qkv, grad_out)
    assert out.shape == (*shape, 64) and grad.shape == (*shape, 3, 2, 32)


# ---- layouts, determinism ----


def test_runs_twice_alike(implementation):
    """Of ours: PyTorch's own may add up in any order on a GPU."""
    if implementation in (*OTHERS, "xformers"):
        pytest.skip("PyTorch's own")
    for lengths in ([130] * 3, [5, 0, 257, 1, 66]):
        qkv = random(sum(lengths), 3, 3, 64, dtype=torch.bfloat16)
        grad_out = random(sum(lengths), 192, dtype=torch.bfloat16, seed=1)
        first, again = (both(attend(implementation, lengths), qkv, grad_out) for _ in range(2))
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


def layouts(dtype: torch.dtype) -> list[Tensor]:
    """[2, 33, 3, 4, 64] in several strides, the last dimension dense."""
    return [
        random(2, 40, 3, 4, 64, dtype=dtype)[:, 3:36],
        random(2, 33, 3, 5, 80, dtype=dtype)[:, :, :, 1:, 7:71],
        random(3, 2, 4, 33, 64, dtype=dtype).permute(1, 3, 0, 2, 4),
        random(2, 33, 4, 3, 64, dtype=dtype).transpose(2, 3),
        random(1, 33, 3, 1, 64, dtype=dtype).expand(2, 33, 3, 4, 64),
        random(33, 2, 3, 4, 64, dtype=dtype).transpose(0, 1),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("poisoned")
def test_strides(level, dtype):
    grads = [
        random(2, 33, 256, dtype=dtype, seed=1),
        random(2, 33, 300, dtype=dtype, seed=1)[..., 5:261],
        random(33, 2, 256, dtype=dtype, seed=1).transpose(0, 1),
        random(2, 256, 33, dtype=dtype, seed=1).mT,  # not dense
        torch.ones(1, 1, 1, dtype=dtype).expand(2, 33, 256),  # as sum() gives it
    ]
    for qkv in layouts(dtype):
        for grad_out in grads:
            got = both(attend("cpp"), qkv, grad_out)
            dense = both(attend("cpp"), qkv.contiguous(), grad_out.contiguous())
            assert torch.equal(got[0], dense[0]) and torch.equal(got[1], dense[1])
        got = both(attend("cpp", [33]), qkv[1], grads[1][1])
        dense = both(attend("cpp", [33]), qkv[1].contiguous(), grads[1][1].contiguous())
        assert torch.equal(got[0], dense[0]) and torch.equal(got[1], dense[1])


def test_strides_of_every_implementation(implementation):
    dtype = some_dtype(implementation)
    for qkv in layouts(dtype):
        if taken(implementation, qkv):
            grad_out = random(2, 33, 300, dtype=dtype, seed=1)[..., 5:261]
            check(qkv, grad_out, both(attend(implementation), qkv, grad_out), backend=implementation)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("threads")
def test_same_bits_twice_and_on_any_number_of_threads(level, dtype):
    for lengths in ([27] * 5, [3, 200, 0, 65, 1]):
        qkv = random(sum(lengths), 3, 3, 64, dtype=dtype)
        grad_out = random(sum(lengths), 192, dtype=dtype, seed=1)
        results = []
        for threads in (1, 1, 2, 3):
            torch.set_num_threads(threads)
            results.append(both(attend("cpp", lengths), qkv, grad_out))
        for out, grad in results[1:]:
            assert torch.equal(out, results[0][0]) and torch.equal(grad, results[0][1])


def test_what_is_kept_for_the_backward():
    qkv = random(2, 33, 3, 4, 64).requires_grad_()
    kept = {tuple(tensor.shape) for tensor in mk.attention(qkv).grad_fn.saved_tensors}
    assert kept == {(2, 33, 3, 4, 64), (2, 33, 256), (4, 66)}
    assert mk.attention(qkv.detach()).grad_fn is None


# ---- code for other processors ----


def check_cpp(products: str) -> None:
    """The C++ by its module, bfloat16 multiplied in a given way: lengths with and without tails, equal and ragged."""
    for width, lengths in (
        (32, (33, 900)),
        (64, (2, 3, 15, 16, 17, 27, 32, 33, 64, 65, 66, 129, 257, 417)),
        (128, (34, 417)),
    ):
        scale = -12.0 if width == 32 else width**-0.5  # scores in the hundreds, the largest the least before scaling
        for length in lengths:
            qkv = random(2, length, 3, 4, width, dtype=torch.bfloat16)
            grad_out = random(2, length, 4 * width, dtype=torch.bfloat16, seed=1)
            out, lse = cpp.run(qkv, None, None, scale, products)
            grad = cpp.run_backward(grad_out, qkv, out, lse, None, None, scale, products)
            check(qkv, grad_out, (out, grad), scale=scale)
            mix = [length, 0, 1, length - 1]
            packed, packed_grad = qkv.flatten(0, 1), grad_out.flatten(0, 1)
            options = offsets(mix), length, scale, products
            part, lse = cpp.run(packed, *options)
            grad_part = cpp.run_backward(packed_grad, packed, part, lse, *options)
            assert torch.equal(part[:length], out[0]) and torch.equal(grad_part[:length], grad[0])
            check(packed, packed_grad, (part, grad_part), mix, scale=scale)


@pytest.mark.parametrize("products", ["tiles", "pairs", "widened"])
@pytest.mark.usefixtures("poisoned")
def test_products_of_bfloat16(level, products):
    """tiles, pairs: the code of AMX and of AVX-512-BF16, their one instruction done in steps elsewhere. widened: what
    the others do."""
    if products == "tiles" and level in ("baseline", "avx2"):
        pytest.skip("tiles take vectors of sixteen: test_vectors_of_sixteen runs them here")
    check_cpp(products)


@pytest.mark.parametrize("products", ["tiles", "pairs", "widened"])
@pytest.mark.usefixtures("threads")
def test_shorter_sequences_that_want_more_memory(level, products):
    """Blocks of queries are the larger, the shorter a sequence: each of these beside itself alone."""
    if products == "tiles" and level in ("baseline", "avx2"):
        pytest.skip("tiles take vectors of sixteen")
    torch.set_num_threads(1)
    for width, lengths in itertools.product((32, 128), ([384, 368, 1], [1400, 1360])):
        qkv = random(sum(lengths), 3, 1, width, dtype=torch.bfloat16)
        grad_out = random(sum(lengths), width, dtype=torch.bfloat16, seed=1)
        options = offsets(lengths), max(lengths), width**-0.5, products
        out, lse = cpp.run(qkv, *options)
        grad = cpp.run_backward(grad_out, qkv, out, lse, *options)
        parts = zip(*(tensor.split(lengths) for tensor in (qkv, grad_out, out, lse.t(), grad)), strict=True)
        for one, one_grad, part, part_lse, part_grad in parts:
            alone, alone_lse = cpp.run(one[None], None, None, width**-0.5, products)
            assert torch.equal(alone[0], part) and torch.equal(alone_lse, part_lse.t())
            alone_grad = cpp.run_backward(
                one_grad[None], one[None], alone, alone_lse, None, None, width**-0.5, products
            )
            assert torch.equal(alone_grad[0], part_grad)


@pytest.mark.usefixtures("poisoned")
def test_vectors_of_sixteen(tmp_path, monkeypatch):
    """The code of AVX-512, its sixteen lanes made of narrower vectors: on any processor."""
    wide = build("attention", tmp_path)
    monkeypatch.setattr(library, "cpu", lambda: wide)
    for products in ("tiles", "pairs", "widened"):
        check_cpp(products)
    for width, length in itertools.product((32, 64, 128), (1, 15, 16, 17, 33, 65, 257)):
        qkv, grad_out = random(2, length, 3, 4, width), random(2, length, 4 * width, seed=1)
        out, lse = cpp.run(qkv, None, None, width**-0.5)
        grad = cpp.run_backward(grad_out, qkv, out, lse, None, None, width**-0.5)
        check(qkv, grad_out, (out, grad))


# ---- as PyTorch sees it ----


@pytest.mark.parametrize("backend", ["cpp", "reference", *OTHERS])
@pytest.mark.parametrize("lengths", [None, [5, 0, 12]])
def test_opcheck(backend, lengths):
    op, backward = torch.ops.maskdiff.attention.default, torch.ops.maskdiff.attention_backward.default
    packing = (None, None) if lengths is None else (offsets(lengths), 12)
    shape = (17,) if lengths else (2, 9)
    strided = random(*shape, 3, 4, 64)[..., 1:, :32]
    empty = random(0, *shape[1:], 3, 4, 64)
    for qkv, scale in ((strided, None), (strided.bfloat16().requires_grad_(), 0.5), (empty, None)):
        if qkv.numel() == 0 and lengths:
            packing = (offsets([0, 0]), 3)
        opcheck(op, (qkv, *packing, scale, backend))
        out, lse = op(qkv.detach(), *packing, scale, backend)
        opcheck(backward, (torch.ones_like(out), qkv.detach(), out, lse, *packing, scale, backend))


@pytest.mark.parametrize("compiler", ["inductor", "aot_eager"])
@pytest.mark.parametrize("lengths", [None, [20, 0, 13]])
def test_fullgraph_compile(compiler, lengths):
    layer = torch.nn.Linear(128, 3 * 128)

    def step(x, cu_seqlens):
        qkv = layer(x).unflatten(-1, (3, 2, 64))
        return mk.attention(qkv, cu_seqlens, None if cu_seqlens is None else 33).square().mean()

    torch._dynamo.reset()
    x = random(33, 128) if lengths else random(2, 33, 128)
    results = []
    for run in (torch.compile(step, fullgraph=True, backend=compiler), step):
        layer.zero_grad()
        loss = run(x, offsets(lengths) if lengths else None)
        loss.backward()
        results.append((loss.detach(), layer.weight.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)  # the linear layer's rounding may differ


def test_compile_for_any_length():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: mk.attention(x).sin(), fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (27, 33):
        qkv, grad_out = random(2, length, 3, 2, 32), random(2, length, 64, seed=1)
        got, expected = (both(run, qkv, grad_out) for run in (compiled, lambda x: mk.attention(x).sin()))
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(implementation, dtype):
    qkv, grad_out = random(2, 9, 3, 2, 32, dtype=dtype), random(2, 9, 64, dtype=dtype, seed=1)
    if not taken(implementation, qkv):
        pytest.skip(f"{implementation} takes no {dtype}")
    expected = both(attend(implementation), qkv, grad_out)
    with torch.autocast(qkv.device.type, torch.bfloat16):
        got = both(attend(implementation), qkv, grad_out)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1]) and got[0].dtype == dtype


def test_second_derivative_is_an_error(implementation):
    qkv = random(2, 9, 3, 2, 32, dtype=some_dtype(implementation)).requires_grad_()
    out = mk.attention(qkv, backend=implementation)
    with pytest.raises(RuntimeError, match="attention has no second derivative"):
        torch.autograd.grad(out.sum(), qkv, create_graph=True)


def test_the_registered_op_does_not_pass_for_differentiable(implementation):
    qkv = random(2, 9, 3, 2, 32, dtype=some_dtype(implementation)).requires_grad_()
    out, _ = torch.ops.maskdiff.attention.default(qkv, None, None, None, implementation)
    assert not out.requires_grad


# ---- errors ----

GOOD = random(12, 3, 2, 32)
CU = offsets([5, 7])


@pytest.mark.parametrize("backend", ["cpp", "reference", *OTHERS])
@pytest.mark.parametrize(
    ("error", "message", "qkv", "options"),
    [
        (TypeError, r"^qkv: got torch.float64, takes float32, bfloat16", random(2, 5, 3, 2, 32).double(), {}),
        (ValueError, r"^qkv: got shape \[12, 3, 2, 32\], takes .*\[B, L, 3, H, d\]", GOOD, {}),
        (ValueError, r"^qkv: got shape \[2, 5, 2, 2, 32\]", random(2, 5, 2, 2, 32), {}),
        (ValueError, r"^qkv: got 2 heads of width 48, takes .* 32, 64 or 128", random(2, 5, 3, 2, 48), {}),
        (ValueError, r"^qkv: got 0 heads", random(2, 5, 3, 0, 32), {}),
        (ValueError, r"^qkv: got strides .*dense last", random(2, 5, 3, 32, 32).mT, {}),
        (ValueError, r"^qkv: got shape .*takes .*\[T, 3, H, d\]", random(2, 6, 3, 2, 32), {"cu_seqlens": CU}),
        (ValueError, r"^scale: got inf, takes a finite", random(2, 5, 3, 2, 32), {"scale": float("inf")}),
        (ValueError, r"^max_seqlen: got 5 without cu_seqlens", random(2, 5, 3, 2, 32), {"max_seqlen": 5}),
        (ValueError, r"^max_seqlen: got None beside cu_seqlens", GOOD, {"cu_seqlens": CU}),
        (ValueError, r"^max_seqlen: got 6, takes at least 7", GOOD, {"cu_seqlens": CU, "max_seqlen": 6}),
        (TypeError, r"^cu_seqlens: got torch.int64", GOOD, {"cu_seqlens": CU.long(), "max_seqlen": 7}),
        (ValueError, r"^cu_seqlens: got shape \[2, 2\]", GOOD, {"cu_seqlens": CU[:2].expand(2, 2), "max_seqlen": 7}),
        (ValueError, r"^cu_seqlens: got no number", GOOD, {"cu_seqlens": CU[:0], "max_seqlen": 7}),
        (ValueError, r"^cu_seqlens: got 0 to 5, takes .* to 12", GOOD, {"cu_seqlens": CU[:2], "max_seqlen": 7}),
        (ValueError, r"^cu_seqlens: got 5 to 12", GOOD, {"cu_seqlens": CU[1:], "max_seqlen": 7}),
        (ValueError, r"^cu_seqlens: .*never fall", GOOD, {"cu_seqlens": CU[[0, 2, 1, 2]], "max_seqlen": 12}),
        (ValueError, r"^cu_seqlens: got 0 to 0", GOOD, {"cu_seqlens": CU[:1], "max_seqlen": 12}),
    ],
)
def test_errors(backend, error, message, qkv, options):
    with pytest.raises(error, match=message):
        mk.attention(qkv, **options, backend=backend)


def test_errors_of_the_backward():
    backward, qkv = torch.ops.maskdiff.attention_backward.default, random(2, 5, 3, 2, 32)
    out, lse = torch.ops.maskdiff.attention.default(qkv, None, None, None, "cpp")
    rest = (None, None, None, "cpp")
    with pytest.raises(TypeError, match=r"^grad_out: got torch.bfloat16"):
        backward(out.bfloat16(), qkv, out, lse, *rest)
    with pytest.raises(ValueError, match=r"^grad_out: got shape \[1, 5, 64\]"):
        backward(out[:1], qkv, out, lse, *rest)
    with pytest.raises(ValueError, match=r"^lse: got shape \[2, 5\]"):
        backward(out, qkv, out, lse[:, :5].contiguous(), *rest)


# ---- choice ----


def test_choice():
    names = ["cuda", "cpp", "triton", "sdpa", "reference", "explicit", "xformers"]
    assert list(mk.backends("attention")) == names
    assert dispatch.choice("attention", "cpu") == os.environ.get("MASKDIFF_KERNELS", "cpp")
    with pytest.raises(ValueError, match="^backend: got 'flash', attention takes auto or one of cuda, cpp, triton"):
        mk.attention(random(2, 5, 3, 2, 32), backend="flash")
    for name in ("cuda", "triton", "xformers"):
        with pytest.raises(ValueError, match=f"^backend: '{name}' of attention takes cuda tensors, not cpu"):
            mk.attention(random(2, 5, 3, 2, 32), backend=name)


@pytest.mark.parametrize("names", [("sdpa", "cpp"), ("explicit", "reference")])
def test_the_backward_is_by_the_implementation_of_the_forward(monkeypatch, names):
    """Whatever the choice is by then: what the one keeps the other may not read."""
    qkv, grad_out = random(2, 33, 3, 2, 32), random(2, 33, 64, seed=1)
    for first, second in (names, names[::-1]):
        monkeypatch.setenv("MASKDIFF_KERNELS", first)
        given = qkv.clone().requires_grad_()
        out = mk.attention(given)
        monkeypatch.setenv("MASKDIFF_KERNELS", second)
        got = out.detach(), torch.autograd.grad(out, given, grad_out)[0]
        check(qkv, grad_out, got, backend=first)


@pytest.mark.parametrize("there", [True, False])
def test_where_cuda_cannot_another_runs(monkeypatch, there):
    """Its kernels have limits of length, width and dtype: auto goes on with Triton or PyTorch's own."""

    def load() -> str:
        if not there:
            raise library.LibraryError("triton is not there")
        return "Triton"

    monkeypatch.delenv("MASKDIFF_KERNELS", raising=False)
    monkeypatch.setattr(dispatch, "choice", lambda op, device, backend, length: "cuda")
    monkeypatch.setattr(triton_package, "load", load)
    monkeypatch.setattr(attention_op, "_where_cuda_cannot", attention_op._where_cuda_cannot.__wrapped__)
    short, long = random(1, 5, 3, 2, 64, dtype=torch.bfloat16), random(1, 300, 3, 2, 64, dtype=torch.bfloat16)
    chosen = [attention_op._choice(x, x.shape[1], "auto") for x in (short, long, short.float())]
    assert chosen == ["cuda", *["triton" if there else "sdpa"] * 2]
    assert attention_op._choice(long, 300, "cuda") == "cuda"
    monkeypatch.setenv("MASKDIFF_KERNELS", "cuda")
    assert attention_op._choice(long, 300, "auto") == "cuda"
    with pytest.raises(ValueError, match="^backend: 'cuda' of attention takes at most 288 tokens, not 300"):
        cuda.run(long, None, None, 0.125)


def test_xformers_adapter(monkeypatch):
    """The adapter's own work, with a stand-in that has the package's signature and no kernels."""

    class BlockDiagonalMask:
        @classmethod
        def from_seqlens(cls, q_seqlen, kv_seqlen=None, *, device=None):
            mask = cls()
            mask.lengths = q_seqlen
            return mask

    def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
        qkv = torch.stack((query, key, value), 2)  # [B, L, 3, H, d]
        parts = [qkv] if attn_bias is None else qkv.split(attn_bias.lengths, dim=1)
        return torch.cat([plain(part, scale) for part in parts], 1).unflatten(2, query.shape[2:])

    bias = types.SimpleNamespace(BlockDiagonalMask=BlockDiagonalMask)
    stand_in = types.SimpleNamespace(memory_efficient_attention=memory_efficient_attention, attn_bias=bias)
    monkeypatch.setattr(xformers, "fmha", lambda: stand_in)
    for lengths in (None, [5, 0, 12], [0, 0]):
        shape, packing = ((2, 9), (None, None)) if lengths is None else ((sum(lengths),), (offsets(lengths), 12))
        qkv, grad_out = random(*shape, 3, 2, 64), random(*shape, 128, seed=1)
        out, lse = xformers.run(qkv, *packing, 0.125)
        grad = xformers.run_backward(grad_out, qkv, out, lse, *packing, 0.125)
        check(qkv, grad_out, (out, grad), lengths)


def test_xformers_signatures():
    """The real package takes what the adapter gives it. Its kernels need a GPU."""
    fmha = pytest.importorskip("xformers.ops.fmha")
    q = random(1, 17, 2, 64)
    mask = fmha.attn_bias.BlockDiagonalMask.from_seqlens([5, 12], device=q.device)
    inspect.signature(fmha.memory_efficient_attention).bind(q, q, q, attn_bias=mask, scale=0.125)
    assert [part.shape[1] for part in mask.split(q)] == [5, 12]


def test_flops_are_counted_by_length():
    """4 L^2 d forward and 10 L^2 d backward for each sequence and head, as PyTorch counts its fused attention."""
    equal = torch.randn(3, 5, 3, 2, 32, requires_grad=True)
    packed = torch.randn(11, 3, 2, 32, requires_grad=True)
    for qkv, lengths in ((equal, [5, 5, 5]), (packed, [7, 0, 4])):
        cu = torch.tensor([0, *lengths]).cumsum(0).int() if qkv is packed else None
        for products, part in ((4, "forward"), (14, "both")):
            with FlopCounterMode(display=False, custom_mapping=mk.FLOPS) as counter:
                out = mk.attention(qkv, cu, None if cu is None else 7)
                if part == "both":
                    out.sum().backward()
            assert counter.get_total_flops() == products * 2 * 32 * sum(n * n for n in lengths)
