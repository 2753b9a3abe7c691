"""The Triton kernels of images have the bits of the C++: on a GPU, or on the CPU in Triton's interpreter.

pytest runs this file in a process of its own (see test_images_triton.py): what triton does is settled as it is
imported.
"""

import dataclasses
from collections.abc import Callable

import pytest
import test_draw_batch
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import opcheck

import maskdiff_kernels as mk
from maskdiff_kernels import triton_package
from maskdiff_kernels.ops.denoising_loss import triton_host as loss_host
from maskdiff_kernels.ops.draw_batch import triton_host as draw_host
from maskdiff_kernels.ops.draw_batch import triton_kernel as draw_kernel
from maskdiff_kernels.ops.noisy_patches import triton_host as noisy_host
from maskdiff_kernels.ops.samples import flatten
from maskdiff_kernels.triton_package import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def moved(given):
    """To the device that Triton runs on: a tensor, a store or a batch."""
    if isinstance(given, Tensor):
        return given.to(DEVICE)
    if not dataclasses.is_dataclass(given):
        return given
    return dataclasses.replace(given, **{f.name: moved(getattr(given, f.name)) for f in dataclasses.fields(given)})


def same(got: Tensor, expected: Tensor) -> bool:
    """To the bit, but for which NaN."""
    got = got.cpu()
    return got.dtype == expected.dtype and torch.equal(got.nan_to_num(7e4), expected.nan_to_num(7e4))


# ---- draw_batch ----

MASKS = [
    ((5, 7), mk.Mask("patch", counts=(34,))),
    ((64, 64), mk.Mask("patch", counts=(409,))),
    ((6, 9), mk.Mask("block", 3, (18,))),
    ((5, 7), mk.Mask("crop", counts=(16,))),
    ((5, 7), mk.Mask("patch", counts=(1, 35))),
    ((8, 8), mk.Mask("block", 2, (4, 64))),
    ((5, 7), mk.Mask("crop", counts=(1, 25))),
]


@pytest.mark.parametrize(("grid", "mask"), MASKS, ids=lambda value: str(value).replace(" ", ""))
@pytest.mark.usefixtures("poisoned")
def test_draws_are_those_of_cpp(seed, grid, mask):
    samples = 2 * len(mask.counts) if INTERPRETED else 24
    n = torch.arange(2**33 + 3, 2**33 + 3 + samples)
    rest = (grid, mask, 1000, 0.3, 0.7)
    got = mk.draw_batch(moved(seed), moved(n), 11, *rest, backend="triton")
    assert test_draw_batch.fields(got) == test_draw_batch.fields(mk.draw_batch(seed, n, 11, *rest, backend="cpp"))


@pytest.mark.parametrize("images", [1, 5, 2**31 + 11, 2**60])
def test_orders_are_those_of_cpp(seed, images):
    n = torch.tensor([0, images - 1, 3 * images + images // 2, 2**63 - 2])
    mask = mk.Mask("dense")
    expected, got = (
        mk.draw_batch(*map(move, (seed, n)), images, (1, 1), mask, 2**31, 1.0, 1.0, backend=name)
        for name, move in (("cpp", lambda tensor: tensor), ("triton", moved))
    )
    assert test_draw_batch.fields(got) == test_draw_batch.fields(expected)


@triton.jit
def choose(word, index, count, wanted, chosen, LANES: tl.constexpr):
    lane = tl.arange(0, LANES)
    there = lane < count
    words, places = (tl.load(at + lane, mask=there, other=0).to(tl.uint32) for at in (word, index))
    tl.store(chosen + lane, draw_kernel.smallest(words, places, there, wanted), mask=there)


@pytest.mark.parametrize(
    ("words", "each"), [([0, 0], 1), ([5, 2, 5, 1, 5, 2], 2), ([2**32 - 1, 2**32 - 1, 0, 3, 0], 1)]
)
def test_ties_go_to_the_first(words, each):
    """Every key stands there `each` times, as those of blocks do; lanes beyond the keys never count."""
    order = sorted(range(len(words)), key=lambda i: (words[i], i))
    index = [i for i in range(len(words)) for _ in range(each)]
    word = torch.tensor([words[i] for i in index], device=DEVICE)
    for wanted in range(len(words) + 1):
        chosen = torch.empty(len(index), dtype=torch.bool, device=DEVICE)
        places = torch.tensor(index, device=DEVICE)
        choose[(1,)](word, places, len(index), wanted * each, chosen, LANES=16)
        assert chosen.tolist() == [i in order[:wanted] for i in index], wanted


# ---- noisy_patches, denoising_loss ----


@dataclasses.dataclass(frozen=True)
class Case:
    grid: tuple[int, int]
    patch: int
    channels: int
    visible: int | list[int]
    dtype: torch.dtype
    target: str
    weighted: bool = False
    pad: int = 0
    slots: bool = False
    gap: int = 0  # elements after every patch of the prediction
    programs: int = 0  # in all; 0: as many as the host takes


CASES = {
    "one element": Case((4, 6), 1, 1, [3, 24, 0], FP32, "eps"),
    "words": Case((4, 6), 4, 3, 9, BF16, "v", weighted=True, pad=64, gap=16),
    "words of float32": Case((4, 6), 4, 3, [0, 5, 24], FP32, "x0", weighted=True),
    "odd": Case((5, 3), 3, 3, 8, FP16, "v", pad=5, gap=1),
    "odd and ragged": Case((5, 3), 3, 2, [15, 1, 2], BF16, "x0", slots=True),
    "slots": Case((3, 3), 2, 4, 5, BF16, "v", slots=True, pad=3),
    "many parts": Case((2, 1), 28, 3, 2, FP16, "eps", weighted=True),
    "many turns": Case((2, 2), 28, 1, [4, 1, 3], FP32, "v", programs=1),
    "nothing": Case((4, 6), 2, 3, [0, 0], FP32, "v", weighted=True),
}


@pytest.fixture(params=CASES)
def case(request, monkeypatch) -> Case:
    found = CASES[request.param]
    if found.programs:
        monkeypatch.setattr(noisy_host, "PROGRAMS", found.programs)
        monkeypatch.setattr(loss_host, "PROGRAMS", found.programs)
        monkeypatch.setattr(loss_host, "MOST_SCALED", found.programs)
    return found


@pytest.fixture
def make_case(make_store, make_batch) -> Callable[[Case], tuple[mk.Store, mk.Batch]]:
    def make(case: Case) -> tuple[mk.Store, mk.Batch]:
        rows = case.grid[0] * case.grid[1]
        store = make_store(case.grid, case.patch, case.channels, pad=case.pad)
        batch = make_batch(store, case.visible, batch=2)
        if not case.slots:
            return store, batch
        slots = torch.arange(batch.keep_ids.numel(), dtype=torch.int32) * 7 % (rows - 1)
        return mk.Store(store.patches[:, 1:], store.grid, store.patch, slots), batch

    return make


@pytest.mark.usefixtures("poisoned")
def test_noisy_patches_are_those_of_cpp(case, make_case, alpha_sigma, seed):
    store, batch = make_case(case)
    for table in (alpha_sigma, None):
        expected = mk.noisy_patches(store, batch, table, seed, case.dtype, "cpp")
        given = (*map(moved, (store, batch, table, seed)), case.dtype)
        assert same(mk.noisy_patches(*given, "triton"), expected)


@pytest.mark.usefixtures("poisoned")
def test_losses_are_those_of_cpp(case, make_case, alpha_sigma, weight, seed):
    """The gradient to the bit; the losses, whose sums are made in another order, but for some roundings."""
    store, batch = make_case(case)
    size = case.patch**2 * case.channels
    wide = torch.randn(*batch.keep_ids.shape, size + case.gap, generator=torch.Generator().manual_seed(4))
    rest = (case.target, weight if case.weighted else None)
    gradients = torch.tensor([0.7]), torch.linspace(-1, 2, 2 * len(batch.n))
    results = []
    for name, move in (("cpp", lambda given: given), ("triton", moved)):
        given = tuple(map(move, (store, batch, alpha_sigma, seed)))
        prediction = move(wide).to(case.dtype)[..., :size].requires_grad_()
        outputs = mk.denoising_loss(prediction, *given, rest[0], move(rest[1]), backend=name)
        incoming = move(gradients[0])[0], move(gradients[1])[::2]
        results.append((*outputs, *torch.autograd.grad(outputs, prediction, incoming)))
    expected, got = results
    for a, b in zip(got[:2], expected[:2], strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=3 * 2**-24, atol=0)
    assert same(got[2], expected[2])


def test_losses_need_no_gradient(make_case, alpha_sigma, seed):
    case = CASES["odd"]
    store, batch = map(moved, make_case(case))
    prediction = torch.ones(*batch.keep_ids.shape, 27, device=DEVICE)
    flat = flatten(store, batch, moved(alpha_sigma), moved(seed))
    error = torch.ops.maskdiff.denoising_loss.default(prediction, *flat, "eps", None, False, "triton")[2]
    assert error.numel() == 0


def test_same_bits_twice(make_case, alpha_sigma, seed):
    store, batch = map(moved, make_case(CASES["odd"]))
    flat = flatten(store, batch, moved(alpha_sigma), moved(seed))
    prediction = torch.ones(*batch.keep_ids.shape, 27, device=DEVICE)
    given = (prediction, *flat, "eps", None, True, "triton")
    assert all(map(torch.equal, *(torch.ops.maskdiff.denoising_loss.default(*given) for _ in range(2))))
    assert not loss_host._counters(prediction.device).any()  # left as they were found


@pytest.mark.parametrize(
    ("name", "at", "value", "rows"),
    [
        ("image_ids", 1, 7, range(5, 10)),
        ("image_ids", 1, -1, range(5, 10)),
        ("keep_ids", 6, 9, [6]),
        ("keep_ids", 6, -1, [6]),
        ("timestep", 0, 50, range(5)),
        ("timestep", 0, -1, range(5)),
        ("slots", 3, 8, [3]),
        ("slots", 3, -1, [3]),
    ],
)
def test_numbers_out_of_range_give_nan(make_case, alpha_sigma, weight, seed, name, at, value, rows):
    """In their patches alone, and in the losses of their samples."""
    store, batch = make_case(CASES["slots"])
    broken = (store.slots if name == "slots" else getattr(batch, name)).clone()
    broken.view(-1)[at] = value
    change = {name: broken}
    wrong_store, wrong_batch = (dataclasses.replace(store, **change), batch) if name == "slots" else (
        store, dataclasses.replace(batch, **change),
    )  # fmt: skip
    table, key = moved(alpha_sigma), moved(seed)
    wrong = torch.zeros(10, dtype=torch.bool)
    wrong[list(rows)] = True
    prediction = torch.ones(2, 5, 16, device=DEVICE)
    results = []
    for given in ((store, batch), (wrong_store, wrong_batch)):
        flat = flatten(*map(moved, given), table, key)
        x = torch.ops.maskdiff.noisy_patches.default(*flat, FP32, "triton")
        loss = torch.ops.maskdiff.denoising_loss.default(prediction, *flat, "v", moved(weight), True, "triton")
        results.append([part.cpu() for part in (x, loss[2], loss[1])])
    for sound, got in zip(results[0][:2], results[1][:2], strict=True):
        assert got.flatten(0, 1)[wrong].isnan().all()
        assert torch.equal(got.flatten(0, 1)[~wrong], sound.flatten(0, 1)[~wrong])
    assert results[1][2].isnan().tolist() == wrong.view(2, 5).any(1).tolist()


def test_broken_offsets_stay_in_memory(make_case, alpha_sigma, seed):
    """cu_patches beyond the patches or descending: cut short."""
    store, batch = make_case(CASES["odd and ragged"])
    flat = flatten(*map(moved, (store, batch, alpha_sigma, seed)))
    sound = torch.ops.maskdiff.noisy_patches.default(*flat, FP32, "triton")
    offsets = torch.tensor([-3, 15, 2**31 - 1, 4], dtype=torch.int32, device=DEVICE)
    broken = (*flat[:7], offsets, *flat[8:])
    got = torch.ops.maskdiff.noisy_patches.default(*broken, FP32, "triton")
    assert torch.equal(got[:15], sound[:15])
    prediction = torch.ones(18, 18, device=DEVICE)
    torch.ops.maskdiff.denoising_loss.default(prediction, *broken, "v", None, True, "triton")


def test_opcheck(make_case, alpha_sigma, seed):
    ops, what = torch.ops.maskdiff, {"test_utils": ("test_schema", "test_faketensor")}
    given = (moved(seed), moved(torch.arange(2)), None, 9, (2, 2), "patch", 0, (1, 3), 50, 0.5, 0.1, 0, "triton")
    opcheck(ops.draw_batch.default, given, **what)
    store, batch = make_case(CASES["odd and ragged"])
    flat = flatten(*map(moved, (store, batch, alpha_sigma, seed)))
    opcheck(ops.noisy_patches.default, (*flat, FP16, "triton"), **what)
    prediction, ones = torch.randn(18, 18, device=DEVICE), torch.ones(3, device=DEVICE)
    opcheck(ops.denoising_loss.default, (prediction, *flat, "v", None, True, "triton"), **what)
    given = (prediction, moved(batch.cu_patches), ones[0], ones, "triton")
    opcheck(ops.denoising_loss_backward.default, given, **what)


def test_they_are_there():
    for op in ("draw_batch", "noisy_patches", "denoising_loss"):
        assert mk.backends(op)["triton"] == (True, triton_package.load())


def test_what_is_too_large(seed, make_case, alpha_sigma, monkeypatch):
    n = moved(torch.arange(2))
    with pytest.raises(ValueError, match="^grid: got 4160 in all, 'triton' of draw_batch takes at most 4096"):
        mk.draw_batch(moved(seed), n, 3, (64, 65), mk.Mask("dense"), backend="triton")
    monkeypatch.setattr(draw_host, "MOST", 1)
    with pytest.raises(ValueError, match="^mask.counts: got 2 in all, 'triton' of draw_batch takes at most 1"):
        mk.draw_batch(moved(seed), n, 3, (1, 1), mk.Mask("patch", counts=(1, 1)), backend="triton")
    monkeypatch.setattr("maskdiff_kernels.ops.triton_visible.MOST_QUADS", 89)
    given = tuple(map(moved, (*make_case(CASES["odd and ragged"]), alpha_sigma, seed)))
    with pytest.raises(ValueError, match="^backend: 'triton' of noisy_patches takes at most 89 fours of .*, not 90"):
        mk.noisy_patches(*given, backend="triton")
