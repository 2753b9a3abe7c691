"""product: fp64 truth at each instruction set with vectors of sixteen, layouts, the same bits, where it is taken."""

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from wide import build

from maskdiff_kernels import library
from maskdiff_kernels.ops import product

# T, N, K: a token without a pair, whole tiles and not, threads without a part, more rows and more columns; LONG: more
# depth than is packed at once, of tokens and of either width
SHAPES = [(1, 32, 32), (2, 64, 32), (27, 32, 96), (31, 96, 160), (33, 160, 64), (65, 64, 512), (257, 320, 32)]
LONG = [(4096 + 35, 64, 32), (9000, 32, 96), (70, 32, 4160), (3, 4160, 64)]
WIDE = [level for level in library.cpu_levels() if level not in ("baseline", "avx2")]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def given(tokens: int, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [T, K], weight [N, K], the gradient of their product [T, N], and what that is added to."""
    x, weight = random(tokens, columns), random(rows, columns, seed=1)
    return x, weight, random(tokens, rows, seed=2), random(tokens, rows, seed=3)


def all_three(x: Tensor, weight: Tensor, grad_out: Tensor, out: Tensor) -> list[Tensor]:
    return [
        product.add_linear(out.clone(), x, weight),
        product.input_gradient(grad_out, weight),
        product.weight_gradient(grad_out, x),
    ]


def exactly(x: Tensor, weight: Tensor, grad_out: Tensor, out: Tensor) -> list[Tensor]:
    """The same in the dtype that is given."""
    return [out + x @ weight.t(), grad_out @ weight, grad_out.t() @ x]


def check(shape: tuple[int, int, int]) -> None:
    """Errors at most twice those of PyTorch's products in float32, rounded, plus one rounding."""
    tensors = given(*shape)
    truths, peers = exactly(*(t.double() for t in tensors)), exactly(*(t.float() for t in tensors))
    for got, truth, peer in zip(all_three(*tensors), truths, peers, strict=True):
        assert got.dtype == torch.bfloat16 and got.shape == truth.shape and got.is_contiguous()
        for norm in (Tensor.norm, lambda x: x.abs().max()):
            error, plain = norm(got.double() - truth), norm(peer.bfloat16().double() - truth)
            assert error <= 2 * plain + torch.finfo(torch.bfloat16).eps / 2 * norm(truth), (shape, error, plain)


@pytest.mark.parametrize("level", WIDE)
@pytest.mark.usefixtures("poisoned")
def test_against_float64(level):
    with library.use_cpu_level(level):
        for shape in SHAPES + LONG:
            check(shape)


@pytest.mark.usefixtures("poisoned")
def test_against_float64_with_vectors_of_sixteen(tmp_path, monkeypatch):
    """On any processor."""
    wide = build("product", tmp_path)
    monkeypatch.setattr(library, "cpu", lambda: wide)
    for shape in SHAPES + LONG:
        check(shape)


@pytest.mark.parametrize("level", WIDE)
@pytest.mark.usefixtures("threads")
def test_the_same_bits_in_any_layout_and_on_any_number_of_threads(level):
    tensors = given(67, 160, 96)
    apart = [torch.cat([torch.full_like(t, torch.nan)[:, :32], t], dim=1)[:, 32:] for t in tensors[:3]]
    odd = [torch.cat([torch.full_like(t, torch.nan)[:, :33], t], dim=1)[:, 33:] for t in tensors[:3]]
    down = [t.t().contiguous().t() for t in tensors[:3]]  # columns that are dense
    with library.use_cpu_level(level):
        torch.set_num_threads(1)
        expected = all_three(*tensors)
        for threads in (2, 3, 8):
            torch.set_num_threads(threads)
            for x, weight, grad_out in (tensors[:3], apart, odd, down):
                got = all_three(x, weight, grad_out, tensors[3])
                assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


@pytest.mark.parametrize("level", WIDE)
def test_no_tokens(level):
    with library.use_cpu_level(level):
        added, of_x, of_weight = all_three(*given(0, 64, 32))
    assert added.shape == (0, 64) and of_x.shape == (0, 32)
    assert torch.equal(of_weight, torch.zeros(64, 32).bfloat16())


@pytest.mark.parametrize("level", WIDE)
def test_what_is_not_finite_stays_so_where_it_is(level):
    x, weight, grad_out, out = given(40, 64, 32)
    grad_out[39, 3], x[0, 5], out[7, 9] = torch.nan, torch.inf, -torch.inf
    with library.use_cpu_level(level):
        added, of_x, of_weight = (t.isfinite() for t in all_three(x, weight, grad_out, out))
    assert not added[0].any() and not added[7, 9] and added.sum() == 39 * 64 - 1
    assert not of_x[39].any() and of_x[:39].all()
    assert not of_weight[3].any() and not of_weight[:, 5].any() and of_weight.sum() == 63 * 31


@pytest.mark.parametrize("level", library.cpu_levels())
def test_what_is_refused(level):
    """Widths that are no multiples of a panel, none at all, rows out of line, vectors of less than sixteen."""
    two, four = random(2, 32), random(4, 32)
    calls = [
        lambda: product.add_linear(four.clone(), random(4, 48), random(32, 48)),
        lambda: product.input_gradient(random(4, 32), random(32, 48)),
        lambda: product.weight_gradient(random(4, 48), four),
        lambda: product.weight_gradient(four, random(4, 48)),
        lambda: product.add_linear(four.clone(), random(4, 0), random(32, 0)),
        lambda: product._product(four, random(32, 32), random(4, 48)[:, :32]),
        lambda: product._product(four, random(32, 32), random(5 * 32)[1:129].view(4, 32)),
    ]
    calls += [] if level in WIDE else [lambda: product.weight_gradient(two, two)]
    with library.use_cpu_level(level):
        for call in calls:
            with pytest.raises(ValueError, match="an option"):
                call()


@pytest.mark.parametrize("level", library.cpu_levels())
@pytest.mark.usefixtures("threads")
def test_where_it_is_taken(level):
    x, weight = random(4, 32), random(64, 32)
    torch.set_num_threads(2)
    with library.use_cpu_level(level):
        assert product.takes(x, weight) == (level == "amx_bf16")
        assert not product.takes(x.float(), weight) and not product.takes(x, weight.float())
        assert not product.takes(x, random(48, 32)) and not product.takes(x, random(64, 16))
        assert not product.takes(x.to("meta"), weight.to("meta"))
        assert not product.takes(torch.nn.Parameter(x), weight)
        with FlopCounterMode(display=False), FakeTensorMode() as mode:
            assert not product.takes(x, weight) and not product.takes(mode.from_tensor(x), mode.from_tensor(weight))
        torch.set_num_threads(3)
        assert not product.takes(x, weight)


@pytest.mark.usefixtures("threads")
def test_few_rows_and_columns_leave_a_thread_idle_and_one_thread_never():
    torch.set_num_threads(2)
    assert product.leaves_threads_idle(1032, 512, 2048) and product.leaves_threads_idle(216, 512, 1024)
    assert not product.leaves_threads_idle(2056, 512, 2048) and not product.leaves_threads_idle(1032, 1024, 2048)
    assert not product.leaves_threads_idle(1032, 512, 512)
    torch.set_num_threads(1)
    assert not product.leaves_threads_idle(1032, 512, 2048)
