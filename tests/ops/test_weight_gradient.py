"""weight_gradient: fp64 truth at each instruction set with vectors of sixteen, layouts, same bits, when it is taken."""

import pytest
import torch
from torch import Tensor
from wide import build

from maskdiff_kernels import library
from maskdiff_kernels.ops import weight_gradient

# tokens, N, K: a token without a pair, whole tiles and not, threads without a part, more rows and more columns; LONG:
# more tokens than are packed at once
SHAPES = [(1, 32, 32), (2, 64, 32), (27, 32, 96), (31, 96, 160), (33, 160, 64), (65, 64, 512), (257, 320, 32)]
LONG = [(4096 + 35, 64, 32), (9000, 32, 96)]
WIDE = [level for level in library.cpu_levels() if level not in ("baseline", "avx2")]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def check(tokens: int, rows: int, columns: int) -> None:
    """Errors at most twice those of PyTorch's product with sums in float32, plus one rounding."""
    grad_out, x = random(tokens, rows), random(tokens, columns, seed=1)
    got = weight_gradient.run(grad_out, x)
    assert got.dtype == torch.bfloat16 and got.shape == (rows, columns) and got.is_contiguous()
    truth = grad_out.double().t() @ x.double()
    plain = (grad_out.float().t() @ x.float()).bfloat16()
    for norm in (Tensor.norm, lambda x: x.abs().max()):
        error, peer = norm(got.double() - truth), norm(plain.double() - truth)
        assert error <= 2 * peer + torch.finfo(torch.bfloat16).eps / 2 * norm(truth), (tokens, rows, columns)


@pytest.mark.parametrize("level", WIDE)
@pytest.mark.usefixtures("poisoned")
def test_against_float64(level):
    with library.use_cpu_level(level):
        for shape in SHAPES + LONG:
            check(*shape)


@pytest.mark.usefixtures("poisoned")
def test_against_float64_with_vectors_of_sixteen(tmp_path, monkeypatch):
    """On any processor."""
    wide = build("weight_gradient", tmp_path)
    monkeypatch.setattr(library, "cpu", lambda: wide)
    for shape in SHAPES + LONG[:1]:
        check(*shape)


@pytest.mark.parametrize("level", WIDE)
@pytest.mark.usefixtures("threads")
def test_the_same_bits_in_any_layout_and_on_any_number_of_threads(level):
    grad_out, x = random(67, 160), random(67, 96, seed=1)
    with library.use_cpu_level(level):
        torch.set_num_threads(1)
        expected = weight_gradient.run(grad_out, x)
        for threads in (2, 3, 8):
            torch.set_num_threads(threads)
            apart = torch.cat([random(67, 32), grad_out], dim=1)[:, 32:]  # rows further apart than they are long
            down = x.t().contiguous().t()  # columns that are dense
            for pair in ((grad_out, x), (apart, x), (grad_out, down), (apart, down)):
                assert torch.equal(weight_gradient.run(*pair), expected)


def test_no_tokens_and_no_rows():
    for level in WIDE[-1:]:
        with library.use_cpu_level(level):
            assert torch.equal(weight_gradient.run(random(0, 32), random(0, 64)), torch.zeros(32, 64).bfloat16())
            assert weight_gradient.run(random(3, 0), random(3, 64)).shape == (0, 64)


def test_what_is_not_finite_stays_so_where_it_is():
    grad_out, x = random(40, 64), random(40, 32, seed=1)
    grad_out[39, 3], x[0, 5] = torch.nan, torch.inf
    for level in WIDE:
        with library.use_cpu_level(level):
            got = weight_gradient.run(grad_out, x).isfinite()
        assert not got[3].any() and not got[:, 5].any() and got[4:, :5].all() and got[:3, 6:].all()


def test_widths_that_are_no_multiple_of_a_panel_are_refused():
    for level in WIDE[-1:]:
        with library.use_cpu_level(level), pytest.raises(ValueError, match="an option"):
            weight_gradient.run(random(4, 48), random(4, 32))


@pytest.mark.parametrize("level", library.cpu_levels())
def test_when_it_is_taken(level):
    grad_out, x = random(4, 64), random(4, 32)
    with library.use_cpu_level(level):
        assert weight_gradient.takes(grad_out, x) == (level == "amx_bf16")
        assert not weight_gradient.takes(grad_out.float(), x.float())
        assert not weight_gradient.takes(random(4, 48), x) and not weight_gradient.takes(grad_out, random(4, 16))
        assert not weight_gradient.takes(grad_out.to("meta"), x.to("meta"))
