"""adamw_ema's CUDA kernels, emulated: in any order of threads, in layouts of their own, sanitized, compiled for GPUs.

What they mean is tested by tests/ops/test_adamw_ema.py, which runs them as one more implementation.
"""

import ctypes

import adamw_cases
import emulate
import numpy as np
import pytest
import torch
from adamw_cases import BF16, CASES, FLATS, FP16, FP32, Case
from torch import Tensor

from maskdiff_kernels.ops.adamw_ema import reference
from maskdiff_kernels.ops.adamw_ema.state import Update

pytestmark = pytest.mark.skipif(bool(emulate.no_emulator()), reason=emulate.no_emulator())
SOURCES = [emulate.EXPORTS, emulate.ROOT / "csrc" / "cuda" / "adamw_ema.cu"]
DTYPES = {FP32: torch.float32, BF16: torch.bfloat16, FP16: torch.float16}
MOST_REGISTERS = 64  # 32 warps on a multiprocessor


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return emulate.load_ops()


def gradients(case: Case) -> list[Tensor]:
    dtypes = [DTYPES[case.dtypes[i % len(case.dtypes)]] for i in range(len(case.sizes))]
    bits = [torch.from_numpy(g.view(np.int16) if g.dtype == np.uint16 else g) for g in case.gradients()]
    return [x if dtype == torch.float32 else x.view(dtype) for x, dtype in zip(bits, dtypes, strict=True)]


def update(case: Case, dtype: torch.dtype) -> Update:
    """The case as the op's implementations take it, masters in `dtype`."""
    flats = {name: torch.from_numpy(flat).to(dtype) for name, flat in case.flats().items()}
    if not case.two:
        flats["ema2"] = None
    low = torch.full((case.low_size,), 7.0, dtype=DTYPES[case.low]) if case.low_size else None
    decays = [i % 2 == 0 for i in range(len(case.sizes))]
    counts, hyper = (torch.tensor(3.0), torch.tensor(1.0)), torch.tensor([0.02, case.bound])
    layout, numbers = (case.offsets, list(case.sizes), decays), (*adamw_cases.NUMBERS, *case.gammas, case.every)
    return Update(*flats.values(), low, *counts, *layout, gradients(case), hyper, *numbers)


def parts(case: Case, flat: Tensor) -> Tensor:
    return torch.cat([flat[o : o + n] for o, n in zip(case.offsets, case.sizes, strict=True)])


@pytest.mark.parametrize("name", [name for name in CASES if name != "capped"])  # which takes long, and orders no more
def test_any_order_of_threads_gives_the_same_bits(library, name: str):
    """Nothing between parameters or after the copy's end is written, nor are averages that are not due; nothing at all
    where the update is skipped."""
    case = CASES[name]
    got = adamw_cases.run(library, case)
    for seed in (1, 2):
        for key, again in adamw_cases.run(library, case, seed).items():
            np.testing.assert_array_equal(got[key].view(np.uint8), again.view(np.uint8), key)
    kept = np.ones(case.total, bool)
    for offset, size in zip(case.offsets, case.sizes, strict=True):
        kept[offset : offset + size] = got["skipped"] == 1
    for name, before in case.flats().items():
        if name in got:
            same = kept if len(before) == case.total else [0]
            np.testing.assert_array_equal(got[name][same], before[same], name)
    low = torch.from_numpy(got["low"].view(np.int16)).view(DTYPES[case.low])
    rounded = torch.from_numpy(got["master"])[: case.low_size].to(low.dtype)
    assert torch.equal(low[~kept[: case.low_size]], rounded[~kept[: case.low_size]])
    assert (got["low"][kept[: case.low_size]] == 0xFFFF).all()


@pytest.mark.parametrize(
    "name", [name for name in CASES if name in ("sums", "many", "capped", "due") or "shifted" in name]
)
def test_against_float64(library, name: str):
    """Layouts that tests/ops lack: errors at most twice those of the reference in float32, plus one rounding."""
    case = CASES[name]
    got = adamw_cases.run(library, case)
    truth, plain = update(case, torch.float64), update(case, torch.float32)
    (norm, _), _ = reference.run(truth), reference.run(plain)
    assert abs(got["norm"][0] - norm) <= 3 * 2**-24 * norm  # of a square four, that the root halves; of the norm one
    for flat in FLATS[: 5 if case.two else 4]:
        exact = parts(case, getattr(truth, flat))
        error, peer = (
            (parts(case, x).double() - exact).abs().max() for x in (torch.from_numpy(got[flat]), getattr(plain, flat))
        )
        print(f"{flat}: error {error:.2e}, PyTorch's {peer:.2e}")
        assert error <= 2 * peer + 2**-24 * exact.abs().max(), flat


def test_entry_refuses(library):
    for change, code in (({"low": FP32}, 3), ({"low": 9}, 3), ({"dtypes": (4,)}, 3), ({"every": -1}, 3)):
        with pytest.raises(RuntimeError, match=f"error {code}"):
            adamw_cases.run(library, Case((5,), low_size=2, **change))


@pytest.mark.parametrize(
    ("sanitizer", "names"),
    [("address", CASES), ("thread", ("odd", "fours", "bad"))],
)
def test_sanitized(sanitizer: str, names):
    built = emulate.build("adamw_ema", SOURCES, sanitizer)
    done = emulate.run_sanitized(sanitizer, adamw_cases.__file__, str(built), *names)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == [word for name in names for word in ("ran", name)]


@pytest.mark.skipif(bool(emulate.no_nvcc()), reason=emulate.no_nvcc())
def test_compiles_for_every_gpu():
    """No stack, no spills (errors of the build), and few enough registers for 32 warps on a multiprocessor."""
    emulate.check_gpu_build("adamw_ema", 2, MOST_REGISTERS)  # the norm, the update
