"""denoising_loss in plain PyTorch: what the op means. `compute` is float64 where a test wants the truth."""

import torch
from torch import Tensor

from maskdiff_kernels.ops.noisy_patches import reference as noisy
from maskdiff_kernels.ops.samples import Samples, sample_of


def run(
    prediction: Tensor,  # [B, K, P*P*C] or [M, P*P*C]
    samples: Samples,
    target: str,
    weight: Tensor | None,  # [T] float32
    needs_grad: bool,
    compute: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [], per-sample losses [B], and 2 weight_t (prediction - target), shaped and typed like the prediction.

    The last is the gradient but for the incoming gradients and the count of elements, which the backward brings in:
    that keeps it of order 1, so that float16 does not lose it.
    """
    if prediction.is_cpu:
        samples.check_ranges()
    sample, batch = samples.sample(), len(samples.n)
    difference = prediction.reshape(len(sample), samples.size).to(compute) - targets(samples, target, compute)
    weights = torch.ones(batch, device=sample.device) if weight is None else weight[samples.timestep]
    cu = samples.cu_patches
    counts = sample.new_full((batch,), samples.keep_ids.shape[1]) if cu is None else cu.diff().long()
    squares = difference.square().sum(1)
    sums = torch.segment_reduce(squares, "sum", lengths=counts, initial=0, unsafe=True)  # in the same order everywhere
    per_sample = weights * (sums / (counts.clamp(min=1) * samples.size))
    if not needs_grad:
        return per_sample.mean(), per_sample, prediction.new_empty(0)
    error = 2 * weights[sample, None] * difference
    return per_sample.mean(), per_sample, error.to(prediction.dtype).view(prediction.shape)


def targets(samples: Samples, target: str, compute: torch.dtype) -> Tensor:  # [M, P*P*C]
    """What a perfect model would predict."""
    if target == "x0":
        return noisy.clean(samples, compute)
    if target == "eps":
        return noisy.noise(samples, compute)
    alpha, sigma = noisy.coefficients(samples, compute)
    return alpha * noisy.noise(samples, compute) - sigma * noisy.clean(samples, compute)


def factors(
    error: Tensor,  # [B, K, P*P*C] or [M, P*P*C]
    cu_patches: Tensor | None,  # [B + 1] int32
    grad_mean: Tensor,  # [] float32
    grad_per_sample: Tensor,  # [B] float32
) -> Tensor:  # [B] float32; of a sample without patches: unused
    """What the incoming gradients make of each sample's error: their sum, over the elements that it shows."""
    counts = error.shape[1] if cu_patches is None else cu_patches.diff().long()
    return (grad_mean / grad_per_sample.shape[0] + grad_per_sample) / (counts * error.shape[-1])


def run_backward(
    error: Tensor,  # [B, K, P*P*C] or [M, P*P*C]
    cu_patches: Tensor | None,  # [B + 1] int32
    grad_mean: Tensor,  # [] float32
    grad_per_sample: Tensor,  # [B] float32, of any stride
) -> Tensor:
    """error times the factor of its sample, rounded once."""
    factor = factors(error, cu_patches, grad_mean, grad_per_sample)
    if cu_patches is None:
        return (error * factor[:, None, None]).to(error.dtype)
    return (error * factor[sample_of(error, cu_patches), None]).to(error.dtype)
