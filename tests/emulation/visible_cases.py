"""Runs noisy_patches' and denoising_loss' CUDA kernels on exact-size, poisoned buffers, in the emulator or on a GPU.

    python tests/emulation/visible_cases.py LIBRARY CASE [CASE ...] [--entry=PREFIX] [--cuda]

runs both in cases (see CASES), by maskdiff_cuda_... or functions of another prefix, in a process of its own, as the
sanitizers need it; it imports nothing but NumPy, and PyTorch for a GPU.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from conformance import BF16, FP16, FP32, Cuda, Host, as_dtype, run_cases, set_up

TARGETS = ("eps", "x0", "v")  # maskdiff_target
TIMESTEPS, IMAGES, COUNTERS = 5, 3, 16384
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
    target: str = "v"
    weighted: bool = True
    gap: int = 0  # elements after every patch of the prediction

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
            "image_ids": (np.arange(batch) + IMAGES - 1) % IMAGES,
            "keep_ids": np.concatenate(kept).astype(np.int32),
            "cu_patches": np.cumsum([0, *self.counts]).astype(np.int32),
            "flip": (np.arange(batch) % 2).astype(np.uint8),
            "timestep": random.integers(0, TIMESTEPS, batch),
            "alpha_sigma": np.stack((np.cos(angle), np.sin(angle)), 1).astype(np.float32),
            "seed": np.array([-1234567890123456789]),
        }
        unused = {"slots": not self.slots, "cu_patches": not self.ragged, "alpha_sigma": not self.noisy}
        return {name: array for name, array in arrays.items() if not unused.get(name)}

    def prediction(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The prediction [M, E] (bit patterns for halves), weight [T], and incoming gradients [2 B]: that of the mean,
        then those of the samples' losses, every second of them, from place 1 on."""
        random = np.random.default_rng(self.size)
        x = random.standard_normal((sum(self.counts), self.size), np.float32)
        weight, grads = np.linspace(0.5, 4, TIMESTEPS), random.standard_normal(2 * len(self.counts), np.float32)
        return as_dtype(x, self.dtype), weight.astype(np.float32), grads

    def put(self, memory: Host | Cuda, arrays: dict[str, np.ndarray]) -> tuple[Samples, dict[str, ctypes.c_void_p]]:
        pointers = {name: memory.put(array) for name, array in arrays.items()}
        numbers = (IMAGES, self.rows, arrays["patches"].shape[1], *self.grid, self.patch, self.channels)
        visible = 0 if self.ragged else self.counts[0]
        counts = (len(self.counts), visible, sum(self.counts), TIMESTEPS)
        return Samples(*(pointers.get(name) for name in ARRAYS), *numbers, *counts), pointers


def free(memory: Host | Cuda, pointers: dict[str, ctypes.c_void_p]) -> None:
    for pointer in pointers.values():
        memory.take(pointer, (0,), np.uint8)


def poison(shape: tuple[int, ...], dtype: int) -> np.ndarray:
    """NaN in every dtype."""
    return np.full(shape, np.nan, np.float32) if dtype == FP32 else np.full(shape, 0xFFFF, np.uint16)


def check(code: int, explain: Callable[[int], str]) -> None:
    if code:
        raise RuntimeError(explain(code))


def noisy_patches(
    library: ctypes.CDLL,
    case: Case,
    order: int = 0,
    prefix: str = "maskdiff_cuda_",
    on: type[Host] | type[Cuda] = Host,
    **changed: np.ndarray,
) -> tuple[np.ndarray, ...]:
    """x_t [M, E], bit patterns for halves."""
    memory, out = on(), poison((sum(case.counts), case.size), case.dtype)
    samples, pointers = case.put(memory, case.arrays() | changed)
    to = memory.put(out)
    explain = set_up(library, on, order)
    code = getattr(library, f"{prefix}noisy_patches")(ctypes.byref(samples), to, case.dtype, 0, None)
    free(memory, pointers)
    result = memory.take(to, out.shape, out.dtype.type)
    check(code, explain)
    return (result,)


def denoising_loss(
    library: ctypes.CDLL,
    case: Case,
    order: int = 0,
    prefix: str = "maskdiff_cuda_",
    on: type[Host] | type[Cuda] = Host,
    counter: int = 0,
    **changed: np.ndarray,
) -> tuple[np.ndarray, ...]:
    """mean [1], per_sample [B], error and gradient [M, E] (bit patterns for halves)."""
    memory, batch, total = on(), len(case.counts), sum(case.counts)
    samples, pointers = case.put(memory, case.arrays() | changed)
    prediction, weight, grads = case.prediction()
    wide = poison((total, case.size + case.gap), case.dtype)
    wide[:, : case.size] = prediction
    strides = (case.counts[0] * wide.shape[1], wide.shape[1])
    pointers |= {name: memory.put(x) for name, x in (("prediction", wide), ("weight", weight), ("grads", grads))}
    outputs = [poison((1,), FP32), poison((batch,), FP32), *(poison((total, case.size), case.dtype) for _ in range(2))]
    mean, per_sample, error, gradient = map(memory.put, outputs)
    explain = set_up(library, on, order)
    count = getattr(library, f"{prefix}denoising_loss_workspace")
    count.restype = ctypes.c_int64
    pointers["workspace"] = memory.put(np.full(count(ctypes.byref(samples)), np.nan))
    code = getattr(library, f"{prefix}denoising_loss")(
        ctypes.byref(samples),
        pointers["prediction"],
        *map(ctypes.c_int64, strides),
        case.dtype,
        TARGETS.index(case.target),
        pointers["weight"] if case.weighted else None,
        *(mean, per_sample, error, pointers["workspace"]),
        *(counter, 0, None),
    )
    if not code:
        code = getattr(library, f"{prefix}denoising_loss_backward")(
            error,
            pointers.get("cu_patches"),
            *(ctypes.c_void_p(pointers["grads"].value + 4 * at) for at in (0, 1)),
            *map(ctypes.c_int64, (2, batch, total, case.size)),
            *(case.dtype, gradient, 0, None),
        )
    free(memory, pointers)
    outputs = [
        memory.take(pointer, x.shape, x.dtype.type)
        for pointer, x in zip((mean, per_sample, error, gradient), outputs, strict=True)
    ]
    check(code, explain)
    return tuple(outputs)


CASES = {
    "one": Case((1,), patch=1, channels=1, target="eps"),
    "ones": Case((15,) * 3, patch=1, channels=1, dtype=BF16),
    "colours": Case((7,) * 2, patch=1, dtype=FP16, pad=3, target="x0"),
    "twos": Case((6,) * 4, patch=2, channels=1, dtype=BF16, gap=4),
    "twelve": Case((15,) * 2, patch=2, pad=4, target="eps", weighted=False),
    "odd": Case((4,) * 3, patch=3, dtype=BF16, pad=5),
    "fours": Case((8,) * 5, dtype=BF16, pad=16, gap=8),
    "unaligned": Case((8,) * 2, dtype=BF16, pad=1, gap=1, target="x0"),
    "wide": Case((2,) * 3, patch=16, grid=(2, 2), dtype=FP16),
    "five": Case((3,) * 2, patch=5, channels=2, gap=2),
    "ragged": Case((3, 0, 15, 1, 8, 0), ragged=True, dtype=BF16),
    "ragged-odd": Case((0, 2, 0, 15), patch=3, ragged=True, slots=True, gap=3),
    "slots": Case((9,) * 4, slots=True, dtype=FP16, weighted=False),
    "long": Case((420,), patch=2, grid=(21, 20), dtype=BF16, target="eps"),
    "many": Case((36,) * 2, patch=8, grid=(6, 6)),
    "turns": Case((6,), patch=64, grid=(2, 3), dtype=BF16),
    "crowd": Case((1,) * 300, patch=1, channels=1),
    "empty": Case((0, 0), ragged=True),
    "gap": Case((2,) * 2, gap=1, target="eps"),
    "plain": Case((9,) * 2, noisy=False, dtype=BF16),
    "plain-odd": Case((2, 5), patch=3, channels=1, noisy=False, ragged=True),
}
LOSSES = [name for name, case in CASES.items() if case.noisy]


def run(library: ctypes.CDLL, case: Case, order: int, **options: Any) -> None:
    noisy_patches(library, case, order, **options)
    if case.noisy:
        denoising_loss(library, case, order, **options)


if __name__ == "__main__":
    run_cases(run, CASES)
