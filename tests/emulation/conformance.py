"""Every wrapper of csrc/cuda/ptx.cuh against tables written from the PTX ISA's text, by brute force.

    python tests/emulation/conformance.py LIBRARY [--cuda] [--seeds N] [--only CHECK,CHECK]

runs it on a library built from wrappers.cu: the emulator's, or with --cuda one for GPUs, the first thing to run on a
new card. The tables say element by element where the PTX ISA puts it (9.7.14.5, fragments of mma.m16n8k16; ldmatrix)
and share nothing with the emulator, which computes by register.
"""

import argparse
import ctypes
import sys
from collections.abc import Callable

import numpy as np

FP32, BF16, FP16 = 0, 1, 2  # maskdiff_dtype
Place = Callable[[int, int, int], int]  # row or column of element i, by groupID, threadID_in_group, i


class Host:
    """Exact-size buffers on the heap, so that address sanitizer sees the first byte past any of them."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None)
        self._libc.malloc.restype = ctypes.c_void_p

    def put(self, array: np.ndarray) -> ctypes.c_void_p:
        dense = np.ascontiguousarray(array)
        pointer = self._libc.malloc(ctypes.c_size_t(dense.nbytes))
        ctypes.memmove(pointer, dense.ctypes.data, dense.nbytes)
        return ctypes.c_void_p(pointer)

    def take(self, pointer: ctypes.c_void_p, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        array = np.empty(shape, dtype)
        ctypes.memmove(array.ctypes.data, pointer, array.nbytes)
        self._libc.free(pointer)
        return array


class Cuda:
    """The same in a GPU's memory."""

    def __init__(self) -> None:
        self._live: dict[int, object] = {}

    def put(self, array: np.ndarray) -> ctypes.c_void_p:
        import torch

        tensor = torch.from_numpy(np.ascontiguousarray(array).view(np.uint8).reshape(-1)).cuda()
        self._live[tensor.data_ptr()] = tensor
        return ctypes.c_void_p(tensor.data_ptr())

    def take(self, pointer: ctypes.c_void_p, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        import torch

        torch.cuda.synchronize()
        tensor = self._live.pop(pointer.value)
        return tensor.cpu().numpy().view(dtype).reshape(shape)  # type: ignore[attr-defined]


def as_dtype(x: np.ndarray, dtype: int) -> np.ndarray:
    """Numbers as a kernel takes them: float32, or bit patterns of 16; for bf16 cut off, since any value does."""
    if dtype == FP32:
        return x
    return x.astype(np.float16).view(np.uint16) if dtype == FP16 else (x.view(np.uint32) >> 16).astype(np.uint16)


def set_up(library: ctypes.CDLL, on: type[Host] | type[Cuda], seed: int) -> Callable[[int], str]:
    """Seeds the emulator's scheduler, if that is where kernels run; returns what explains an entry's error code."""
    if on is not Cuda:
        library.emulator_seed(ctypes.c_uint64(seed))
    text = library.maskdiff_cuda_error_text if on is Cuda else library.wrapper_error
    text.restype = ctypes.c_char_p
    return lambda code: text(code).decode() if code >= 1000 else f"error {code}"


def run_cases(run: Callable[..., object], cases: dict[str, object]) -> None:
    """The main program of a file of cases: LIBRARY CASE [CASE ...] [--entry=NAME] [--cuda]."""
    library, *words = sys.argv[1:]
    options: dict[str, object] = {"on": Cuda if "--cuda" in words else Host}
    for word in words:
        if word.startswith("--entry="):
            options["prefix"] = word.removeprefix("--entry=")
    for name in words:
        if not name.startswith("--"):
            run(ctypes.CDLL(library), cases[name], 3, **options)
            print(f"ran {name}", flush=True)


class Checks:
    """One method a wrapper; each raises AssertionError at the first difference."""

    def __init__(self, library: ctypes.CDLL, memory: Host | Cuda) -> None:
        self.library, self.memory = library, memory
        self.random = np.random.default_rng(7)

    def call(self, name: str, *arguments: object) -> None:
        code = getattr(self.library, name)(*arguments, None)
        assert code == 0, f"{name} returned {code}: {self.library.wrapper_error(code).decode()}"

    def products(self) -> None:
        """Each element of A alone against a B of distinct numbers, each of B against such an A, then full matrices."""
        a = np.zeros((256 + 128 + 64, 16, 16), np.float32)
        b = np.zeros((256 + 128 + 64, 16, 8), np.float32)
        for e in range(256):
            a[e, e // 16, e % 16] = 1
            b[e] = np.arange(1, 129).reshape(16, 8)
        for e in range(128):
            a[256 + e] = np.arange(1, 257).reshape(16, 16)
            b[256 + e, e // 8, e % 8] = 1
        a[384:] = self.random.integers(-8, 9, (64, 16, 16))
        b[384:] = self.random.integers(-8, 9, (64, 16, 8))
        c = self.random.integers(-99, 100, (len(a), 16, 8)).astype(np.float32)
        for bf16 in (0, 1):
            as_bits = (lambda x: x.view(np.uint32) >> 16) if bf16 else (lambda x: x.astype(np.float16).view(np.uint16))
            fa, fb = _pair(as_bits(a)[:, A_TABLE[0], A_TABLE[1]]), _pair(as_bits(b)[:, B_TABLE[0], B_TABLE[1]])
            fc = c[:, C_TABLE[0], C_TABLE[1]]
            pa, pb, pd = self.memory.put(fa), self.memory.put(fb), self.memory.put(fc)
            self.call("wrapper_multiply", bf16, pa, pb, pd, len(a))
            d = np.empty_like(c)
            d[:, C_TABLE[0], C_TABLE[1]] = self.memory.take(pd, fc.shape, np.float32)
            self.memory.take(pa, fa.shape, np.uint32), self.memory.take(pb, fb.shape, np.uint32)
            np.testing.assert_array_equal(d, a @ b + c)  # small integers: exact in any order of summation

    def matrices(self) -> None:
        """ldmatrix: rows of distinct elements at several distances; the table is the fragment's, row and column."""
        rows = np.arange(1, 257, dtype=np.uint16).reshape(4, 8, 8)
        lane, half = np.arange(32)[:, None, None], np.arange(2)[None, None, :]
        matrix = np.arange(4)[None, :, None]
        row, column = lane // 4, 2 * (lane % 4) + half
        for stride in (8, 24, 72):
            source, out = self.memory.put(rows), self.memory.put(np.zeros((2, 32, 4), np.uint32))
            self.call("wrapper_load_matrices", source, stride, out)
            plain, transposed = self.memory.take(out, (2, 32, 4), np.uint32)
            self.memory.take(source, rows.shape, np.uint16)
            np.testing.assert_array_equal(plain, _pair(rows[matrix, row, column].reshape(32, 8)))
            np.testing.assert_array_equal(transposed, _pair(rows[matrix, column, row].reshape(32, 8)))

    def exchanges(self) -> None:
        """Shuffles from, by and over every lane, and votes."""
        values = self.random.integers(0, 2**32, 32, dtype=np.uint32)
        source, out = self.memory.put(values), self.memory.put(np.zeros((4, 32, 32), np.uint32))
        votes = self.memory.put(np.zeros((33, 32), np.uint32))
        self.call("wrapper_exchange", source, out, votes)
        got, voted = self.memory.take(out, (4, 32, 32), np.uint32), self.memory.take(votes, (33, 32), np.uint32)
        self.memory.take(source, (32,), np.uint32)
        for i in range(32):
            for lane in range(32):
                up, down = (lane - i if lane >= i else lane), (lane + i if lane + i < 32 else lane)
                expected = [values[i], values[lane ^ i], values[up], values[down]]
                assert [int(x) for x in got[:, i, lane]] == [int(x) for x in expected], (i, lane)
                assert voted[i, lane] == 1 << i
        assert (voted[32] == sum((int(v) & 1) << lane for lane, v in enumerate(values))).all()

    def copies(self) -> None:
        """Asynchronous copies one round ahead, zeros where nothing is to be read."""
        for blocks, threads in ((1, 32), (3, 64), (2, 256)):
            valid = np.array([1, 0, 1, 1, 0, 0, 1], np.int32)
            values = self.random.integers(0, 2**32, (blocks, len(valid), threads, 4), dtype=np.uint32)
            source, flags = self.memory.put(values), self.memory.put(valid)
            out = self.memory.put(np.zeros_like(values))
            self.call("wrapper_copy_ahead", source, flags, blocks, threads, len(valid), out)
            got = self.memory.take(out, values.shape, np.uint32)
            self.memory.take(source, values.shape, np.uint32), self.memory.take(flags, valid.shape, np.int32)
            neighbour = (np.arange(threads) + 33) % threads
            np.testing.assert_array_equal(got, values[:, :, neighbour] * valid[:, None, None].astype(np.uint32))

    def conversions(self) -> None:
        """2^x to 2 ulp; floats to bf16 and fp16: every half's neighbourhood, ties, subnormals, infinities, NaN."""
        halves = np.arange(1 << 16, dtype=np.uint32)
        near = [(halves << 16) + d for d in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]  # of every bf16
        with np.errstate(invalid="ignore"):
            exact = halves.astype(np.uint16).view(np.float16).astype(np.float32).view(np.uint32)
        near += [exact + d for d in (0, 1, 0xFFF, 0x1000, 0x1001)]  # of every fp16
        x = np.concatenate(near).astype(np.uint32).view(np.float32)
        source, out = self.memory.put(x), self.memory.put(np.zeros((4, len(x)), np.uint32))
        self.call("wrapper_convert", source, out, len(x))
        power, bf16, fp16, wide = self.memory.take(out, (4, len(x)), np.uint32)
        self.memory.take(source, x.shape, np.float32)
        number = exact & 0x7FFFFFFF <= 0x7F800000
        np.testing.assert_array_equal(wide[: 1 << 16][number], exact[number])
        assert np.isnan(wide[: 1 << 16][~number].view(np.float32)).all()
        with np.errstate(all="ignore"):
            expected = np.exp2(np.where(np.abs(x) < 2.0**-126, 0, x).astype(np.float64))
            got, ulp = power.view(np.float32).astype(np.float64), expected * 2.0**-22
            normal = (expected >= 2.0**-126) & (expected < 2.0**128 * (1 - 2.0**-24))
            assert (np.abs(got - expected)[normal] <= ulp[normal]).all()
            assert (got[expected < 2.0**-126 * (1 - 2.0**-22)] == 0).all()
            assert np.isinf(got[expected > 2.0**128]).all() and np.isnan(got[np.isnan(x)]).all()
            for sign, shift in ((1, 0), (-1, 16)):
                number = ~np.isnan(x)
                as_fp16 = (sign * x).astype(np.float16).view(np.uint16)
                np.testing.assert_array_equal((fp16 >> shift & 0xFFFF)[number], as_fp16[number])
                np.testing.assert_array_equal((bf16 >> shift & 0xFFFF)[number], _bf16(sign * x[number]))
                assert (bf16[~number] == 0x7FFF7FFF).all() and (fp16[~number] == 0x7FFF7FFF).all()

    def scans(self) -> None:
        """Shuffles, shared memory and barriers together."""
        for down, across, threads in ((1, 1, 32), (3, 2, 128), (1, 2, 1024)):
            values = self.random.integers(0, 2**20, (down, across, threads), dtype=np.uint32)
            source, out = self.memory.put(values), self.memory.put(np.zeros_like(values))
            self.call("wrapper_scan", source, out, across, down, threads)
            got = self.memory.take(out, values.shape, np.uint32)
            self.memory.take(source, values.shape, np.uint32)
            np.testing.assert_array_equal(got, values.cumsum(-1, dtype=np.uint32))

    def arrivals(self) -> None:
        """One block, the last, sees what all have written, again and again by the same counter."""
        for blocks, counter in ((1, 0), (2, 1), (3, 1), (20, 3), (7, 3)):
            values = self.random.integers(0, 2**20, blocks).astype(np.uint32)
            arrays = (values, np.full(blocks, 2**32 - 1, np.uint32), np.full(1, 2**32 - 1, np.uint32))
            given, everyone, total = map(self.memory.put, arrays)
            self.call("wrapper_add_up", given, everyone, blocks, counter, total)
            self.memory.take(given, (0,), np.uint8)
            np.testing.assert_array_equal(self.memory.take(everyone, (blocks,), np.uint32), values)
            assert self.memory.take(total, (1,), np.uint32)[0] == values.sum(dtype=np.uint32)


def _table(row: Place, column: Place, elements: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column [32, elements] of a lane's element i, by the PTX ISA's formulas."""
    table = np.empty((2, 32, elements), np.int64)
    for lane in range(32):
        for i in range(elements):
            group, thread = lane >> 2, lane % 4
            table[:, lane, i] = row(group, thread, i), column(group, thread, i)
    assert len(np.unique(table.reshape(2, -1), axis=1).T) == 32 * elements, "an element of the matrix has two places"
    return table[0], table[1]


# "row = groupID for ai where 0 <= i < 2 || 4 <= i < 6, groupID + 8 otherwise;
#  col = (threadID_in_group * 2) + (i & 0x1) for i < 4, + 8 for i >= 4"
A_TABLE = _table(
    lambda group, thread, i: group if 0 <= i < 2 or 4 <= i < 6 else group + 8,
    lambda group, thread, i: thread * 2 + (i & 1) + (0 if i < 4 else 8),
    8,
)
# "row = (threadID_in_group * 2) + (i & 0x1) for bi where i < 2, + 8 for i >= 2; col = groupID"
B_TABLE = _table(
    lambda group, thread, i: thread * 2 + (i & 1) + (0 if i < 2 else 8),
    lambda group, thread, i: group,
    4,
)
# "row = groupID for ci where i < 2, groupID + 8 for i >= 2; col = (threadID_in_group * 2) + (i & 0x1)"
C_TABLE = _table(
    lambda group, thread, i: group if i < 2 else group + 8,
    lambda group, thread, i: thread * 2 + (i & 1),
    4,
)


def _pair(elements: np.ndarray) -> np.ndarray:
    """[..., 2 k] 16-bit elements as [..., k] registers, the first of two in the low half."""
    wide = elements.astype(np.uint32)
    return np.ascontiguousarray(wide[..., 0::2] | wide[..., 1::2] << 16)


def _bf16(x: np.ndarray) -> np.ndarray:
    """Nearest even, by trying both neighbours in fp64."""
    low = x.view(np.uint32) >> 16
    high = low + 1
    value = [(bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64) for bits in (low, high)]
    top = np.where((high & 0x7FFF) == 0x7F80, np.sign(value[0]) * 2.0**128, value[1])  # infinity rounds as 2^128
    below, above = np.abs(x - value[0]), np.abs(top - x)
    up = (above < below) | ((above == below) & (low & 1 == 1))
    return np.where(np.isfinite(x) & up, high, low).astype(np.uint16)


CHECKS = {
    "products": "mma_bf16 mma_fp16",
    "matrices": "load_matrix_x4 load_matrix_x4_transposed sync_warp store_words",
    "exchanges": "shuffle shuffle_xor shuffle_up shuffle_down vote whole",
    "copies": "copy_async16 copy_commit copy_wait sync_block",
    "conversions": "exp2_fast pack_bf16 pack_fp16 widen_fp16",
    "scans": "block_x block_y blocks_x thread_x threads shuffle_up sync_block",
    "arrivals": "last_to_arrive sync_block",
}
"""The checks, and the wrappers that each of them tries."""


def main() -> int:
    """Runs the checks, for each seed of the emulator's scheduler; says which wrappers are not as the table says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library")
    parser.add_argument("--cuda", action="store_true")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--only", default=",".join(CHECKS))
    options = parser.parse_args()
    library = ctypes.CDLL(options.library)
    library.wrapper_error.restype = ctypes.c_char_p
    failed = 0
    for seed in range(1 if options.cuda else options.seeds):
        if not options.cuda:
            library.emulator_seed(ctypes.c_uint64(seed))
        for name in options.only.split(","):
            try:
                getattr(Checks(library, Cuda() if options.cuda else Host()), name)()
                print(f"seed {seed}: {name} as the table says ({CHECKS[name]})", flush=True)
            except Exception as error:  # noqa: BLE001  a kernel that broke the device shows as anything
                failed += 1
                said = " ".join(str(error).split())[:300]
                print(f"seed {seed}: {name} NOT as the table says, one of {CHECKS[name]}: {said}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
