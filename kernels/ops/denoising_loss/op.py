"""denoising_loss: the loss of a prediction and, in the same pass, its gradient. Contract, checks, registration."""

from typing import Any

import torch
from torch import Tensor

from maskdiff_kernels import dispatch
from maskdiff_kernels.ops import checks
from maskdiff_kernels.ops.denoising_loss import cpp, cuda, reference, triton_host
from maskdiff_kernels.ops.draw_batch.op import Batch
from maskdiff_kernels.ops.registration import registered
from maskdiff_kernels.ops.samples import SCHEMA, Samples, Store, check_cu_patches, flatten
from maskdiff_kernels.ops.structs import TARGETS
from maskdiff_kernels.ops.visible import choice, choose


def denoising_loss(
    prediction: Tensor,  # [B, K, P*P*C] or [M, P*P*C], float32 / bfloat16 / float16
    store: Store,
    batch: Batch,
    alpha_sigma: Tensor,  # [T, 2] float32
    seed: Tensor,  # [1] int64
    target: str = "eps",
    weight: Tensor | None = None,  # [T] float32
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:  # [] float32, [B] float32
    """The masked denoising loss: weight_t times the mean squared error over a sample's visible elements.

    The target is computed anew from (images, seed, n) and never stored. Differentiable in `prediction`, for any
    incoming gradients of both outputs; the gradient is made in the same pass. A second derivative is an error.

    Args:
        prediction: [B, K, P*P*C], or [M, P*P*C] for ragged lengths; its last dimension must be dense.
        store, batch, alpha_sigma, seed: those that noisy_patches got. Patches in pinned memory of the host have to
            stay alive and unchanged until the stream has passed the call (see Store).
        target: what is predicted: "eps", "x0" or "v" = alpha eps - sigma x_0.
        weight: [T] float32 weight of each timestep. None: 1.
        backend: "auto", "reference", "cpp", "triton" or "cuda".

    Returns:
        - the mean over samples of the per-sample losses, [] float32. A sample without visible patches counts as 0.
        - the per-sample losses, [B] float32.

    Raises:
        TypeError, ValueError: an argument that does not fit, named, with what it got and what it takes. Numbers out of
            range are found on the CPU; CUDA tensors are not read back.
        LibraryError: the compiled kernels are missing or stale.

    Source: loss of Ho et al., arXiv 2006.11239, equation 14; v of Salimans and Ho, arXiv 2202.00512; weights as in
    Hang et al., arXiv 2303.09556.
    """
    flat = flatten(store, batch, alpha_sigma, seed)
    return _DenoisingLoss.apply(prediction, flat, target, weight, backend)


class _DenoisingLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, prediction: Tensor, flat, target, weight, backend):
        wanted = ctx.needs_input_grad[0]
        mean, per_sample, error = _denoising_loss(prediction, *flat, target, weight, wanted, backend)
        if wanted:
            ctx.save_for_backward(error, *([] if flat[7] is None else [flat[7]]))
            # the implementation that ran; a compiled graph cannot ask, and chooses in both ops
            compiled = torch.compiler.is_compiling()
            ctx.backend = backend if compiled else choice("denoising_loss", Samples(*flat), backend)
        return mean, per_sample

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor):
        grad_mean, grad_per_sample = gradients
        # in a compiled graph the tracer runs this with gradients on, and AOTAutograd itself refuses second derivatives
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("denoising_loss has no second derivative: call backward without create_graph")
        error, *cu_patches = ctx.saved_tensors
        cu = cu_patches[0] if cu_patches else None
        return _backward(error, cu, grad_mean, grad_per_sample, ctx.backend), None, None, None, None


def _run(prediction, *arguments):
    *flat, target, weight, needs_grad, backend = arguments
    samples = Samples(*flat)
    samples.check()
    device, shape = samples.keep_ids.device, (*samples.keep_ids.shape, samples.size)
    takes = f"float32, bfloat16 or float16 [{'M' if len(shape) == 2 else 'B, K'}, P*P*C]"
    checks.tensor("prediction", prediction, takes, checks.FLOATS, shape, device, contiguous=False)
    if prediction.numel() and prediction.stride(-1) != 1:
        raise ValueError(f"prediction: got strides {list(prediction.stride())}, takes a dense last dimension")
    if samples.alpha_sigma is None:
        raise TypeError("alpha_sigma: got None, takes float32 [T, 2]")
    if weight is not None:
        checks.tensor("weight", weight, "float32 [T]", torch.float32, samples.alpha_sigma.shape[:1], device)
    if target not in TARGETS:
        raise ValueError(f"target: got {target!r}, takes eps, x0 or v")
    return choose("denoising_loss", samples, backend).run(prediction, samples, target, weight, needs_grad)


def _fake(prediction, *arguments):
    *flat, target, weight, needs_grad, backend = arguments
    samples = Samples(*flat)
    mean, per_sample = (prediction.new_empty(shape, dtype=torch.float32) for shape in ((), samples.n.shape))
    return mean, per_sample, prediction.new_empty(prediction.shape if needs_grad else 0)


def _run_backward(error, cu_patches, grad_mean, grad_per_sample, backend):
    checks.tensor("error", error, "a float [B, K, P*P*C] or [M, P*P*C]", checks.FLOATS, [None] * error.dim())
    batch = error.shape[0] if cu_patches is None else cu_patches.shape[0] - 1
    if cu_patches is not None:
        checks.tensor("cu_patches", cu_patches, "int32 [B + 1]", torch.int32, (batch + 1,), error.device)
        if error.is_cpu:
            check_cu_patches(cu_patches, error.shape[0])
    checks.tensor("grad_mean", grad_mean, "float32 []", torch.float32, (), error.device)
    takes = "float32 [B]"
    checks.tensor("grad_per_sample", grad_per_sample, takes, torch.float32, (batch,), error.device, contiguous=False)
    implementation = dispatch.choose("denoising_loss", error.device, backend)
    return implementation.run_backward(error, cu_patches, grad_mean, grad_per_sample)


def _fake_backward(error, cu_patches, grad_mean, grad_per_sample, backend):
    return torch.empty_like(error)


_denoising_loss = registered(
    "denoising_loss",
    f"(Tensor prediction, {SCHEMA}, str target, Tensor? weight, bool needs_grad, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    _run,
    _fake,
)
_backward = registered(
    "denoising_loss_backward",
    "(Tensor error, Tensor? cu_patches, Tensor grad_mean, Tensor grad_per_sample, str backend) -> Tensor",
    _run_backward,
    _fake_backward,
)
dispatch.register("denoising_loss", cuda=cuda, cpp=cpp, reference=reference, triton=triton_host)
