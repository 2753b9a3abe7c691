"""attention's CUDA kernels, emulated: against the fp64 truth at every length, in any order of threads, sanitized."""

import ctypes
import re
import shutil
from collections.abc import Callable, Iterator
from functools import partial

import attention_cases
import attention_faults
import emulate
import numpy as np
import planted
import pytest
import test_wrappers
import torch
from attention_cases import BF16, CASES, FP16, MIX, Case
from attention_faults import FAULTS, SOUND
from planted import Fault
from torch import Tensor

from maskdiff_kernels import library as libraries
from maskdiff_kernels.ops.attention import cuda

pytestmark = pytest.mark.skipif(bool(emulate.no_emulator()), reason=emulate.no_emulator())
SOURCES = [emulate.EXPORTS, emulate.ROOT / "csrc" / "cuda" / "attention.cu"]
DTYPES = {BF16: torch.bfloat16, FP16: torch.float16}
LENGTHS = (
    1,
    2,
    15,
    16,
    17,
    *range(25, 34),
    49,
    63,
    64,
    65,
    66,
    77,
    100,
    127,
    128,
    129,
    130,
    144,
    196,
    255,
    256,
    257,
    258,
)
MOST_REGISTERS = 168  # 12 warps on a multiprocessor


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return emulate.load(emulate.build("attention", SOURCES))


def plain(qkv: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Explicit attention of [S, L, 3, H, d] in the dtype of qkv: out, lse [S, H, L], gradient of qkv."""
    qkv = qkv.clone().requires_grad_()
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    scores = q @ k.transpose(-1, -2) * qkv.shape[-1] ** -0.5
    out = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    out.backward(grad)
    return out.detach(), scores.detach().logsumexp(-1), qkv.grad


def tensor(bits: np.ndarray, case: Case) -> Tensor:
    return torch.from_numpy(bits.view(np.int16)).view(DTYPES[case.dtype])


def parts(case: Case) -> list[tuple[slice, slice]]:
    """Where each sequence that is not empty stands in [S, L]."""
    ends = np.cumsum(case.lengths)
    if not case.ragged:
        return [(slice(i, i + 1), slice(None)) for i in range(len(case.lengths))]
    return [(slice(None), slice(end - n, end)) for end, n in zip(ends, case.lengths, strict=True) if n]


def check(library: ctypes.CDLL, case: Case) -> None:
    """Errors at most 2 (gradients 3) times those of plain PyTorch in the same dtype plus one rounding; the same bits
    whatever the order of threads."""
    results = attention_cases.run(library, case, 0)
    for seed in (1, 2):
        for first, again in zip(results, attention_cases.run(library, case, seed), strict=True):
            np.testing.assert_array_equal(first.view(np.uint8), again.view(np.uint8))
    (qkv, grad), lse = (tensor(bits, case) for bits in case.data()), torch.from_numpy(results[1])
    out, grad_qkv = tensor(results[0], case), tensor(results[2], case)
    lse = lse.view(case.heads, *out.shape[:2]).permute(1, 0, 2)
    for part in parts(case):
        truth, same = plain(qkv[part].double(), grad[part].double()), plain(qkv[part], grad[part])
        got = (out[part], lse[part[0], :, part[1]], grad_qkv[part])
        for name, x, exact, other, times in zip(("out", "lse", "grad"), got, truth, same, (2, 2, 3), strict=True):
            error, peer = ((y.double() - exact).abs().max().item() for y in (x, other))
            most = times * peer + torch.finfo(other.dtype).eps / 2 * exact.abs().max().item()
            print(f"{name} {tuple(x.shape)}: error {error:.2e}, PyTorch's {peer:.2e}")
            assert error <= most, (case, name, error, peer)  # NaN fails too


@pytest.mark.parametrize("length", (*LENGTHS, 272, 287, 288))
def test_equal_lengths(library, length: int):
    few = length > 66
    check(library, Case((length,) * (1 if few else 5), heads=1 if few else 2))


@pytest.mark.parametrize(("dtype", "width"), [(BF16, 32), (FP16, 32), (FP16, 64)])
@pytest.mark.parametrize("length", [1, 15, 17, 27, 33, 65, 100, 129, 257])
def test_other_dtypes_and_widths(library, length: int, dtype: int, width: int):
    check(library, Case((length,), heads=2, dtype=dtype, width=width))


@pytest.mark.parametrize(
    "lengths",
    [MIX.lengths, (27,) * 5, (3, 0, 130, 17, 64), (0, 0, 1), (16, 1, 288, 0)],
    ids=lambda lengths: "-".join(map(str, lengths)),
)
def test_ragged(library, lengths: tuple[int, ...]):
    """Against the truth, and the bits that each sequence alone gives."""
    case = Case(lengths, heads=3 if max(lengths) < 100 else 1, ragged=True)
    check(library, case)
    out, lse, grad_qkv = attention_cases.run(library, case, 3)
    qkv, grad = case.data()
    for part in parts(case):

        class One(Case):
            def data(self, part=part):
                return qkv[part], grad[part]

        alone = attention_cases.run(library, One((qkv[part].shape[1],), heads=case.heads), 4)
        np.testing.assert_array_equal(alone[0], out[part])
        np.testing.assert_array_equal(alone[1], lse[:, part[1]])
        np.testing.assert_array_equal(alone[2], grad_qkv[part])


@pytest.mark.parametrize("name", ["steep", "strided"])
def test_hard_inputs(library, name: str):
    """Scores in the thousands, also all negative; tensors with every stride of its own."""
    check(library, CASES[name])


def test_strides_change_no_bit(library):
    dense, strided = (attention_cases.run(library, Case((19, 19), **how)) for how in ({}, {"gap": 8}))
    for first, other in zip(dense, strided, strict=True):
        np.testing.assert_array_equal(first, other)


def test_broken_promises_stay_in_memory(library):
    """A longest length that is none, cu_seqlens beyond the tokens or descending: cut short, nothing else touched."""
    host, qkv = attention_cases.Host(), np.zeros((20, 3, 1, 32), np.uint16)
    out, lse = np.full((20, 32), 0xFFFF, np.uint16), np.full((1, 20), np.nan, np.float32)
    pointers = [host.put(x) for x in (qkv, np.array([0, 4, 2, 30, 20], np.int32), out, lse)]
    numbers = (4, 3, 20, 1, 32, 0, 96, 32, 32, BF16, 0)
    given = attention_cases.Input(pointers[0], pointers[1], *numbers)
    assert library.maskdiff_cuda_attention(ctypes.byref(given), ctypes.c_float(1), *pointers[2:], 0, None) == 0
    for pointer, array in zip(pointers[:2], (qkv, np.zeros(5, np.int32)), strict=True):
        host.take(pointer, array.shape, array.dtype)
    written = ~np.isnan(host.take(pointers[3], lse.shape, np.float32)[0])
    assert written.nonzero()[0].tolist() == [0, 1, 2]  # the first three tokens of the first sequence
    assert ((host.take(pointers[2], out.shape, np.uint16) == 0).all(1) == written).all()


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"dtype": 0}, 3),
        ({"width": 128}, 3),
        ({"length": 289}, 1),
        ({"length": -1}, 1),
        ({"sequences": 1 << 31}, 1),
        ({"token_stride": 97}, 1),
        ({"qkv": 8}, 1),
        ({"tokens": 0}, 0),
        ({"sequences": 0}, 0),
    ],
)
def test_entries_refuse(library, change: dict[str, int], code: int):
    """Each before anything is launched: the pointers lead nowhere."""
    given = attention_cases.Input(16, None, 1, 10, 10, 1, 32, 960, 96, 32, 32, BF16, 0)
    for name, value in change.items():
        setattr(given, name, value)
    scale, zero, nowhere = ctypes.c_float(1), ctypes.c_int64(0), ctypes.c_void_p(16)
    reference = ctypes.byref(given)
    assert library.maskdiff_cuda_attention(reference, scale, nowhere, nowhere, 0, None) == code
    backward = library.maskdiff_cuda_attention_backward
    assert backward(reference, scale, nowhere, nowhere, nowhere, zero, zero, nowhere, 0, None) == code


@pytest.fixture
def binding(library, monkeypatch):
    """cuda.py on CPU tensors, by the emulated library."""
    monkeypatch.setattr(library, "maskdiff_cuda_error_text", library.wrapper_error, raising=False)
    monkeypatch.setattr(libraries, "cuda", lambda: library)
    return cuda


@pytest.mark.parametrize("ragged", [False, True])
def test_binding(library, binding, poisoned, ragged: bool):
    """The same bits as the direct calls, forward and backward, also for an expanded gradient."""
    case = Case((19, 19), ragged=ragged)
    qkv, grad = (tensor(bits, case) for bits in case.data())
    cu = torch.tensor([0, 19, 38], dtype=torch.int32) if ragged else None
    given = qkv[0] if ragged else qkv
    most, scale = (19 if ragged else None), case.width**-0.5
    out, lse = binding.run(given, cu, most, scale)
    grad_qkv = binding.run_backward(grad[0] if ragged else grad, given, out, lse, cu, most, scale)
    for got, expected in zip((out, lse, grad_qkv), attention_cases.run(library, case), strict=True):
        expected = torch.from_numpy(expected) if got.dtype == torch.float32 else tensor(expected, case)
        torch.testing.assert_close(got, expected.view(got.shape), rtol=0, atol=0)
    ones = torch.ones(1, dtype=out.dtype).expand(out.shape)
    by_ones = [binding.run_backward(g, given, out, lse, cu, most, scale) for g in (ones, ones.contiguous())]
    torch.testing.assert_close(*by_ones, rtol=0, atol=0)


def test_binding_refuses(binding):
    for shape, dtype, message in (
        ((1, 9, 3, 1, 64), torch.float32, "takes bfloat16 or float16, not float32"),
        ((1, 9, 3, 1, 128), torch.float16, "takes d = 32 or 64, not 128"),
        ((1, 289, 3, 1, 64), torch.float16, "takes at most 288 tokens, not 289"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            binding.run(torch.zeros(shape, dtype=dtype), None, None, 1.0)
    with pytest.raises(ValueError, match="16-byte aligned in every stride"):
        binding.run(torch.zeros(1, 9, 3, 1, 68, dtype=torch.float16)[..., :64], None, None, 1.0)


def test_library_missing_or_stale(tmp_path, monkeypatch):
    monkeypatch.setattr(libraries, "LIBRARIES", tmp_path)
    with pytest.raises(libraries.LibraryError, match=r"CUDA kernels were not built .*MASKDIFF_CUDA=1 pip install -e ."):
        libraries.cuda.__wrapped__()
    shutil.copy(emulate.build("emulated", test_wrappers.SOURCES), tmp_path / "libmaskdiff_cuda.so")
    with pytest.raises(libraries.LibraryError, match=r"is stale \(built from sources of the tests, .*MASKDIFF_CUDA=1"):
        libraries.cuda.__wrapped__()


def test_can_run_by_compute_capability(library):
    """What the kernels ask for is what can_run counts, at every length; the limits are those of the GPUs."""
    asked = library.maskdiff_cuda_attention_shared_bytes
    asked.restype = ctypes.c_int64
    for width in cuda.WIDTHS:
        for length in range(1, cuda.MOST_TOKENS + 1):
            both = [asked(ctypes.c_int64(width), ctypes.c_int64(length), backward) for backward in (0, 1)]
            assert max(both) == cuda.shared_bytes(width, length)
    bf16 = torch.bfloat16
    assert all(cuda.can_run(capability, bf16, 64, 288)[0] for capability in ((8, 0), (9, 0), (10, 0)))
    assert cuda.can_run((12, 0), bf16, 64, 192)[0] and cuda.can_run((12, 0), bf16, 32, 288)[0]
    assert cuda.can_run((12, 0), bf16, 64, 193) == (
        False,
        "takes at most 192 tokens with the shared memory of a 12.0 GPU",
    )
    assert not cuda.can_run((7, 5), bf16, 64, 27)[0]


ADDRESS = ("one", "short", "full", "three", "half", "middle", "nine", "most", "ragged", "steep", "strided")
THREAD = ("half", "three", "ragged-short")


@pytest.mark.parametrize(("sanitizer", "names"), [("address", ADDRESS), ("thread", THREAD)])
def test_sanitized(sanitizer: str, names: tuple[str, ...]):
    built = emulate.build("attention", SOURCES, sanitizer)
    done = emulate.run_sanitized(sanitizer, str(emulate.HERE / "attention_cases.py"), str(built), *names)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == [word for name in names for word in ("ran", name)]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name.replace(" ", "-"))
def test_planted_fault_is_noticed(library, fault: Fault):
    faults, built = attention_faults.build(fault.sanitizer)
    entry = f"fault_{faults.index(fault)}_attention"
    if fault.sanitizer:
        arguments = (attention_cases.__file__, built, fault.case, f"--entry={entry}")
        assert not planted.sanitizer_notices(fault, *arguments)
        return
    assert planted.differs(pairs(library, built, entry))


def test_nothing_planted_nothing_noticed(library):
    faults, built = attention_faults.build("")
    assert not planted.differs(pairs(library, built, f"fault_{faults.index(SOUND)}_attention"))


def pairs(library: ctypes.CDLL, built: str, entry: str) -> Iterator[tuple[planted.Results, Callable]]:
    """A few cases, threads up or down."""
    copy = emulate.load(built)
    for name in ("short", "three", "chunks", "ragged", "steep"):
        sound = attention_cases.run(library, CASES[name])
        assert all(tensor(x, CASES[name]).isfinite().all() for x in (sound[0], sound[2]))
        for seed in (0, 1):
            yield sound, partial(attention_cases.run, copy, CASES[name], seed, entry)


@pytest.mark.skipif(bool(emulate.no_nvcc()), reason=emulate.no_nvcc())
def test_compiles_for_every_gpu():
    """No stack, no spills (errors of the build), and few enough registers for 12 warps on a multiprocessor."""
    emulate.check_gpu_build("attention", 8, MOST_REGISTERS)  # forward and backward, two dtypes, two widths
