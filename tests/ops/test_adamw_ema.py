"""adamw_ema: fp64 truth over several steps, skipping, layouts, the same bits everywhere, errors, compilers."""

import dataclasses
import math
import os
import signal
import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch
from placing import here
from torch import Tensor, nn

import maskdiff_kernels as mk
from maskdiff_kernels import library
from maskdiff_kernels.ops.adamw_ema import reference
from maskdiff_kernels.ops.adamw_ema.state import Update, flatten

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NUMBERS = {"betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.3, "ema_decay": 0.75, "ema2_decay": 0.25}
FLATS = ("master", "exp_avg", "exp_avg_sq", "ema", "ema2")
SIZES = [(1,), (15, 16, 17), (1, 512, 511, 513, 7), (4095, 4096, 4097), (16383, 16384, 16385, 3), (1_000_003,)]
NORM_ROUNDINGS = {"cpp": 1 + 64 + 3, "cuda": 1 + 3}  # of a square before it is part of a double: itself and sums
BOUNDS = (math.inf, 0.5, 1e6, 0.1, 3.0)  # of each step: none, reached or not


def numbers_of(implementation: str, **changes) -> dict:
    """NUMBERS with changes; apex takes the betas in float32."""
    numbers = NUMBERS | changes
    if implementation == "apex":
        numbers["betas"] = tuple(torch.tensor(numbers["betas"], device="cpu").tolist())
    return numbers


def make(sizes: Sequence[int], low: torch.dtype | None = None, gap: int = 0, two: bool = True) -> mk.AdamState:
    """Random masters that some updates have moved; `gap` elements lie before each parameter, half of them decay."""
    generator = torch.Generator().manual_seed(len(sizes))
    offsets = [gap + sum(sizes[:i]) + gap * i for i in range(len(sizes))]
    total = offsets[-1] + sizes[-1] + gap
    master, exp_avg, exp_avg_sq = (here(torch.randn(total, generator=generator, device="cpu")) for _ in range(3))
    counts = {"adam_step": torch.tensor(3.0), "ema_step": torch.tensor(1.0)}
    ends = {"offsets": offsets, "sizes": list(sizes), "decays": [i % 2 == 0 for i in range(len(sizes))]}
    state = mk.AdamState(master, 0.1 * exp_avg, exp_avg_sq.square(), master + 1, **counts, **ends)
    length = offsets[len(sizes) // 2] + sizes[len(sizes) // 2]
    copy = master[:length].to(low) if low is not None else None
    return dataclasses.replace(state, low=copy, ema2=master - 1 if two else None)


def clone(state: mk.AdamState, dtype: torch.dtype = FP32) -> mk.AdamState:
    """A copy; its flat buffers in `dtype`."""
    flats = {name: getattr(state, name) for name in (*FLATS, "adam_step", "ema_step")}
    copies = {name: None if flat is None else flat.to(dtype, copy=True) for name, flat in flats.items()}
    return dataclasses.replace(state, **copies, low=None if state.low is None else state.low.clone())


def gradients(state: mk.AdamState, step: int, dtypes: Sequence[torch.dtype] = (FP32,)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    drawn = [here(torch.randn(size, generator=generator, device="cpu")) for size in state.sizes]
    return [grad.to(dtypes[i % len(dtypes)]) for i, grad in enumerate(drawn)]


def hyper(step: int, bound: float = math.inf) -> Tensor:
    return torch.tensor([0.02 / (1 + step), bound])


def tensors(state: mk.AdamState) -> dict[str, Tensor]:
    values = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def parts(state: mk.AdamState, flat: Tensor) -> Tensor:
    """The parameters in a flat buffer, or in the beginning of one, without the gaps."""
    return torch.cat([flat[o : o + n] for o, n in zip(state.offsets, state.sizes, strict=True)])


def same_bits(a: mk.AdamState, b: mk.AdamState) -> bool:
    """Bit for bit, but for what lies in gaps."""
    theirs = tensors(b)
    for name, value in tensors(a).items():
        counts = value.dim() == 0
        x, y = (t.view(1) if counts else parts(a, t) for t in (value, theirs[name]))
        if not torch.equal(x.view(torch.uint8), y.view(torch.uint8)):
            return False
    return True


class Plain:
    """The same updates as one writes them with torch.optim.AdamW, in one dtype; nothing of the op is used."""

    def __init__(self, state: mk.AdamState, dtype: torch.dtype, numbers: dict = NUMBERS) -> None:
        self.numbers = numbers
        flats = {name: flat for name in FLATS if (flat := getattr(state, name)) is not None}
        cut = {
            name: [flat[o : o + n].to(dtype, copy=True) for o, n in zip(state.offsets, state.sizes, strict=True)]
            for name, flat in flats.items()
        }
        self.params, self.seen = [nn.Parameter(p) for p in cut["master"]], int(state.ema_step)
        groups = [
            {"params": [p], "weight_decay": numbers["weight_decay"] * decays}
            for p, decays in zip(self.params, state.decays, strict=True)
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=numbers["betas"], eps=numbers["eps"], foreach=False)
        for i, p in enumerate(self.params):
            moments = {name: cut[name][i] for name in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[p] = {"step": state.adam_step.to("cpu", copy=True), **moments}
        self.emas = {name: cut[name] for name in ("ema", "ema2") if name in cut}

    def step(self, grads: list[Tensor], hyper: Tensor) -> Tensor:
        lr, bound = hyper.tolist()
        for p, grad in zip(self.params, grads, strict=True):
            p.grad = grad.to(p.dtype, copy=True)
        norm = nn.utils.get_total_norm([p.grad for p in self.params])
        if norm > bound:
            for p in self.params:
                p.grad *= bound / norm
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.seen += 1
        every = self.numbers.get("ema_every", 1)
        for name, averages in self.emas.items() if self.seen % every == 0 else ():
            how, since = self.numbers[f"{name}_decay"], range(self.seen - every + 1, self.seen + 1)
            if isinstance(how, mk.PowerEma):
                decay = math.prod((1 - 1 / k) ** (how.gamma + 1) for k in since)
            else:
                decay = math.prod(min((1 + k) / (10 + k), how) for k in since)
            for average, p in zip(averages, self.params, strict=True):
                average.mul_(decay).add_(p.detach(), alpha=1 - decay)
        return norm

    def flats(self) -> dict[str, Tensor]:
        moments = {name: [self.optimizer.state[p][name] for p in self.params] for name in ("exp_avg", "exp_avg_sq")}
        return {
            name: torch.cat([x.detach() for x in xs])
            for name, xs in {"master": self.params, **moments, **self.emas}.items()
        }


# ---- the truth ----


class Errors:
    """Those of a state and of plain PyTorch in float32, against plain PyTorch in float64."""

    def __init__(self, state: mk.AdamState, numbers: dict = NUMBERS) -> None:
        self.state, self.truth, self.plain = state, Plain(state, torch.float64, numbers), Plain(state, FP32, numbers)
        self.largest = {name: exact.abs().max() for name, exact in self.truth.flats().items()}

    def step(self, grads: list[Tensor], hyper: Tensor) -> tuple[Tensor, Tensor]:
        """Steps of both; their norms, the exact one first."""
        return self.truth.step(grads, hyper), self.plain.step(grads, hyper)

    def check(self, step: int) -> None:
        """At most twice plain PyTorch's, plus one rounding of the largest number that the buffer has held: a moment may
        be the small difference of two products that were rounded."""
        for (name, exact), peer in zip(self.truth.flats().items(), self.plain.flats().values(), strict=True):
            self.largest[name] = torch.maximum(self.largest[name], exact.abs().max())
            got = parts(self.state, getattr(self.state, name))
            error, peer_error = ((x.double() - exact).abs().max() for x in (got, peer))
            print(f"{step} {name}: {error:.2e}, plain PyTorch {peer_error:.2e}")
            assert error <= 2 * peer_error + 2**-24 * self.largest[name], (step, name)


@pytest.mark.parametrize("low", [None, BF16, FP16])
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "-".join(map(str, sizes)))
@pytest.mark.usefixtures("poisoned")
def test_against_float64(implementation, sizes, low):
    """After every step; that of the norm: as few roundings as our kernels make, or twice plain PyTorch's worst and one
    more."""
    if implementation == "apex" and sizes == (1,):
        pytest.skip("apex's formula rounds more often than PyTorch's; among several elements others are as unlucky")
    state, fixed, norms = make(sizes, low, gap=3), numbers_of(implementation), []
    errors = Errors(state, fixed)
    dtypes = (FP32,) if low is None else (low, FP32, low)
    for step, bound in enumerate(BOUNDS):
        grads, numbers = gradients(state, step, dtypes), hyper(step, bound)
        exact, peer = errors.step(grads, numbers)
        norm, skipped = mk.adamw_ema(state, grads, numbers, **fixed, backend=implementation)
        assert norm.dtype == skipped.dtype == FP32 and norm.shape == skipped.shape == () and skipped == 0
        norms.append(torch.stack([norm - exact, peer - exact]).abs() / (2**-24 * exact))
        errors.check(step)
        assert state.adam_step == 4 + step and state.ema_step == 2 + step
        if low is not None:
            written = [slice(o, o + n) for o, n in zip(state.offsets, state.sizes, strict=True)]
            assert all(torch.equal(state.low[s], state.master[s].to(low)[: len(state.low[s])]) for s in written)
    most, peers = torch.stack(norms).amax(0)
    print(f"norm: {most:.2f} roundings, plain PyTorch {peers:.2f}")
    assert most <= (NORM_ROUNDINGS[implementation] / 2 + 1 if implementation in NORM_ROUNDINGS else 2 * peers + 1)


@pytest.mark.parametrize("sizes", SIZES[:4])
def test_the_reference_in_float64_is_plain_adamw(sizes):
    state = make(sizes)
    mine, plain = clone(state, torch.float64), Plain(state, torch.float64)
    for step, bound in enumerate(BOUNDS):
        grads, numbers = gradients(state, step), hyper(step, bound)
        norm, skipped = reference.run(Update(*flatten(mine, grads, numbers, *NUMBERS.values())))
        assert norm.dtype == torch.float64 and skipped == 0
        torch.testing.assert_close(norm, plain.step(grads, numbers), rtol=1e-14, atol=0)
        for name, exact in plain.flats().items():
            torch.testing.assert_close(getattr(mine, name), exact, rtol=1e-12, atol=1e-13)


def test_every_implementation_makes_the_same_step(implementation):
    """From the state of the reference in float64, rounded, before each step: one step differs by roundings alone."""
    exact = clone(make((300, 17, 1000), BF16), torch.float64)
    for step, bound in enumerate(BOUNDS):
        grads, numbers = gradients(exact, step, (BF16, FP32)), hyper(step, bound)
        state = clone(exact)
        mk.adamw_ema(state, [grad.clone() for grad in grads], numbers, **NUMBERS, backend=implementation)
        reference.run(Update(*flatten(exact, grads, numbers, *NUMBERS.values())))
        for name in FLATS:
            torch.testing.assert_close(getattr(state, name).double(), getattr(exact, name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("every", "two"), [(1, True), (3, True), (10, True), (10, False)])
def test_every_implementation_goes_the_same_way(implementation, every, two):
    """Over 50 steps from the start of a run, left to itself; the first average's decay is final from step 35 on."""
    state = make((300, 17, 1000), BF16, gap=3, two=two)
    for count in (state.adam_step, state.ema_step):
        count.zero_()
    for moments in (state.exp_avg, state.exp_avg_sq):
        moments.zero_()
    fixed = numbers_of(implementation, ema_decay=0.8, ema2_decay=mk.PowerEma.of_width(0.1), ema_every=every)
    errors = Errors(state, fixed)
    for step in range(50):
        grads, numbers = gradients(state, step, (BF16, FP32)), hyper(step, 20.0 + step)  # norms are some 36
        errors.step(grads, numbers)
        mk.adamw_ema(state, grads, numbers, **fixed, backend=implementation)
        errors.check(step)
    assert state.adam_step == state.ema_step == 50


@pytest.mark.parametrize("seen", [0, 1, 7, 26, 27, 28, 10_000_000])
def test_decay_of_the_averages_rises(implementation, seen):
    """(1 + k) / (10 + k) up to the final decay, which 0.75 is from k = 26 on; its own count, not AdamW's."""
    state = make((33,))
    state.ema_step.fill_(seen)
    before = state.ema.double(), state.ema2.double()
    mk.adamw_ema(state, gradients(state, 0), hyper(0), **NUMBERS, backend=implementation)
    for after, old, most in zip((state.ema, state.ema2), before, (0.75, 0.25), strict=True):
        decay = min((2 + seen) / (11 + seen), most)
        torch.testing.assert_close(after.double(), decay * old + (1 - decay) * state.master.double(), rtol=0, atol=1e-6)
    assert state.ema_step == seen + 1 and state.adam_step == 4


@pytest.mark.parametrize("gamma", [0.0, 6.94, 97.0, 1e4])
@pytest.mark.parametrize(
    ("seen", "every"), [*((k, 1) for k in (0, 1, 2, 6, 1000, 10_000_000)), (2, 3), (5, 3), (9_999_999, 1000)]
)
def test_decay_by_a_power_function(implementation, seen, every, gamma):
    """(1 - every/k)^(gamma + 1) at update k = seen + 1, of one average or the other; share and product round."""
    share = 1.0 if seen + 1 == every else -math.expm1((gamma + 1) * math.log1p(-every / (seen + 1)))
    for name, changes in (("ema", {"ema_decay": mk.PowerEma(gamma)}), ("ema2", {"ema2_decay": mk.PowerEma(gamma)})):
        state = make((33,))
        state.ema_step.fill_(seen)
        getattr(state, name).zero_()
        fixed = NUMBERS | changes | {"ema_every": every}
        mk.adamw_ema(state, gradients(state, 0), hyper(0), **fixed, backend=implementation)
        torch.testing.assert_close(getattr(state, name).double(), share * state.master.double(), rtol=2**-23, atol=0)
        other = {"ema": state.ema2, "ema2": state.ema}[name]
        assert not torch.equal(other, getattr(state, name))


@pytest.mark.parametrize("every", [2, 1000])
@pytest.mark.parametrize("two", [False, True])
def test_averages_that_are_not_due_stay_as_they_are(implementation, every, two):
    """Bit for bit, also what arithmetic would change, where kernels are to leave them alone; all else goes on as ever.
    They have seen one update; of the four here the second is skipped, so for 2 the first and the last are due."""
    state, fixed = make((300, 17, 1000), BF16, gap=3, two=two), NUMBERS | {"ema_every": every}
    other, averages = clone(state), ("ema", "ema2") if two else ("ema",)
    for step, bad in enumerate((False, True, False, False)):
        if implementation in ("cpp", "cuda") and step > 0:
            for name in averages:
                getattr(state, name).view(torch.int32).fill_(0x7FA00001)  # a NaN that arithmetic makes another one
        before, grads = clone(state), gradients(state, step, (BF16, FP32))
        if bad:
            grads[0][0] = math.nan
        mk.adamw_ema(other, [grad.clone() for grad in grads], hyper(step), **NUMBERS, backend=implementation)
        mk.adamw_ema(state, grads, hyper(step), **fixed, backend=implementation)
        for name in averages:
            left = torch.equal(*(getattr(x, name).view(torch.int32) for x in (state, before)))
            assert left == (every == 1000 or step in (1, 2)), (step, name)
        assert same_bits(*(dataclasses.replace(x, ema=x.master, ema2=None) for x in (state, other)))


PROGRAM = """
import ctypes, mmap, torch
import maskdiff_kernels as mk
memory = mmap.mmap(-1, 1 << 16)
ema = torch.frombuffer(memory, dtype=torch.float32)
libc = ctypes.CDLL(None)
assert libc.mprotect(ctypes.c_void_p(ema.data_ptr()), ctypes.c_size_t(1 << 16), 0) == 0
flats, counts = [torch.zeros(1 << 14) for _ in range(3)], [torch.zeros(()), torch.zeros(())]
state = mk.AdamState(*flats, ema, *counts, offsets=[0], sizes=[1 << 14], decays=[True], ema2=ema)
for step in range(3):
    mk.adamw_ema(state, [flats[0] + 1], torch.ones(2), (0.9, 0.99), 1e-8, 0.0, 0.9, 0.9, ema_every=3, backend="cpp")
    print(int(state.ema_step), flush=True)
"""


@pytest.mark.parametrize("name", library.cpu_levels())
def test_the_compiled_code_does_not_even_read_averages_that_are_not_due(name):
    """They lie in memory that the process may not touch: the third update, for which they are due, is its end."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "MASKDIFF_CPU_ISA": name}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert done.stdout == "1\n2\n" and done.returncode == -signal.SIGSEGV, done.stderr


def test_power_function_averages_of_gamma_0_are_means(implementation):
    state, fixed = make((40, 9), two=False), NUMBERS | {"ema_decay": mk.PowerEma(0)}
    state.ema_step.zero_()
    masters = []
    for step in range(7):
        mk.adamw_ema(state, gradients(state, step), hyper(step), **fixed, backend=implementation)
        masters.append(state.master.double())
    torch.testing.assert_close(state.ema.double(), torch.stack(masters).mean(0), rtol=0, atol=1e-6)


def test_an_update_that_is_skipped_first_leaves_a_power_average(implementation):
    """At a count of 0, where 1 / k is infinite."""
    state = make((40,))
    state.ema_step.zero_()
    before = clone(state)
    _, skipped = mk.adamw_ema(
        state,
        [torch.full((40,), math.nan)],
        hyper(0),
        **NUMBERS | {"ema_decay": mk.PowerEma(3.0), "ema2_decay": mk.PowerEma(0)},
        backend=implementation,
    )
    assert skipped == 1 and same_bits(state, before)


def test_zero_gradients_and_a_bound_of_zero(implementation):
    state = make((40, 9))
    old = clone(state)
    norm, skipped = mk.adamw_ema(
        state, [torch.zeros(40), torch.zeros(9)], hyper(0, 0.0), **NUMBERS, backend=implementation
    )
    assert norm == 0 and skipped == 0
    torch.testing.assert_close(state.exp_avg, 0.9 * old.exp_avg)
    assert state.master.isfinite().all() and not torch.equal(state.master, old.master)


# ---- skipping ----


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize(("segment", "element"), [(0, 0), (1, 16), (2, 699)])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_a_gradient_that_is_not_finite_changes_nothing(implementation, bad, segment, element, dtype):
    """1e30 is finite (but in float16), its square is not."""
    state = make((20, 17, 700), BF16)
    state.low.fill_(3.0)  # not the rounded masters, which would hide that they are rounded once more
    before = clone(state)
    grads = gradients(state, 0, (dtype,))
    grads[segment][element] = bad
    norm, skipped = mk.adamw_ema(state, grads, hyper(0, 1.0), **NUMBERS, backend=implementation)
    assert skipped == 1 and not norm.isfinite()
    assert norm.isnan() == math.isnan(bad)
    assert same_bits(state, before)
    for trained in (state, before):
        _, skipped = mk.adamw_ema(trained, gradients(state, 1), hyper(1), **NUMBERS, backend=implementation)
        assert skipped == 0
    assert same_bits(state, before)


def test_the_sum_of_squares_must_be_finite_in_float32(implementation):
    """Each square is; so is the norm itself."""
    state = make((1000,))
    before = clone(state)
    for value, expected in ((1.5e18, 1), (1e17, 0)):
        norm, skipped = mk.adamw_ema(state, [torch.full((1000,), value)], hyper(0), **NUMBERS, backend=implementation)
        assert skipped == expected and norm.isinf() == bool(expected)
        assert same_bits(state, before) == bool(expected)


# ---- layouts ----


@pytest.mark.parametrize("low", [None, BF16])
def test_a_flat_gradient_is_a_list_of_its_parts(implementation, low):
    state = make((5, 600, 33), low, gap=11)
    other, grads = clone(state), gradients(state, 0)
    flat = torch.full_like(state.master, math.nan)
    for offset, grad in zip(state.offsets, grads, strict=True):
        flat[offset : offset + grad.numel()] = grad
    norms = [
        mk.adamw_ema(target, given, hyper(0, 0.3), **NUMBERS, backend=implementation)[0]
        for target, given in ((state, flat), (other, grads))
    ]
    assert torch.equal(*norms) and same_bits(state, other)


def test_what_lies_between_parameters_has_no_influence(implementation):
    """A parameter of any rank, gaps of NaN."""
    state = make((6, 40, 512), BF16, gap=5)
    other, grads = clone(state), gradients(state, 0, (BF16, FP32))
    hole = torch.ones_like(state.master, dtype=torch.bool)
    for offset, size in zip(state.offsets, state.sizes, strict=True):
        hole[offset : offset + size] = False
    for name in FLATS:
        getattr(other, name)[hole] = math.nan
    shaped = [grads[0].view(2, 3), grads[1].view(5, 4, 2), grads[2]]
    results = [
        mk.adamw_ema(target, [grad.clone() for grad in given], hyper(0, 0.3), **NUMBERS, backend=implementation)
        for target, given in ((state, grads), (other, shaped))
    ]
    assert torch.equal(results[0][0], results[1][0]) and same_bits(state, other)


@pytest.mark.parametrize("name", library.cpu_levels())
def test_the_compiled_code_leaves_gaps_and_gradients_alone(name):
    state = make((6, 40, 512), BF16, gap=5)
    before, grads = clone(state), gradients(state, 0)
    kept = [grad.clone() for grad in grads]
    with library.use_cpu_level(name):
        mk.adamw_ema(state, grads, hyper(0, 0.3), **NUMBERS, backend="cpp")
    assert all(map(torch.equal, grads, kept))
    ends = [offset + size for offset, size in zip(state.offsets, state.sizes, strict=True)]
    for flat in FLATS:
        for begin in (0, *ends):
            hole = slice(begin, begin + 5)
            assert torch.equal(getattr(state, flat)[hole], getattr(before, flat)[hole])


@pytest.mark.parametrize("length", [0, 1, 17, 18, 600, 700, 720])
def test_the_copy_ends_where_it_ends(implementation, length):
    """Also within a parameter; what lies behind it in memory is left alone."""
    state, memory = make((17, 703)), torch.full((800,), 7.0, dtype=BF16)
    state = dataclasses.replace(state, low=memory[:length])
    mk.adamw_ema(state, gradients(state, 0), hyper(0), **NUMBERS, backend=implementation)
    assert torch.equal(memory[:length], state.master[:length].bfloat16()) and (memory[length:] == 7).all()


def test_one_average_or_two(implementation):
    """The second changes nothing else."""
    two = make((100, 30), BF16)
    one = dataclasses.replace(clone(two), ema2=None)
    for step in range(2):
        for state in (one, two):
            mk.adamw_ema(state, gradients(state, step), hyper(step), **NUMBERS, backend=implementation)
    assert same_bits(one, two)


# ---- the same bits ----


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("low", "every"), [(None, 1), (BF16, 3), (FP16, 1)])
def test_every_level_and_thread_count_gives_the_same_bits(low, every):
    start, fixed = make((70_001, 3, 16384, 9000, 30_000), low, gap=7), NUMBERS | {"ema_every": every}
    results = []
    for name in library.cpu_levels():
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            state = clone(start)
            with library.use_cpu_level(name):
                norms = [
                    mk.adamw_ema(
                        state, gradients(state, step, (FP32, BF16, FP16)), hyper(step, 2.0), **fixed, backend="cpp"
                    )[0]
                    for step in range(3)
                ]
            results.append((torch.stack(norms), state))
    for norms, state in results[1:]:
        assert torch.equal(norms, results[0][0]) and same_bits(state, results[0][1])


# ---- as PyTorch sees it ----


@pytest.mark.parametrize("backend", ["cpp", "torch", "reference"])
@pytest.mark.parametrize("low", [None, BF16])
def test_opcheck(backend, low):
    state = make((7, 30), low, two=low is not None)
    flat = flatten(state, gradients(state, 0), hyper(0, 1.0), *NUMBERS.values(), 2 if low is None else 1)
    torch.library.opcheck(torch.ops.maskdiff.adamw_ema.default, (*flat, backend))


@pytest.mark.parametrize("compiler", ["inductor", "aot_eager"])
def test_fullgraph_compile(compiler):
    torch._dynamo.reset()
    compiled = torch.compile(mk.adamw_ema, fullgraph=True, backend=compiler)
    state, fixed = make((7, 300), BF16), NUMBERS | {"ema2_decay": mk.PowerEma(3.0), "ema_every": 2}
    other = clone(state)
    for step in range(2):
        numbers = hyper(step, 1.0)
        got = compiled(state, gradients(state, step), numbers, **fixed)
        expected = mk.adamw_ema(other, gradients(state, step), numbers, **fixed)
        assert all(map(torch.equal, got, expected)) and same_bits(state, other)


def test_the_update_counts_as_a_change_in_place():
    state = make((7, 30), BF16)
    before = {name: tensor._version for name, tensor in tensors(state).items()}
    mk.adamw_ema(state, gradients(state, 0), hyper(0), **NUMBERS)
    assert all(tensor._version > before[name] for name, tensor in tensors(state).items())


# ---- errors ----


@pytest.mark.parametrize("backend", ["cpp", "torch", "reference"])
@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, r"^state.master: got torch.float64, takes float32 \[N\]", {"master": torch.zeros(50).double()}),
        (ValueError, r"^state.master: got shape \[5, 10\]", {"master": torch.zeros(5, 10)}),
        (ValueError, r"^state.exp_avg: got shape \[49\]", {"exp_avg": torch.zeros(49)}),
        (TypeError, r"^state.exp_avg_sq: got torch.bfloat16", {"exp_avg_sq": torch.zeros(50).bfloat16()}),
        (ValueError, r"^state.ema: got strides \[2\]", {"ema": torch.zeros(100)[::2]}),
        (TypeError, r"^state.low: got torch.float32, takes bfloat16 or float16", {"low": torch.zeros(50)}),
        (ValueError, r"^state.low: got 51 elements, takes at most 50", {"low": torch.zeros(51).bfloat16()}),
        (TypeError, r"^state.adam_step: got torch.int64", {"adam_step": torch.tensor(1)}),
        (ValueError, r"^state.ema_step: got shape \[1\]", {"ema_step": torch.zeros(1)}),
        (ValueError, r"^state.offsets: got none", {"offsets": [], "sizes": [], "decays": [], "grads": []}),
        (ValueError, r"^state.sizes: got 3, takes 2", {"sizes": [1, 1, 1]}),
        (ValueError, r"^state.decays: got 1, takes 2", {"decays": [True]}),
        (ValueError, r"^state.offsets\[1\]: got 19 for 30 elements, takes at least 20", {"offsets": [0, 19]}),
        (ValueError, r"^state.offsets\[0\]: got -1", {"offsets": [-1, 20]}),
        (ValueError, r"^state.offsets\[1\]: got 20 for 0 elements", {"sizes": [20, 0]}),
        (ValueError, r"^state.sizes: got parameters up to element 51, takes at most 50", {"offsets": [0, 21]}),
        (ValueError, r"^grads: got 1, takes 2", {"grads": [torch.zeros(20)]}),
        (TypeError, r"^grads\[1\]: got torch.float64", {"grads": [torch.zeros(20), torch.zeros(30).double()]}),
        (ValueError, r"^grads\[0\]: got 21 elements, takes 20", {"grads": [torch.zeros(21), torch.zeros(30)]}),
        (ValueError, r"^grads\[1\]: got strides", {"grads": [torch.zeros(20), torch.zeros(6, 5).t()]}),
        (ValueError, r"^grads: got shape \[49\]", {"grads": torch.zeros(49)}),
        (TypeError, r"^grads: got torch.bfloat16, takes float32 \[N\]", {"grads": torch.zeros(50).bfloat16()}),
        (TypeError, r"^hyper: got torch.float64", {"hyper": torch.zeros(2).double()}),
        (ValueError, r"^hyper: got shape \[3\]", {"hyper": torch.zeros(3)}),
        (ValueError, r"^betas\[1\]: got 1.0, takes 0 to below 1", {"betas": (0.9, 1.0)}),
        (ValueError, r"^betas\[0\]: got nan", {"betas": (math.nan, 0.9)}),
        (ValueError, r"^eps: got -1.0", {"eps": -1.0}),
        (ValueError, r"^weight_decay: got -0.1", {"weight_decay": -0.1}),
        (ValueError, r"^ema_decay: got 1.5, takes 0 to 1", {"ema_decay": 1.5}),
        (ValueError, r"^ema2_decay: got -1", {"ema2_decay": -1.0}),
        (ValueError, r"^ema_every: got 0, takes 1 to 1000", {"ema_every": 0}),
        (ValueError, r"^ema_every: got 1001", {"ema_every": 1001}),
    ],
)
def test_errors(backend, error, message, change):
    """Nothing is changed then."""
    state = make((20, 30))
    names = {field.name for field in dataclasses.fields(state)}
    before = clone(state)
    odd = dataclasses.replace(state, **{name: value for name, value in change.items() if name in names})
    arguments = {"grads": gradients(state, 0), "hyper": hyper(0), **NUMBERS, "backend": backend}
    with pytest.raises(error, match=message):
        mk.adamw_ema(odd, **arguments | {name: value for name, value in change.items() if name not in names})
    assert same_bits(state, before)


def test_tensors_on_several_devices():
    state = make((20, 30))
    grads, there = gradients(state, 0), torch.zeros(50, device="meta")
    for odd, given, named in (
        (dataclasses.replace(state, ema2=there), grads, "state.ema2"),
        (state, [grads[0], there[:30]], r"grads\[1\]"),
    ):
        update = Update(*flatten(odd, given, hyper(0), *NUMBERS.values()))
        with pytest.raises(ValueError, match=f"^{named}: got a tensor on meta, takes one on cpu"):
            update.check()
