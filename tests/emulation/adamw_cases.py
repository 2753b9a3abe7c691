"""Runs adamw_ema's CUDA kernels, emulated or on a GPU, on exact-size buffers, outputs poisoned with NaN first.

    python tests/emulation/adamw_cases.py LIBRARY CASE [CASE ...] [--cuda]

runs cases (see CASES) in a process of its own, as the sanitizers need it; it imports nothing but NumPy. With --cuda the
library is the one for GPUs, and PyTorch brings the memory.
"""

import ctypes
from dataclasses import dataclass

import numpy as np
from conformance import BF16, FP16, FP32, Cuda, Host, as_dtype, run_cases, set_up

FLATS = ("master", "exp_avg", "exp_avg_sq", "ema", "ema2")
NUMBERS = (0.9, 0.99, 1e-6, 0.3, 0.75, 0.25)  # as maskdiff_adamw_numbers, up to the gammas


class Update(ctypes.Structure):
    """maskdiff_adamw."""

    _fields_ = [
        (name, ctypes.c_void_p)
        for name in (*FLATS, *"low adam_step ema_step hyper grads grad_dtypes offsets sizes decays".split())
    ] + [(name, ctypes.c_int64) for name in ("segments", "low_size", "low_dtype")]


class Numbers(ctypes.Structure):
    """maskdiff_adamw_numbers."""

    _fields_ = [
        (name, ctypes.c_double)
        for name in "beta1 beta2 eps weight_decay ema_decay ema2_decay ema_gamma ema2_gamma".split()
    ] + [("ema_every", ctypes.c_int64)]


@dataclass(frozen=True)
class Case:
    """Parameters of these sizes, `gap` elements before each; every second one decays."""

    sizes: tuple[int, ...]
    gap: int = 0
    dtypes: tuple[int, ...] = (FP32,)  # of the gradients, in turn
    low: int = BF16
    low_size: int = 0
    two: bool = False  # averages
    gammas: tuple[float, float] = (-1, -1)  # of the averages: by a power function from 0 on
    every: int = 1  # the update is the second that the averages see
    bound: float = 0.5
    bad: float | None = None  # the last gradient's last element
    shift: str = ""  # the buffer, or "grads", that starts in the middle of four elements

    @property
    def offsets(self) -> list[int]:
        return [sum(self.sizes[:i]) + self.gap * (i + 1) for i in range(len(self.sizes))]

    @property
    def total(self) -> int:
        return self.offsets[-1] + self.sizes[-1]

    def flats(self) -> dict[str, np.ndarray]:
        """Averages that are not due end after one element: sanitizers see what goes beyond."""
        random = np.random.default_rng(len(self.sizes))
        values = [random.standard_normal(self.total, np.float32) for _ in FLATS]
        averages = [x if 2 % self.every == 0 else x[:1] for x in values[3:]]
        return dict(zip(FLATS, [values[0], 0.1 * values[1], values[2] ** 2, *averages], strict=True))

    def gradients(self) -> list[np.ndarray]:
        """One a parameter, as the kernels take it."""
        random, results = np.random.default_rng(self.total), []
        for i, size in enumerate(self.sizes):
            x = random.standard_normal(size, np.float32)
            if self.bad is not None and i == len(self.sizes) - 1:
                x[-1] = self.bad
            results.append(as_dtype(x, self.dtypes[i % len(self.dtypes)]))
        return results


def run(library: ctypes.CDLL, case: Case, seed: int = 0, on: type[Host] | type[Cuda] = Host) -> dict[str, np.ndarray]:
    """The state after one update that follows three others (one of the averages'); norm [1], skipped [1]."""
    memory, flats, gradients = on(), case.flats(), case.gradients()
    if not case.two:
        del flats["ema2"]
    arrays = flats | {
        "low": np.full(case.low_size, 0xFFFF, np.uint16),
        "adam_step": np.array([3], np.float32),
        "ema_step": np.array([1], np.float32),
    }
    head = {case.shift: 2}.get  # elements that stand before a buffer in its memory
    wholes = {name: memory.put(np.pad(array, (head(name, 0), 0))) for name, array in arrays.items()}
    whole_grads = [memory.put(np.pad(g, (head("grads", 0), 0))) for g in gradients]
    pointers = {name: wholes[name].value + head(name, 0) * array.itemsize for name, array in arrays.items()}
    grads = [whole.value + head("grads", 0) * g.itemsize for whole, g in zip(whole_grads, gradients, strict=True)]
    hyper = memory.put(np.array([0.02, case.bound], np.float32))
    count = len(case.sizes)
    dtypes, decays = ([given[i % len(given)] for i in range(count)] for given in (case.dtypes, (1, 0)))
    tables = [(ctypes.c_int64 * count)(*values) for values in (dtypes, case.offsets, case.sizes, decays)]
    update = Update(
        *(pointers.get(name) for name in (*FLATS, "low", "adam_step", "ema_step")),
        hyper,
        *(ctypes.cast(table, ctypes.c_void_p) for table in ((ctypes.c_void_p * count)(*grads), *tables)),
        *(count, case.low_size, case.low),
    )
    outputs = [memory.put(np.full(1, np.nan, np.float32)) for _ in range(2)]
    workspace = memory.put(np.full(library.maskdiff_cuda_adamw_ema_workspace(), np.nan))
    explain = set_up(library, on, seed)
    numbers = Numbers(*NUMBERS, *case.gammas, case.every)
    code = library.maskdiff_cuda_adamw_ema(ctypes.byref(update), ctypes.byref(numbers), *outputs, workspace, 0, None)
    results = {}
    for name, array in arrays.items():
        size = head(name, 0) + len(array)
        results[name] = memory.take(wholes[name], (size,), array.dtype.type)[head(name, 0) :]
    for name, output in zip(("norm", "skipped"), outputs, strict=True):
        results[name] = memory.take(output, (1,), np.float32)
    for used in (hyper, workspace, *whole_grads):
        memory.take(used, (0,), np.uint8)
    if code:
        raise RuntimeError(explain(code))
    return results


CASES = {
    "one": Case((1,)),
    "odd": Case((15, 16, 17), gap=3, low_size=20, two=True, gammas=(-1, 3.5)),
    "fours": Case((1024, 20, 512, 5), gap=4, dtypes=(BF16, FP32), low_size=1042),
    "aligned": Case((16388, 32768, 12), dtypes=(FP32, BF16, FP16), low_size=49157),
    "halves": Case((4096, 3, 700), dtypes=(BF16, FP16, FP32), low=FP16, low_size=4103, two=True, gammas=(6.94, -1)),
    "chunks": Case((16383, 1, 16385, 16384), dtypes=(FP32, BF16), low_size=49153, bound=np.inf),
    "sums": Case((3, 40_000), gap=16, dtypes=(BF16,), low_size=40_035),
    "many": Case((5, 8, 1) * 400, gap=1, dtypes=(FP32, BF16), low_size=6000),
    "capped": Case((5, 9), gap=2_200_000),  # more elements than one sum of squares each for the most blocks
    **{f"{name}-shifted": Case((300, 17), low_size=317, two=True, shift=name) for name in (*FLATS, "low", "grads")},
    "halves-shifted": Case((300, 17), dtypes=(BF16, FP16), low_size=317, shift="grads"),
    "due": Case((40, 17), two=True, gammas=(-1, 3.5), every=2),
    "not-due": Case((300, 17), low_size=317, two=True, every=3),
    "bad": Case((300, 17), dtypes=(BF16, FP32), low_size=10, two=True, bad=np.nan),
}


if __name__ == "__main__":
    run_cases(run, CASES)
