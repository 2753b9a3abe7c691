"""gelu: fp64 truth of values, gradients and their sums by column, the tails, what is not finite, layouts, errors."""

import math

import pytest
import torch
import torch.nn.functional as F
from placing import here
from torch.library import opcheck

import maskdiff_kernels as mk
from maskdiff_kernels.ops.gelu import cpp, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1,), (3, 1), (2, 15), (17, 16), (5, 3, 33), (63, 64), (65, 66), (130, 257), (200, 100), (3, 9001)]
ops = torch.ops.maskdiff


def random(*shape: int, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return here(scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), device="cpu"))


def exact(x: torch.Tensor, grad_out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """In float64, precise in both tails: erfc, where F.gelu's 1 + erf loses all of Phi(-6)."""
    x, grad_out = x.double(), grad_out.double()
    phi = torch.special.erfc(-x / math.sqrt(2)) / 2
    return x * phi, grad_out * (phi + x * torch.exp(-x * x / 2) / math.sqrt(2 * math.pi))


def error(got: torch.Tensor, truth: torch.Tensor) -> tuple[float, float]:
    """The largest, and the norm."""
    difference = got.double() - truth
    return difference.abs().max().item(), difference.norm().item()


@pytest.mark.usefixtures("poisoned")
def test_against_float64(implementation):
    """Errors at most twice (gradients and sums three times) those of plain PyTorch, plus one rounding."""
    for dtype in DTYPES:
        half_step = torch.finfo(dtype).eps / 2
        for shape, scale in ((shape, scale) for shape in SHAPES for scale in (0.3, 2.0)):
            x = random(*shape, scale=scale).to(dtype).requires_grad_()
            grad_out = random(*shape, seed=1).to(dtype)
            truth, true_grad = exact(x.detach(), grad_out)
            plain = F.gelu(x)
            (plain_grad,) = torch.autograd.grad(plain, x, grad_out)
            got = mk.gelu(x, backend=implementation)
            (got_grad,) = torch.autograd.grad(got, x, grad_out)
            again, sums = ops.gelu_backward(grad_out, x.detach(), True, implementation)
            assert torch.equal(again, got_grad) and sums.dtype == torch.float32 and sums.shape == shape[-1:]
            true_sums = true_grad.reshape(-1, shape[-1]).sum(0)
            rows = (
                ("value", 2, got, plain, truth, half_step),
                ("gradient", 3, got_grad, plain_grad, true_grad, half_step),
                ("sums", 3, sums, plain_grad.reshape(-1, shape[-1]).float().sum(0), true_sums, 2**-24),
            )
            for name, times, a, b, c, rounding in rows:
                assert name == "sums" or (a.dtype, a.shape) == (dtype, x.shape)
                for kind, mine, peer, size in zip("mn", error(a, c), error(b, c), error(c, 0 * c), strict=True):
                    said = f"{dtype} {shape} {scale} {name} {kind}: {mine:.2e}, plain PyTorch {peer:.2e}, of {size:.2e}"
                    assert mine <= times * peer + rounding * size, said


def test_every_bfloat16(level):
    """Rounded once from within a millionth of itself, and a part in 2^27, at every number: in the tails too."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = x[x.isfinite()]
    truth, slope = exact(x, torch.ones_like(x))
    value = cpp.run(x.float())
    grad, _ = cpp.run_backward(torch.ones_like(value), x.float(), False)
    known = truth.abs() > 2**-100
    relative = ((value - truth) / truth)[known & (x > -8)].abs().max()
    print(f"{level}: relative {relative:.1e}, gradient {(grad - slope).abs().max():.1e}")
    assert relative < 5e-6
    assert (value[x <= -16].abs() < 1e-37).all() and (value[x >= 16] == x[x >= 16].float()).all()
    assert (grad - slope).abs().max() < 1e-6 and (grad[x.abs() >= 16] == (x[x.abs() >= 16] > 0)).all()
    halves = cpp.run(x)
    normal = value.abs() >= 2**-126  # the processor's own rounding makes 0 of what is below
    assert torch.equal(halves[normal], value.bfloat16()[normal])


def test_gradient_is_that_of_finite_differences(level):
    x = torch.linspace(-7, 7, 1401)
    step = 2.0**-7
    slopes = (cpp.run(x + step).double() - cpp.run(x - step).double()) / (2 * step)
    grad, _ = cpp.run_backward(torch.ones_like(x), x, False)
    assert (grad - slopes).abs().max() < 1e-4  # a third of the square of the step, and the roundings over it


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_so(implementation, dtype):
    for value in (math.nan, math.inf, -math.inf):
        for at in (0, 37):
            x = random(2, 40).to(dtype)
            x[1, at] = value
            x.requires_grad_()
            out = mk.gelu(x, backend=implementation)
            (grad,) = torch.autograd.grad(out.sum(), x)
            assert not out[1, at].isfinite() and not grad[1, at].isfinite()
            assert out.isfinite().sum() == grad.isfinite().sum() == x.numel() - 1
    nan = torch.full((2, 40), math.nan, dtype=dtype)
    assert ops.gelu_backward(nan, random(2, 40).to(dtype), True, implementation)[1].isnan().all()


# ---- the same bits ----


@pytest.mark.usefixtures("threads")
def test_every_thread_count_gives_the_same_bits(level):
    for dtype in DTYPES:
        for shape in ((300, 257), (1, 40000), (70, 512)):
            x, grad_out = random(*shape).to(dtype), random(*shape, seed=1).to(dtype)
            found = []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                found.append((cpp.run(x), *cpp.run_backward(grad_out, x, True)))
            assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


# ---- layouts ----


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_and_empty(implementation, dtype):
    wide, grad_wide = random(9, 70).to(dtype), random(70, 9, seed=1).to(dtype)
    results = []
    for copied in (False, True):
        x, grad_out = wide[1:, 3:68], grad_wide.t()[1:, 3:68]
        x, grad_out = (x.clone(), grad_out.contiguous()) if copied else (x, grad_out)
        x = x.detach().requires_grad_()
        out = mk.gelu(x, backend=implementation)
        results.append((out, *torch.autograd.grad(out, x, grad_out)))
        assert out.is_contiguous()
    assert all(map(torch.equal, *results))
    (grad,) = torch.autograd.grad(mk.gelu(x, backend=implementation).sum(), x)  # an expanded gradient
    assert torch.equal(grad, ops.gelu_backward(torch.ones_like(x), x.detach(), False, implementation)[0])
    for shape in ((0,), (0, 5), (5, 0)):
        x = torch.empty(shape, dtype=dtype, requires_grad=True)
        out = mk.gelu(x, backend=implementation)
        assert out.shape == torch.autograd.grad(out.sum(), x)[0].shape == shape
        assert (ops.gelu_backward(out.detach(), x.detach(), True, implementation)[1] == torch.zeros(shape[-1:])).all()


# ---- as PyTorch sees it ----


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_opcheck(backend):
    x = torch.randn(8, 17).bfloat16()
    for given in (x, x.t(), x.float()[:, 3:].requires_grad_(), x[:0]):
        opcheck(ops.gelu.default, (given, backend))
        for sums in (False, True):
            opcheck(ops.gelu_backward.default, (torch.ones_like(given), given.detach(), sums, backend))


def test_fullgraph_compile():
    weight = torch.randn(17, 33, requires_grad=True)
    torch._dynamo.reset()

    def step(x):
        return mk.gelu(x @ weight).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 17)
    got, expected = ((call(x), *torch.autograd.grad(call(x), weight)) for call in (compiled, step))
    torch.testing.assert_close(got, expected)


def test_autocast_changes_nothing(implementation):
    for dtype in (torch.float32, torch.bfloat16):
        x = random(3, 40).to(dtype).requires_grad_()
        with torch.autocast(x.device.type, torch.bfloat16):
            inside = mk.gelu(x, backend=implementation)
        assert inside.dtype == dtype and torch.equal(inside, mk.gelu(x, backend=implementation))


@pytest.mark.parametrize(("first", "second"), [("cpp", "reference"), ("reference", "cpp")])
def test_the_backward_is_by_the_implementation_of_the_forward(monkeypatch, first, second):
    ran = []
    for name, module in (("cpp", cpp), ("reference", reference)):
        run = module.run_backward
        monkeypatch.setattr(module, "run_backward", lambda *a, name=name, run=run: (ran.append(name), run(*a))[1])
    x = torch.randn(3, 5, requires_grad=True)
    with mk.using(gelu=first):
        out = mk.gelu(x)
    with mk.using(gelu=second):
        out.sum().backward()
    assert ran == [first]


# ---- errors ----


def test_errors(implementation):
    x = random(4, 5)
    for wrong, message, kind in (
        (x.double(), r"^x: got torch.float64, takes float32", TypeError),
        (x.int(), r"^x: got torch.int32", TypeError),
        (x.sum(), r"^x: got no dimension", ValueError),
    ):
        with pytest.raises(kind, match=message):
            mk.gelu(wrong, backend=implementation)
    with pytest.raises(ValueError, match=r"^backend: got 'fast', gelu takes auto or one of cpp, reference"):
        mk.gelu(x, backend="fast")
    for wrong, kind in ((x[1:], ValueError), (x.bfloat16(), TypeError)):
        with pytest.raises(kind, match=r"^grad_out: got .*, takes a tensor like x"):
            ops.gelu_backward(wrong, x, True, implementation)


def test_second_derivative_is_an_error(implementation):
    x = random(3, 5).requires_grad_()
    with pytest.raises(RuntimeError, match="gelu has no second derivative"):
        torch.autograd.grad(mk.gelu(x, backend=implementation).sum(), x, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_library_refuses_what_it_does_not_know(monkeypatch, dtype):
    x = torch.zeros(4, dtype=dtype)
    monkeypatch.setitem(cpp.DTYPES, dtype, 7)
    for call in (lambda: cpp.run(x), lambda: cpp.run_backward(x, x, True)):
        with pytest.raises(ValueError, match="got an option that the compiled library does not know"):
            call()
