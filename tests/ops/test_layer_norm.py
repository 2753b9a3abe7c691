"""layer_norm: fp64 truth of values and gradients, hard rows, the same bits, layouts, what PyTorch sees, errors."""

import math

import pytest
import torch
import torch.nn.functional as F
from placing import here
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import maskdiff_kernels as mk
from maskdiff_kernels.ops.layer_norm import cpp, op, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (70, 1), (9, 3), (2, 5, 17), (130, 96), (1, 512), (67, 512), (33, 768)]
NAMES = ("out", "sum", "grad x", "grad weight", "grad bias", "grad shift")
ops = torch.ops.maskdiff


def random(*shape: int, seed: int = 0) -> Tensor:
    return here(torch.randn(shape, generator=torch.Generator().manual_seed(seed), device="cpu"))


def inputs(shape: tuple[int, ...], dtype: torch.dtype, rows: str = "plain") -> tuple[list[Tensor], list[Tensor]]:
    """x, weight, bias, shift; and the gradients of both outputs."""
    x, weight, bias, shift = random(*shape), 1 + random(shape[-1], seed=1), random(shape[-1], seed=2), random(shape[-1])
    x = {"plain": 0.5 + 2 * x, "far": 40 + x / 8, "constant": x[..., :1].expand(shape).clone()}[rows]
    grads = [random(*shape, seed=seed).to(dtype) for seed in (3, 4)]
    return [x.to(dtype), weight, bias, shift.to(dtype)], grads


def everything(run, given: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """Both outputs, and the gradients of the four inputs."""
    x, weight, bias, shift = (tensor.detach().requires_grad_() for tensor in given)
    outputs = run(x, weight, bias, shift)
    return [*(out.detach() for out in outputs), *torch.autograd.grad(outputs, (x, weight, bias, shift), grads)]


def ours(backend: str):
    return lambda x, weight, bias, shift: mk.layer_norm(x, weight, bias, shift=shift, backend=backend)


def plain(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    return F.layer_norm(x.to(weight.dtype), weight.shape, weight, bias).to(x.dtype), x + shift


@pytest.mark.parametrize("rows", ["plain", "far", "constant"])
@pytest.mark.usefixtures("poisoned")
def test_against_float64(implementation, rows):
    """Errors at most twice (gradients three times) those of plain PyTorch with float32 inside, plus one rounding; of
    what may cancel, a rounding of what is subtracted or added up."""
    for dtype in DTYPES:
        for shape in SHAPES:
            given, grads = inputs(shape, dtype, rows)
            truth = everything(plain, [t.double() for t in given], [g.double() for g in grads])
            peer, got = everything(plain, given, grads), everything(ours(implementation), given, grads)
            x, weight = (tensor.double() for tensor in given[:2])
            rstd = 1 / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
            normal, added = (x - x.mean(-1, keepdim=True)) * rstd, tuple(range(x.dim() - 1))
            terms = [*truth[:2], grads[0] * weight * rstd]
            terms += [term.double().abs().sum(added) for term in (grads[0] * normal, *grads)]
            for name, a, b, c, size in zip(NAMES, got, peer, truth, terms, strict=True):
                assert (a.dtype, a.shape) == (b.dtype, b.shape) and a.is_contiguous()
                rounding = torch.finfo(a.dtype).eps / 2
                for norm in (2, math.inf):
                    mine, other = ((value.double() - c).flatten().norm(norm).item() for value in (a, b))
                    allowed = (3 if "grad" in name else 2) * other + rounding * size.flatten().norm(norm).item()
                    said = f"{dtype} {shape} {name}: {mine:.2e}, plain PyTorch {other:.2e}"
                    assert mine <= allowed, f"{said}, allowed {allowed:.2e}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_constant_row_gives_the_bias(implementation, dtype):
    given, _ = inputs((7, 40), dtype, "constant")
    assert torch.equal(mk.layer_norm(*given[:3], backend=implementation), given[2].to(dtype).expand(7, 40))


def test_eps(implementation):
    (x, weight, bias, _), _ = inputs((5, 40), torch.float32)
    for eps in (0.0, 1e-6, 3.0):
        expected = F.layer_norm(x.double(), (40,), weight.double(), bias.double(), eps)
        got = mk.layer_norm(x, weight, bias, eps, backend=implementation)
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_in_its_row(implementation, dtype):
    for value in (math.nan, math.inf):
        for at in (0, 39):
            given, grads = inputs((5, 40), dtype)
            clean = everything(ours(implementation), given, grads)
            given[0][2, at] = value
            found = everything(ours(implementation), given, grads)
            others = [0, 1, 3, 4]
            for i in (0, 2):
                assert found[i][2].isnan().all() and torch.equal(found[i][others], clean[i][others])
            assert found[3].isnan().all() and torch.equal(found[4], clean[4])
            assert found[1].isfinite().sum() == 199


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_one_output_alone(backend):
    """Without shift, or where one of both outputs is not differentiated, the rest is as ever, to the bit."""
    given, grads = inputs((70, 40), torch.bfloat16)
    both = everything(ours(backend), given, [grads[0], torch.zeros_like(grads[1])])
    x, weight, bias, shift = (tensor.detach().requires_grad_() for tensor in given)
    out, summed = mk.layer_norm(x, weight, bias, shift=shift, backend=backend)
    alone = mk.layer_norm(x, weight, bias, backend=backend)
    assert torch.equal(out, both[0]) and torch.equal(alone, out)
    for each in (out, alone):
        got = torch.autograd.grad(each, (x, weight, bias), grads[0], retain_graph=True)
        assert all(map(torch.equal, got, both[2:5]))
    got = torch.autograd.grad(summed, (x, weight, shift), grads[1], allow_unused=True)
    assert torch.equal(got[0], grads[1]) and not (got[1] is not None and got[1].any())
    torch.testing.assert_close(got[2], grads[1].float().sum(0).bfloat16())


def test_the_sum_may_be_written_to(implementation):
    """As a block does, whose product adds itself onto it."""
    given, grads = inputs((20, 40), torch.float32)
    branch = random(40, 40, seed=5)

    def block(norm):
        def run(x, weight, bias, shift):
            out, summed = norm(x, weight, bias, shift)
            return (summed.addmm_(out.tanh(), branch),)

        return everything(run, given, grads[:1])

    torch.testing.assert_close(block(ours(implementation)), block(plain), rtol=1e-4, atol=1e-5)


# ---- the same bits ----


@pytest.mark.usefixtures("threads")
def test_every_thread_count_gives_the_same_bits(level):
    for dtype in DTYPES:
        for shape in ((300, 257), (2, 20000), (70, 512)):
            given, grads = inputs(shape, dtype)
            found = []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                found.append(everything(ours("cpp"), given, grads))
            assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


# ---- layouts ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("level")
def test_strides(dtype):
    wide, turned, packed = random(9, 70).to(dtype), random(65, 8).to(dtype), random(2, 4, 3, 65).to(dtype)
    layouts = [
        wide[1:, 3:68],
        turned.t(),
        packed[:, :, 1],
        packed[0, :, 2].expand(2, 4, 65),
        wide[:1, :65].expand(8, 65),
    ]
    for x in layouts:
        given, _ = inputs((1, 65), dtype)
        for grad in (x, torch.ones((), dtype=dtype).expand_as(x)):  # the second as sum() gives it
            expected = everything(ours("cpp"), [x.contiguous(), *given[1:]], [grad.contiguous()] * 2)
            got = everything(ours("cpp"), [x, *given[1:]], [grad] * 2)
            assert all(map(torch.equal, got, expected)) and got[0].is_contiguous()


def test_no_rows(implementation):
    for dtype in DTYPES:
        for shape in ((0, 33), (3, 0, 33)):
            *values, grad_weight, grad_bias, grad_shift = everything(ours(implementation), *inputs(shape, dtype))
            assert all(value.shape == shape for value in values)
            for grad in (grad_weight, grad_bias, grad_shift):
                assert torch.equal(grad, torch.zeros_like(grad)) and grad.shape == (33,)


# ---- as PyTorch sees it ----


def test_what_is_kept_for_the_backward():
    (x, weight, bias, shift), _ = inputs((7, 40), torch.bfloat16)
    out, _ = mk.layer_norm(x.requires_grad_(), weight, bias, shift=shift, backend="cpp")
    assert {tuple(tensor.shape) for tensor in out.grad_fn.saved_tensors} == {(7, 40), (40,), (2, 7)}
    for name in ("no_grad", "inference_mode"):
        with getattr(torch, name)():
            assert torch.equal(mk.layer_norm(x, weight, bias, backend="cpp"), out)
    assert mk.layer_norm(x.detach(), weight, bias, backend="cpp").grad_fn is None


def test_opcheck():
    given, (grad_out, grad_sum) = inputs((8, 17), torch.bfloat16)
    x, weight, bias, shift = given
    for some in (x, x[:0], random(8, 40)[:, 3:20].bfloat16()):
        for more in ((shift, 1e-5, True), (None, 0.1, False)):
            opcheck(ops.layer_norm.default, (some, weight, bias, *more))
    statistics = random(2, 8)
    for beside in (grad_sum, None):
        opcheck(ops.layer_norm_backward.default, (grad_out, beside, x, weight, statistics))


class Seen(TorchDispatchMode):
    """The ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(str(function))
        return function(*args, **(kwargs or {}))


def test_what_looks_on_sees_the_op():
    given, grads = inputs((8, 17), torch.bfloat16)
    expected = everything(ours("cpp"), given, grads)
    with Seen() as seen:
        found = everything(ours("cpp"), given, grads)
    assert {"maskdiff.layer_norm.default", "maskdiff.layer_norm_backward.default"} <= seen.names
    assert all(map(torch.equal, found, expected))
    with FakeTensorMode() as mode:
        given, grads = ([mode.from_tensor(tensor) for tensor in tensors] for tensors in (given, grads))
        for a, b in zip(everything(ours("cpp"), given, grads), expected, strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype


def test_fullgraph_compile():
    given, grads = inputs((9, 40), torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(ours("auto"), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(everything(compiled, given, grads), everything(ours("cpp"), given, grads))


def test_autocast_changes_nothing(implementation):
    for dtype in (torch.float32, torch.bfloat16):
        given, grads = inputs((9, 40), dtype)
        with torch.autocast(given[0].device.type, torch.bfloat16):
            inside = everything(ours(implementation), given, grads)
        assert all(map(torch.equal, inside, everything(ours(implementation), given, grads)))


def test_pytorch_takes_few_numbers_in_float32(monkeypatch):
    monkeypatch.delenv("MASKDIFF_KERNELS", raising=False)
    ran = []
    for name, module in (("cpp", cpp), ("reference", reference)):
        run = module.run
        monkeypatch.setattr(module, "run", lambda *a, name=name, run=run: (ran.append(name), run(*a))[1])
    rows = op.FEW // 64
    (x, weight, bias, _), _ = inputs((rows, 64), torch.float32)
    for given in (x, x[1:], x[1:].bfloat16()):
        mk.layer_norm(given, weight, bias)
    with mk.using(layer_norm="cpp"):
        mk.layer_norm(x[1:], weight, bias)
    assert ran == ["cpp", "reference", "cpp", "cpp"]


# ---- errors ----


def test_errors(implementation):
    (x, weight, bias, shift), _ = inputs((4, 8), torch.float32)
    narrow = weight[1:]
    for given, message, kind in (
        ((x.double(), weight, bias), "^x: got torch.float64, takes float32", TypeError),
        ((x.sum(), weight, bias), r"^x: got shape \[\], takes", ValueError),
        ((x[:, :0], weight[:0], bias[:0]), r"^x: got shape \[4, 0\], takes", ValueError),
        ((x, weight.bfloat16(), bias), "^weight: got torch.bfloat16, takes float32", TypeError),
        ((x, narrow, bias), r"^weight: got shape \[7\]", ValueError),
        ((x, weight, narrow), r"^bias: got shape \[7\]", ValueError),
        ((x, weight, weight.repeat(2)[::2]), r"^bias: got strides \[2\]", ValueError),
        ((x, weight, bias, -1.0), "^eps: got -1.0, takes", ValueError),
        ((x, weight, bias, math.nan), "^eps: got nan, takes", ValueError),
        ((x, weight, bias, 0.1, shift.bfloat16()), "^shift: got torch.bfloat16, takes", TypeError),
        ((x, weight, bias, 0.1, narrow), r"^shift: got shape \[7\]", ValueError),
    ):
        with pytest.raises(kind, match=message):
            mk.layer_norm(*given, backend=implementation)
    with pytest.raises(ValueError, match="^backend: got 'fast', layer_norm takes auto or one of cpp, reference"):
        mk.layer_norm(x, weight, bias, backend="fast")


def test_errors_past_the_public_function():
    (x, weight, bias, _), (grad, _) = inputs((4, 8), torch.float32)
    for wrong, kind in ((grad[1:], ValueError), (grad.bfloat16(), TypeError)):
        for name, grads in (("grad_out", (wrong, None)), ("grad_sum", (grad, wrong))):
            with pytest.raises(kind, match=f"^{name}: got .*, takes a tensor like x"):
                ops.layer_norm_backward(*grads, x, weight, random(2, 4))
    with pytest.raises(ValueError, match=r"^statistics: got shape \[2, 3\]"):
        ops.layer_norm_backward(grad, None, x, weight, random(2, 3))
    out, *_ = ops.layer_norm(x, weight.clone().requires_grad_(), bias, None, 1e-5, True)
    assert not out.requires_grad


def test_second_derivative_is_an_error():
    (x, weight, bias, _), _ = inputs((4, 8), torch.float32)
    out = mk.layer_norm(x.requires_grad_(), weight, bias, backend="cpp")
    with pytest.raises(RuntimeError, match="layer_norm has no second derivative"):
        torch.autograd.grad(out.sum(), x, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_library_refuses_what_it_does_not_know(monkeypatch, dtype):
    (x, weight, bias, _), (grad, _) = inputs((4, 8), dtype)
    monkeypatch.setitem(cpp.DTYPES, dtype, 7)
    for call in (
        lambda: cpp.run(x, weight, bias, None, 1e-5, True),
        lambda: cpp.run_backward(grad, None, x, weight, random(2, 4)),
    ):
        with pytest.raises(ValueError, match="got an option that the compiled library does not know"):
            call()
