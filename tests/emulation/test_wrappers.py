"""The wrappers of csrc/cuda/ptx.cuh do what the PTX ISA says: on the emulator, in any order of threads, sanitized."""

import ctypes

import conformance
import emulate
import numpy as np
import pytest
import torch

from maskdiff_kernels import philox

pytestmark = pytest.mark.skipif(bool(emulate.no_emulator()), reason=emulate.no_emulator())
SOURCES = [
    emulate.HERE / "wrappers.cu",
    emulate.HERE / "faults.cu",
    emulate.EXPORTS,
    emulate.ROOT / "csrc/cuda/info.cu",
]


@pytest.fixture(scope="module")
def library():
    return emulate.load(emulate.build("emulated", SOURCES))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("check", conformance.CHECKS)
def test_wrapper_against_the_table(library, check: str, seed: int):
    library.emulator_seed(ctypes.c_uint64(seed))
    getattr(conformance.Checks(library, conformance.Host()), check)()


@pytest.mark.parametrize(
    ("sanitizer", "options"),
    [("address", ["--seeds=1"]), ("thread", ["--seeds=1", "--only=matrices,exchanges,copies,arrivals"])],
)
def test_wrapper_sanitized(sanitizer: str, options: list[str]):
    built = emulate.build("emulated", SOURCES, sanitizer)
    done = emulate.run_sanitized(sanitizer, str(emulate.HERE / "conformance.py"), str(built), *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "arrivals as the table says" in done.stdout


@pytest.mark.parametrize("seed", range(3))
def test_counted_words_are_those_of_the_reference(library, seed: int):
    """The first kernel of the CUDA library, emulated: words and their sums."""
    library.emulator_seed(ctypes.c_uint64(seed))
    key, n, blocks = np.array([-(2**61) - 5]), np.array([0, 1, 2**33 + 7], np.int64), 300
    memory = conformance.Host()
    pointers = [memory.put(key.astype(np.int64)), memory.put(n)]
    words, sums = memory.put(np.zeros((3, blocks, 4), np.uint32)), memory.put(np.zeros(3, np.uint32))
    arguments = (*pointers, ctypes.c_int64(3), philox.NOISE, ctypes.c_int64(blocks), words, sums, 0, None)
    assert library.maskdiff_cuda_count_words(*arguments) == 0
    got = memory.take(words, (3, blocks, 4), np.uint32)
    expected = philox.words(torch.from_numpy(key), torch.from_numpy(n)[:, None], philox.NOISE, torch.arange(blocks))
    np.testing.assert_array_equal(got.astype(np.int64), expected.numpy())
    np.testing.assert_array_equal(memory.take(sums, (3,), np.uint32), got.sum((1, 2), dtype=np.uint32))


def test_entries_refuse_impossible_sizes(library):
    assert (
        library.maskdiff_cuda_count_words(None, None, ctypes.c_int64(-1), 0, ctypes.c_int64(1), None, None, 0, None)
        == 1
    )
    assert (
        library.maskdiff_cuda_count_words(None, None, ctypes.c_int64(0), 0, ctypes.c_int64(1), None, None, 0, None) == 0
    )


@pytest.mark.skipif(bool(emulate.no_nvcc()), reason=emulate.no_nvcc())
def test_compiles_for_every_gpu():
    """All wrappers, every architecture, without a warning, a spilled register or a stack."""
    built = emulate.build_for_gpus("wrappers", [emulate.HERE / "wrappers.cu"])
    assert ctypes.CDLL(str(built)).wrapper_multiply
    text = built.read_bytes()
    for arch in emulate.ARCHS:
        assert f"sm_{arch}".encode() in text
