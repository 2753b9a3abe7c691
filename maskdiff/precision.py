"""Where and how a run computes: device, precision and compiler, resolved once and said plainly."""

import ctypes
import functools
import math
import platform
import time

import torch

from .errors import UserError, first_line

GAIN = 1.25  # fp32 products this much faster than bf16 ones outweigh that bf16 halves what is kept and moved


def resolve_device(name: str) -> torch.device:
    """Returns the device that `auto`, `cpu` or `cuda` stands for here. Raises UserError when it is not there."""
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device is auto, cpu or cuda, not {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no CUDA device; check the driver, or use --device cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def has_native_bf16(device: torch.device) -> bool:
    """True where bf16 matrix products run in hardware: AVX-512-BF16 or AMX processors, GPUs from sm_80."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@functools.cache
def _fp32_is_faster() -> bool:
    """Whether this processor multiplies float32 faster than bf16, though it has instructions for both: so did an Intel
    Xeon whose AMX a virtual machine hid. By one thread's own time, in turns, so that other jobs do not count."""
    threads, best = torch.get_num_threads(), {torch.float32: math.inf, torch.bfloat16: math.inf}
    torch.set_num_threads(1)
    try:
        for _ in range(6):
            for dtype in best:
                left, right = (torch.ones(size, 512, dtype=dtype) for size in (512, 2048))
                start = time.thread_time()
                left.mm(right.t())
                best[dtype] = min(best[dtype], time.thread_time() - start)
    finally:
        torch.set_num_threads(threads)
    return GAIN * best[torch.float32] < best[torch.bfloat16]


def resolve_precision(name: str, device: torch.device, before: str | None = None) -> torch.dtype:
    """Returns the compute dtype that `auto`, `bf16` or `fp32` stands for on this device. `auto` is what a run has
    computed in `before` ("bfloat16", "float32"), where the device can; else bf16, unless a CPU multiplies fp32 faster.

    Raises UserError for bf16 where the device has it only in software: it would be many times slower than fp32.
    """
    if name not in ("auto", "bf16", "fp32"):
        raise UserError(f"--precision is auto, bf16 or fp32, not {name!r}")
    if name == "fp32" or (name == "auto" and before == "float32"):
        return torch.float32
    native = has_native_bf16(device)
    if name == "bf16" and not native:
        raise UserError(
            f"--precision bf16: this {'GPU' if device.type == 'cuda' else 'processor'} has no bf16 matrix products "
            "(it takes AVX-512-BF16, AMX, or a GPU from sm_80); use --precision fp32 or auto"
        )
    if not native:
        return torch.float32
    if name == "auto" and before is None and device.type == "cpu" and _fp32_is_faster():
        return torch.float32
    return torch.bfloat16


def words(dtype: torch.dtype, device: torch.device) -> str:
    """What a run says it computes in and on: "bf16 on the CPU, 2 threads"."""
    name = "bf16" if dtype == torch.bfloat16 else "fp32"
    if device.type == "cuda":
        return f"{name} on {torch.cuda.get_device_name(device)}"
    return f"{name} on the CPU, {torch.get_num_threads()} threads"


def check_compiler(device: torch.device) -> None:
    """Compiles one sum by torch.compile. Raises UserError where that does not work: there is no compiler, no Triton."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except Exception as error:
        needs = "Triton" if device.type == "cuda" else "a C++ compiler"
        raise UserError(
            f"--compile: torch.compile needs {needs}, and does not work here: {first_line(error)}"
        ) from error


def keep_freed_memory() -> bool:
    """Makes glibc's malloc keep large freed blocks instead of returning them to the kernel after each use.

    A training step frees and takes the same activations again and again; page faults alone took a third of a step at
    90 % masked. Returns False where malloc is not glibc's. Never call it for one contestant of a benchmark only.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of malloc.h
    return bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, 2**31 - 1))
