"""What the CUDA kernels of noisy_patches and denoising_loss take, and which implementation runs for such samples."""

from types import ModuleType

import torch

from maskdiff_kernels import dispatch
from maskdiff_kernels.ops.samples import Samples
from maskdiff_kernels.ops.structs import SamplesStruct, samples_struct

MOST_QUADS = 2**31 - 1


def can_run(
    capability: tuple[int, int],  # compute capability of the GPU
    patches: int,  # visible, of the batch
    size: int,  # elements of a patch
) -> tuple[bool, str]:
    """Whether the kernels take such batches on such a GPU, with the reason."""
    if capability < (8, 0):
        return False, f"needs compute capability 8.0, this is {capability[0]}.{capability[1]}"
    if patches * -(-size // 4) > MOST_QUADS:
        return False, f"takes less than 2^33 visible elements, not {patches} patches of {size}"
    return True, "four elements a thread at a time"


def can_take(samples: Samples) -> tuple[bool, str]:
    """Whether the kernels take these samples, with the reason."""
    device = samples.keep_ids.device
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    return can_run(capability, samples.keep_ids.numel(), samples.size)


def cuda_struct(op: str, samples: Samples) -> SamplesStruct:
    """Samples as the CUDA functions take them, or ValueError. It borrows the tensors: keep them alive."""
    able, reason = can_take(samples)
    if not able:
        raise ValueError(f"backend: 'cuda' of {op} {reason}")
    return samples_struct(samples)


def choice(op: str, samples: Samples, backend: str) -> str:
    """The implementation asked for; for "auto" the chosen one, or else the one that takes such samples."""
    device, free = samples.keep_ids.device, dispatch.asked(op, backend)[0] == "auto"
    elsewhere = samples.patches.device != device  # in pinned memory, which CUDA C++ reads by itself
    if device.type == "cuda" and free and elsewhere:
        backend = "cuda"
    name = dispatch.choice(op, device, backend)
    if name == "cuda" and free and not elsewhere and not can_take(samples)[0]:
        name = "reference"
    if name != "cuda" and elsewhere:
        raise ValueError(f"store.patches: got pinned memory of the host, takes a tensor on {device} with {name!r}")
    return name


def choose(op: str, samples: Samples, backend: str) -> ModuleType:
    """The module of the choice."""
    return dispatch.choose(op, samples.keep_ids.device, choice(op, samples, backend))
