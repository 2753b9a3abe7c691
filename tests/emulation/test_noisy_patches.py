"""noisy_patches' CUDA kernel, emulated: the bits of the CPU library in any order of threads, sanitized, compiled.

What it means is tested by tests/ops/test_noisy_patches.py, which runs it as one more implementation.
"""

import ctypes

import emulate
import numpy as np
import pytest
import torch
import visible_cases
from visible_cases import BF16, CASES, FP16, FP32, Case

import maskdiff_kernels as mk

pytestmark = pytest.mark.skipif(bool(emulate.no_emulator()), reason=emulate.no_emulator())
DTYPES = {FP32: torch.float32, BF16: torch.bfloat16, FP16: torch.float16}
MOST_REGISTERS = 40  # 48 warps on a multiprocessor


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return emulate.load(emulate.build("visible", emulate.VISIBLE))


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


@pytest.mark.parametrize("name", CASES)
def test_the_bits_of_the_cpu(library, name: str):
    case = CASES[name]
    store, batch, tensors = store_and_batch(case)
    alpha_sigma = tensors.get("alpha_sigma")
    expected = mk.noisy_patches(store, batch, alpha_sigma, tensors["seed"], DTYPES[case.dtype], "cpp")
    bits = expected.view(-1, case.size).view(torch.int32 if case.dtype == FP32 else torch.int16).numpy()
    for order in (0, 1, 2):
        (got,) = visible_cases.noisy_patches(library, case, order)
        np.testing.assert_array_equal(got.view(bits.dtype), bits)


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
    (sound,), (got,) = (visible_cases.noisy_patches(library, CASES[case], **changed) for changed in ({}, arrays))
    wrong = np.zeros(len(got), bool)
    wrong[list(rows)] = True
    assert np.isnan(floats(got[wrong], CASES[case].dtype)).all()
    np.testing.assert_array_equal(got[~wrong], sound[~wrong])


def floats(bits: np.ndarray, dtype: int) -> np.ndarray:
    if dtype == FP32:
        return bits
    return torch.from_numpy(bits.view(np.int16)).view(DTYPES[dtype]).float().numpy()


def test_broken_offsets_stay_in_memory(library):
    """cu_patches beyond the patches or descending: cut short."""
    case = CASES["ragged"]
    (sound,) = visible_cases.noisy_patches(library, case)
    broken = np.array([-3, 3, 2**31 - 1, 4, 4, -(2**31), 0], np.int32)
    (got,) = visible_cases.noisy_patches(library, case, cu_patches=broken)
    np.testing.assert_array_equal(got[:3], sound[:3])


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
    dtype = change.get("dtype", FP32)
    assert library.maskdiff_cuda_noisy_patches(ctypes.byref(given), ctypes.c_void_p(16), dtype, 0, None) == code


THREAD = ("odd", "ragged")


@pytest.mark.parametrize(("sanitizer", "names"), [("address", CASES), ("thread", THREAD)])
def test_sanitized(sanitizer: str, names):
    built = emulate.build("visible", emulate.VISIBLE, sanitizer)
    done = emulate.run_sanitized(sanitizer, visible_cases.__file__, str(built), "noisy_patches", *names)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == [word for name in names for word in ("ran", name)]


@pytest.mark.skipif(bool(emulate.no_nvcc()), reason=emulate.no_nvcc())
def test_compiles_for_every_gpu():
    emulate.check_gpu_build("noisy_patches", 1, MOST_REGISTERS, "-fmad=false")


@pytest.mark.skipif(bool(emulate.no_nvcc()), reason=emulate.no_nvcc())
def test_nothing_is_fused():
    """The bits of the CPU need sums and products rounded one by one. tests/test_library.py sees to the flag."""
    assert not emulate.fuses("noisy_patches", "-fmad=false") and emulate.fuses("noisy_patches")
