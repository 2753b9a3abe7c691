"""Runs noisy_patches' and denoising_loss' CUDA kernels in an emulated library, on exact-size, poisoned buffers.

    python tests/emulation/visible_cases.py LIBRARY OP CASE [CASE ...] [--entry=NAME]

runs cases (see CASES) of one of the two ops, by maskdiff_cuda_OP or by what else is named, in a process of its own, as
the sanitizers need it; it imports nothing but NumPy.
"""

import ctypes
import sys
from dataclasses import dataclass

import numpy as np
from conformance import Host

FP32, BF16, FP16 = 0, 1, 2  # maskdiff_dtype
TIMESTEPS, IMAGES = 5, 3
ARRAYS = "patches slots n image_ids keep_ids cu_patches flip timestep alpha_sigma seed".split()


class Samples(ctypes.Structure):
    """maskdiff_samples."""

    _fields_ = [(name, ctypes.c_void_p) for name in ARRAYS] + [
        (name, ctypes.c_int64)
        for name in "images rows stride grid_down grid_across patch channels batch visible total timesteps".split()
    ]


@dataclass(frozen=True)
class Case:
    """Samples that show so many patches each; every second one is flipped."""

    counts: tuple[int, ...]
    patch: int = 4
    channels: int = 3
    grid: tuple[int, int] = (3, 5)
    ragged: bool = False
    pad: int = 0  # bytes from the end of an image to the next
    slots: bool = False
    noisy: bool = True
    dtype: int = FP32

    @property
    def size(self) -> int:
        return self.patch**2 * self.channels

    @property
    def rows(self) -> int:
        return self.grid[0] * self.grid[1] + (2 if self.slots else 0)

    def arrays(self) -> dict[str, np.ndarray]:
        random = np.random.default_rng(self.size + len(self.counts))
        places, batch = self.grid[0] * self.grid[1], len(self.counts)
        kept = [np.sort(random.permutation(places)[:count]) for count in self.counts]
        angle = np.linspace(0.1, 1.4, TIMESTEPS)
        arrays = {
            "patches": random.integers(0, 256, (IMAGES, self.rows * self.size + self.pad)).astype(np.uint8),
            "slots": random.integers(0, self.rows, sum(self.counts)).astype(np.int32),
            "n": np.arange(2**32 - 1, 2**32 - 1 + batch),
            "image_ids": random.integers(0, IMAGES, batch),
            "keep_ids": np.concatenate(kept).astype(np.int32),
            "cu_patches": np.cumsum([0, *self.counts]).astype(np.int32),
            "flip": (np.arange(batch) % 2).astype(np.uint8),
            "timestep": random.integers(0, TIMESTEPS, batch),
            "alpha_sigma": np.stack((np.cos(angle), np.sin(angle)), 1).astype(np.float32),
            "seed": np.array([-1234567890123456789]),
        }
        unused = {"slots": not self.slots, "cu_patches": not self.ragged, "alpha_sigma": not self.noisy}
        return {name: array for name, array in arrays.items() if not unused.get(name)}

    def put(self, memory: Host, arrays: dict[str, np.ndarray]) -> tuple[Samples, dict[str, ctypes.c_void_p]]:
        pointers = {name: memory.put(array) for name, array in arrays.items()}
        numbers = (IMAGES, self.rows, arrays["patches"].shape[1], *self.grid, self.patch, self.channels)
        visible = 0 if self.ragged else self.counts[0]
        counts = (len(self.counts), visible, sum(self.counts), TIMESTEPS)
        return Samples(*(pointers.get(name) for name in ARRAYS), *numbers, *counts), pointers


def free(memory: Host, pointers: dict[str, ctypes.c_void_p]) -> None:
    for pointer in pointers.values():
        memory.take(pointer, (0,), np.uint8)


def poison(shape: tuple[int, ...], dtype: int) -> np.ndarray:
    """NaN in every dtype."""
    return np.full(shape, np.nan, np.float32) if dtype == FP32 else np.full(shape, 0xFFFF, np.uint16)


def check(library: ctypes.CDLL, code: int) -> None:
    if code:
        raise RuntimeError(library.wrapper_error(code).decode() if code >= 1000 else f"error {code}")


def noisy_patches(
    library: ctypes.CDLL, case: Case, order: int = 0, entry: str = "maskdiff_cuda_noisy_patches", **changed: np.ndarray
) -> tuple[np.ndarray, ...]:
    """x_t [M, E], bit patterns for halves."""
    memory, out = Host(), poison((sum(case.counts), case.size), case.dtype)
    samples, pointers = case.put(memory, case.arrays() | changed)
    to = memory.put(out)
    library.emulator_seed(ctypes.c_uint64(order))
    code = getattr(library, entry)(ctypes.byref(samples), to, case.dtype, 0, None)
    free(memory, pointers)
    result = memory.take(to, out.shape, out.dtype.type)
    check(library, code)
    return (result,)


CASES = {
    "one": Case((1,), patch=1, channels=1),
    "ones": Case((15,) * 3, patch=1, channels=1, dtype=BF16),
    "colours": Case((7,) * 2, patch=1, dtype=FP16, pad=3),
    "twos": Case((6,) * 4, patch=2, channels=1, dtype=BF16),
    "twelve": Case((15,) * 2, patch=2, pad=4),
    "odd": Case((4,) * 3, patch=3, dtype=BF16, pad=5),
    "fours": Case((8,) * 5, dtype=BF16, pad=16),
    "unaligned": Case((8,) * 2, dtype=BF16, pad=1),
    "wide": Case((2,) * 3, patch=16, grid=(2, 2), dtype=FP16),
    "five": Case((3,) * 2, patch=5, channels=2),
    "ragged": Case((3, 0, 15, 1, 8, 0), ragged=True, dtype=BF16),
    "ragged-odd": Case((0, 2, 0, 15), patch=3, ragged=True, slots=True),
    "slots": Case((9,) * 4, slots=True, dtype=FP16),
    "plain": Case((9,) * 2, noisy=False, dtype=BF16),
    "plain-odd": Case((2, 5), patch=3, channels=1, noisy=False, ragged=True),
    "long": Case((420,), patch=2, grid=(21, 20), dtype=BF16),
    "many": Case((36,) * 2, patch=8, grid=(6, 6)),
}


def main() -> None:
    """Runs the cases named, and says so."""
    library = ctypes.CDLL(sys.argv[1])
    library.wrapper_error.restype = ctypes.c_char_p
    run = globals()[sys.argv[2]]
    entries = [word.removeprefix("--entry=") for word in sys.argv if word.startswith("--entry=")]
    for name in sys.argv[3 : len(sys.argv) - len(entries)]:
        run(library, CASES[name], 3, *entries)
        print(f"ran {name}")


if __name__ == "__main__":
    main()
