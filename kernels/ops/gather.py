"""gather_patches: the visible patches of a batch as they are stored. No op: it feeds ops, from the host's memory."""

import ctypes

import torch
from torch import Tensor

from maskdiff_kernels import dispatch, library
from maskdiff_kernels.ops import checks
from maskdiff_kernels.ops.draw_batch.op import Batch
from maskdiff_kernels.ops.samples import Samples, Store, flatten
from maskdiff_kernels.ops.structs import address, samples_struct


def gather_patches(
    store: Store,
    batch: Batch,
    out: Tensor | None = None,  # [M, P*P*C] uint8
) -> Tensor:  # [M, P*P*C] uint8
    """Copies what a batch shows of packed images, bytes as they are stored: input of a model, or of a staging buffer.

    The patches of a mirrored picture are the right ones, each not mirrored yet: with `slots`, `noisy_patches` does
    that. Of a memory-mapped store the visible images alone are read, all at once. One thread does the work and leaves
    Python to others meanwhile. Where MASKDIFF_KERNELS has noisy_patches done by its reference, so is this.

    Args:
        store: packed images in the host's memory, or memory-mapped.
        batch: what the samples show, on the CPU.
        out: where to put it; None: a new tensor.

    Returns:
        [M, P*P*C] uint8, M = B * K for equal lengths, in the order of keep_ids; `out` where it is given.

    Raises:
        TypeError, ValueError: an argument that does not fit, named, with what it got and what it takes.
        LibraryError: the compiled kernels are missing or stale.
    """
    if not batch.keep_ids.is_cpu:
        raise ValueError(f"batch: got tensors on {batch.keep_ids.device}, takes tensors on cpu")
    samples = Samples(*flatten(store, batch, None, batch.n[:1]))  # nothing is random here: any seed
    samples.check()
    shape = samples.keep_ids.numel(), samples.size
    if out is None:
        out = torch.empty(shape, dtype=torch.uint8)
    checks.tensor("out", out, "uint8 [M, P*P*C]", torch.uint8, shape, samples.keep_ids.device)
    if dispatch.asked("noisy_patches")[0] == "reference":
        samples.check_ranges()
        return out.copy_(samples.stored())
    struct = samples_struct(samples)
    if library.cpu().maskdiff_cpu_gather_patches(ctypes.byref(struct), address(out)):
        samples.check_ranges()  # says which number it is
    return out
