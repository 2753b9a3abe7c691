"""noisy_patches: the visible patches of a batch, normalised, with noise added. Contract, checks, registration."""

import torch
from torch import Tensor

from maskdiff_kernels import dispatch
from maskdiff_kernels.ops import checks
from maskdiff_kernels.ops.draw_batch.op import Batch
from maskdiff_kernels.ops.noisy_patches import cpp, cuda, reference, triton_host
from maskdiff_kernels.ops.registration import registered
from maskdiff_kernels.ops.samples import SCHEMA, Samples, Store, flatten
from maskdiff_kernels.ops.visible import choose


def noisy_patches(
    store: Store,
    batch: Batch,
    alpha_sigma: Tensor | None,  # [T, 2] float32
    seed: Tensor,  # [1] int64
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Tensor:  # [B, K, P*P*C] or [M, P*P*C]
    """Gathers the visible patches and adds noise: x_t = alpha_t x_0 + sigma_t eps, with x_0 = byte * (2/255) - 1.

    Only what is visible is read or drawn. The noise of a sample depends on (seed, n, place in the picture) alone.

    Args:
        store: packed images, or a staging buffer; for CUDA tensors also in pinned memory of the host ("cuda" alone),
            which then has to stay alive and unchanged until the stream has passed the call (see Store).
        batch: what the samples show.
        alpha_sigma: [T, 2] float32, row t holds (alpha_t, sigma_t). None: no noise, the plain gather x_0.
        seed: [1] int64, the run's seed.
        dtype: float32, bfloat16 or float16: computed in float32, rounded once.
        backend: "auto", "reference", "cpp", "triton" or "cuda".

    Returns:
        x_t, [B, K, P*P*C] for equal lengths or [M, P*P*C] for ragged ones, in `dtype`.

    Raises:
        TypeError, ValueError: an argument that does not fit, named, with what it got and what it takes. Numbers out of
            range are found on the CPU; CUDA tensors are not read back.
        LibraryError: the compiled kernels are missing or stale.

    Source: Ho et al., "Denoising Diffusion Probabilistic Models", arXiv 2006.11239, equation 4.
    """
    return _noisy_patches(*flatten(store, batch, alpha_sigma, seed), dtype, backend)


def _run(*arguments):
    *flat, dtype, backend = arguments
    samples = Samples(*flat)
    samples.check()
    if dtype not in checks.FLOATS:
        raise TypeError(f"dtype: got {dtype}, takes float32, bfloat16 or float16")
    return choose("noisy_patches", samples, backend).run(samples, dtype)


def _fake(*arguments):
    *flat, dtype, backend = arguments
    samples = Samples(*flat)
    return samples.keep_ids.new_empty((*samples.keep_ids.shape, samples.size), dtype=dtype)


_noisy_patches = registered("noisy_patches", f"({SCHEMA}, ScalarType dtype, str backend) -> Tensor", _run, _fake)
dispatch.register("noisy_patches", cuda=cuda, cpp=cpp, reference=reference, triton=triton_host)
