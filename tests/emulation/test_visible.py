"""noisy_patches' and denoising_loss' CUDA kernels, emulated: the CPU's bits in any order of threads, sanitized.

What they mean is tested by tests/ops/test_<op>.py, which run them as one more implementation.
"""

import ctypes
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import emulate
import numpy as np
import planted
import pytest
import torch
import visible_cases
import visible_faults
from planted import Fault
from visible_cases import BF16, CASES, FP16, FP32, LOSSES, Case
from visible_faults import FAULTS, SOUND

import maskdiff_kernels as mk
from maskdiff_kernels.ops.denoising_loss import cuda, reference
from maskdiff_kernels.ops.samples import flatten

pytestmark = pytest.mark.skipif(bool(emulate.no_emulator()), reason=emulate.no_emulator())
DTYPES = {FP32: torch.float32, BF16: torch.bfloat16, FP16: torch.float16}
MOST_REGISTERS = {"noisy_patches": 40, "denoising_loss": 64}  # 48 and 32 warps on a multiprocessor


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return emulate.load_ops()


def store_and_batch(case: Case) -> tuple[mk.Store, mk.Batch, dict[str, torch.Tensor]]:
    """The case as the public functions take it, and its tensors."""
    tensors = {name: torch.from_numpy(array) for name, array in case.arrays().items()}
    rows = case.rows
    patches = tensors["patches"][:, : rows * case.size].unflatten(1, (rows, case.size))
    keep_ids = tensors["keep_ids"]
    batch = mk.Batch(
        n=tensors["n"],
        image_ids=tensors["image_ids"],
        keep_ids=keep_ids if case.ragged else keep_ids.view(len(case.counts), -1),
        cu_patches=tensors.get("cu_patches"),
        flip=tensors["flip"].bool(),
        timestep=tensors["timestep"],
        drop_label=torch.zeros(len(case.counts), dtype=torch.bool),
    )
    return mk.Store(patches, case.grid, case.patch, tensors.get("slots")), batch, tensors


def bits(x: torch.Tensor, case: Case) -> np.ndarray:
    return x.view(-1, case.size).view(torch.int32 if case.dtype == FP32 else torch.int16).numpy()


def tensor(array: np.ndarray, case: Case) -> torch.Tensor:
    return torch.from_numpy(array if case.dtype == FP32 else array.view(np.int16)).view(DTYPES[case.dtype])


@pytest.mark.parametrize("name", CASES)
def test_noisy_patches(library, name: str):
    case = CASES[name]
    store, batch, tensors = store_and_batch(case)
    alpha_sigma = tensors.get("alpha_sigma")
    expected = mk.noisy_patches(store, batch, alpha_sigma, tensors["seed"], DTYPES[case.dtype], "cpp")
    for order in (0, 1, 2):
        (got,) = visible_cases.noisy_patches(library, case, order)
        np.testing.assert_array_equal(got.view(bits(expected, case).dtype), bits(expected, case))


@pytest.mark.parametrize("name", LOSSES)
def test_denoising_loss(library, name: str):
    """The error has the CPU's bits, the gradient those that PyTorch makes of it. The losses differ from the CPU's by
    the rounding of the squares' first two sums, in floats, and of the result."""
    case = CASES[name]
    store, batch, tensors = store_and_batch(case)
    prediction, weight, grads = case.prediction()
    flat = flatten(store, batch, tensors["alpha_sigma"], tensors["seed"])
    shaped = tensor(prediction, case).view(*batch.keep_ids.shape, case.size)
    weights = torch.from_numpy(weight) if case.weighted else None
    expected = torch.ops.maskdiff.denoising_loss.default(shaped, *flat, case.target, weights, True, "cpp")
    incoming = torch.from_numpy(grads)
    gradient = reference.run_backward(expected[2], batch.cu_patches, incoming[0], incoming[1::2])
    first = visible_cases.denoising_loss(library, case)
    for got, exact in zip(first[:2], expected[:2], strict=True):
        np.testing.assert_allclose(got, exact.view(got.shape), rtol=3 * 2**-24, atol=0)
    for got, exact in zip(first[2:], (expected[2], gradient), strict=True):
        np.testing.assert_array_equal(got.view(bits(exact, case).dtype), bits(exact, case))
    for order, counter in ((1, 0), (2, 0), (3, visible_cases.COUNTERS - 1)):
        again = visible_cases.denoising_loss(library, case, order, counter=counter)
        for one, other in zip(first, again, strict=True):
            np.testing.assert_array_equal(one.view(np.uint8), other.view(np.uint8))


@pytest.mark.parametrize(
    ("case", "array", "at", "value", "rows"),
    [
        ("fours", "image_ids", 1, visible_cases.IMAGES, range(8, 16)),
        ("fours", "image_ids", 1, -1, range(8, 16)),
        ("fours", "keep_ids", 9, 15, [9]),
        ("fours", "keep_ids", 9, -1, [9]),
        ("fours", "timestep", 0, visible_cases.TIMESTEPS, range(8)),
        ("fours", "timestep", 0, -1, range(8)),
        ("slots", "slots", 3, 17, [3]),
        ("slots", "slots", 3, -1, [3]),
    ],
)
def test_numbers_out_of_range_give_nan(library, case: str, array: str, at: int, value: int, rows):
    """In their patches alone; reading further would be seen by the address sanitizer, which runs them too."""
    arrays = CASES[case].arrays()
    arrays[array][at] = value
    wrong = np.zeros(sum(CASES[case].counts), bool)
    wrong[list(rows)] = True
    for op, result in ((visible_cases.noisy_patches, 0), (visible_cases.denoising_loss, 2)):
        sound, got = (op(library, CASES[case], **changed)[result] for changed in ({}, arrays))
        assert tensor(got[wrong], CASES[case]).isnan().all()
        np.testing.assert_array_equal(got[~wrong], sound[~wrong])
    _, per_sample, _, _ = visible_cases.denoising_loss(library, CASES[case], **arrays)
    np.testing.assert_array_equal(np.isnan(per_sample), wrong.reshape(len(per_sample), -1).any(1))


def test_broken_offsets_stay_in_memory(library):
    """cu_patches beyond the patches or descending: cut short."""
    case = CASES["ragged"]
    (sound,) = visible_cases.noisy_patches(library, case)
    broken = np.array([-3, 3, 2**31 - 1, 4, 4, -(2**31), 0], np.int32)
    (got,) = visible_cases.noisy_patches(library, case, cu_patches=broken)
    np.testing.assert_array_equal(got[:3], sound[:3])
    visible_cases.denoising_loss(library, case, cu_patches=broken)


@pytest.mark.parametrize(
    ("change", "code"),
    [({"total": 2**31 // 12 + 1}, 1), ({"batch": 2**31}, 1), ({"batch": 0}, 1), ({"patch": 148}, 1), ({"patch": 0}, 1)]
    + [({"total": -1}, 1), ({"total": 0}, 0), ({"dtype": 3}, 3)],
)
def test_entry_refuses(library, change: dict[str, int], code: int):
    """Each before anything is launched: the pointers lead nowhere."""
    given = visible_cases.Samples(*[16] * 10, 3, 15, 720, 3, 5, 4, 3, 2, 5, 10, 5)
    for name, value in change.items():
        setattr(given, name, value)
    dtype, nowhere, zero = change.get("dtype", FP32), ctypes.c_void_p(16), ctypes.c_int64(0)
    assert library.maskdiff_cuda_noisy_patches(ctypes.byref(given), nowhere, dtype, 0, None) == code
    outputs = [nowhere] * 5
    arguments = (ctypes.byref(given), nowhere, zero, zero, dtype, 0, *outputs, 0, 0, None)
    assert "total" in change and code == 0 or library.maskdiff_cuda_denoising_loss(*arguments) == code


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"target": 3}, 3),
        ({"target": -1}, 3),
        ({"counter": -1}, 1),
        ({"counter": 16384}, 1),
        ({"alpha_sigma": None}, 1),
    ],
)
def test_loss_refuses(library, change: dict, code: int):
    pointers = [16] * 8 + [change.get("alpha_sigma", 16), 16]
    given, nowhere, zero = (
        visible_cases.Samples(*pointers, 3, 15, 720, 3, 5, 4, 3, 2, 5, 10, 5),
        None,
        ctypes.c_int64(0),
    )
    numbers = (change.get("counter", 0), 0, None)
    arguments = (nowhere, zero, zero, FP32, change.get("target", 0), *[nowhere] * 5, *numbers)
    assert library.maskdiff_cuda_denoising_loss(ctypes.byref(given), *arguments) == code


@pytest.mark.parametrize(
    ("change", "code"),
    [({"batch": 0}, 1), ({"total": -1}, 1), ({"elements": 0}, 1), ({"dtype": 3}, 3), ({"total": 0}, 0)],
)
def test_backward_refuses(library, change: dict[str, int], code: int):
    numbers = {"stride": 1, "batch": 2, "total": 4, "elements": 3, "dtype": FP32} | change
    dtype = numbers.pop("dtype")
    arguments = (*[None] * 4, *map(ctypes.c_int64, numbers.values()), dtype, None, 0, None)
    assert library.maskdiff_cuda_denoising_loss_backward(*arguments) == code


def test_counters():
    """A stream keeps its counter; their number is the library's."""
    cpu = torch.device("cpu")
    assert cuda.counter(cpu) == cuda.counter(cpu) != cuda.counter(torch.device("cpu", 1))
    header = (emulate.ROOT / "csrc" / "maskdiff_kernels.h").read_text()
    assert (
        re.findall(r"#define MASKDIFF_CUDA_COUNTERS (\d+)", header)
        == [str(cuda.COUNTERS)]
        == [str(visible_cases.COUNTERS)]
    )


def test_launches_that_may_run_side_by_side_share_no_counter(monkeypatch):
    """With stand-ins for a GPU's streams: those of one stream share one, those that a graph captures share none."""
    stream, capturing, gpu = SimpleNamespace(cuda_stream=1), False, torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    first, again = (cuda.counter(gpu) for _ in range(2))
    capturing = True
    captured = [cuda.counter(gpu) for _ in range(3)]
    capturing, stream = False, SimpleNamespace(cuda_stream=2)
    assert first == again and len({first, *captured, cuda.counter(gpu)}) == 5


def test_counters_end(monkeypatch):
    monkeypatch.setattr(cuda, "_fresh", iter([cuda.COUNTERS]))
    with pytest.raises(RuntimeError, match="captured in graphs 16384 times"):
        cuda.counter(torch.device("cpu", 2))


@pytest.mark.parametrize(("sanitizer", "names"), [("address", tuple(CASES)), ("thread", ("twelve",))])
def test_sanitized(sanitizer: str, names: tuple[str, ...]):
    """The copies of the kernels in which nothing is planted: one library less to compile."""
    faults, built = visible_faults.build(sanitizer)
    prefix = f"--entry=fault_{faults.index(SOUND)}_"
    done = emulate.run_sanitized(sanitizer, visible_cases.__file__, built, *names, prefix)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == [word for name in names for word in ("ran", name)]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name.replace(" ", "-"))
def test_planted_fault_is_noticed(library, fault: Fault):
    faults, built = visible_faults.build(fault.sanitizer)
    prefix = f"fault_{faults.index(fault)}_"
    if fault.sanitizer:
        arguments = (visible_cases.__file__, built, fault.case, f"--entry={prefix}")
        assert not planted.sanitizer_notices(fault, *arguments)
        return
    assert planted.differs(pairs(library, built, prefix))


def test_nothing_planted_nothing_noticed(library):
    faults, built = visible_faults.build("")
    assert not planted.differs(pairs(library, built, f"fault_{faults.index(SOUND)}_"))


def pairs(library: ctypes.CDLL, built: str, prefix: str) -> Iterator[tuple[planted.Results, Callable]]:
    """A few cases, threads up or down."""
    copy = emulate.load(built)
    for name in ("odd", "fours", "long", "ragged", "slots", "unaligned", "gap", "turns", "crowd"):
        for op in (visible_cases.noisy_patches, visible_cases.denoising_loss):
            sound = op(library, CASES[name])
            for order in (0, 1):
                yield sound, partial(op, copy, CASES[name], order, prefix)


@pytest.mark.skipif(bool(emulate.no_nvcc()), reason=emulate.no_nvcc())
@pytest.mark.parametrize(("op", "kernels"), [("noisy_patches", 1), ("denoising_loss", 2)])
def test_compiles_for_every_gpu(op: str, kernels: int):
    """No stack, no spills (errors of the build), few enough registers."""
    emulate.check_gpu_build(op, kernels, MOST_REGISTERS[op], "-fmad=false")


@pytest.mark.skipif(bool(emulate.no_nvcc()), reason=emulate.no_nvcc())
@pytest.mark.parametrize("op", MOST_REGISTERS)
def test_nothing_is_fused(op: str):
    """The bits of the CPU need sums and products rounded one by one. tests/test_library.py sees to the flag."""
    assert not emulate.fuses(op, "-fmad=false") and emulate.fuses(op)
