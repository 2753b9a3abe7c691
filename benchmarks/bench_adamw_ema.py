"""adamw_ema: GB/s beside its twin, PyTorch's fused AdamW, torch.compile and apex's optimizers. See conftest.py.

The bytes are those an update must move: of a parameter, the gradient twice (once for the norm), masters, moments and
the average in and out, the low-precision copy out. celeba64's 44 million parameters in 160 tensors; with "bf16" the
gradients and the copy are bfloat16. "torch" and "apex" are implementations; the peers are what a trainer without the op
does: norm and clipping, torch.optim.AdamW(fused=True) or apex's FusedAdam, an average by foreach, a cast (fused,
apex_fused_adam); the plain formula on flat tensors by torch.compile, of gradients that torch.cat lays out
(torch_compiled: hundreds of tensors take it minutes to compile); apex's FusedAdamSWA, which averages and casts too, but
takes its step and its learning rate from the host.
"""

from collections.abc import Callable

import peers
import pytest
import torch
from torch import Tensor

import maskdiff_kernels as mk

PARAMETERS, TENSORS = 44_000_000, 160
LR, BETAS, EPS, DECAY, EMA, CLIP = 1e-4, (0.9, 0.99), 1e-8, 0.01, 0.999, 100.0  # no bound that is reached
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CASES = {name: ("cpp", "torch", "reference", "fused", "torch_compiled") for name in DTYPES}
CUDA_PEERS = ("apex_fused_adam", "apex_fused_adam_swa")


def build(case: str, device="cpu"):
    name, how = case.split("-")
    dtype, low = DTYPES[name], name == "bf16"
    size = PARAMETERS // TENSORS // 16 * 16
    total, sizes = size * TENSORS, [size] * TENSORS
    work = total * (2 * dtype.itemsize + 8 * 4 + 2 * low)
    flats = [torch.empty(total, device=device) for _ in range(4)]
    copy = torch.empty(total, dtype=torch.bfloat16, device=device) if low else None
    grads = [torch.empty(size, dtype=dtype, device=device) for _ in range(TENSORS)]
    counts = torch.empty((), device=device), torch.empty((), device=device)

    def fresh():
        """The values that every implementation starts from; those of the copy must be written, not kept."""
        generator = torch.Generator().manual_seed(0)
        for flat in flats:
            flat.copy_(torch.rand(total, generator=generator))
        for grad in grads:
            grad.copy_(1e-3 * torch.randn(size, generator=generator))
        for count in counts:
            count.zero_()
        if copy is not None:
            copy.fill_(torch.nan)

    fresh()
    if how in PEERS:
        return PEERS[how](flats, grads, copy), work, "bytes"
    offsets = [i * size for i in range(TENSORS)]
    state = mk.AdamState(*flats, *counts, offsets, sizes, [True] * TENSORS, low=copy)
    hyper = torch.tensor([LR, CLIP], device=device)
    updated = [value for value in vars(state).values() if isinstance(value, torch.Tensor)]

    def ours():
        return *mk.adamw_ema(state, grads, hyper, BETAS, EPS, DECAY, EMA, backend=how), *updated

    ours.fresh = fresh
    return ours, work, "bytes"


Build = Callable[[list[Tensor], list[Tensor], Tensor | None], Callable[[], object]]  # flats, gradients, copy -> a step


def parts(flat: Tensor, grads: list[Tensor]) -> list[Tensor]:
    return list(flat.split([grad.numel() for grad in grads]))


def by_optimizer(make: Callable[..., torch.optim.Optimizer]) -> Build:
    """Norm, clipping, such an optimizer, an average by foreach, a cast."""

    def build(flats: list[Tensor], grads: list[Tensor], copy: Tensor | None) -> Callable[[], object]:
        params = [torch.nn.Parameter(master) for master in parts(flats[0], grads)]
        averages = parts(flats[3], grads)
        optimizer = make(params, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, capturable=grads[0].is_cuda)
        lows = None if copy is None else parts(copy, grads)

        def step():
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad.float()
            torch.nn.utils.clip_grad_norm_(params, CLIP)
            optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(averages, params, 1 - EMA)
                if lows is not None:
                    torch._foreach_copy_(lows, params)

        return step

    return build


def torch_fused(params: list[Tensor], **options) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, fused=True, **options)


def apex_fused_adam(params: list[Tensor], **options) -> torch.optim.Optimizer:
    return peers.apex("optimizers", "FusedAdam")(params, **options)


def torch_compiled(flats: list[Tensor], grads: list[Tensor], copy: Tensor | None) -> Callable[[], object]:
    count = flats[0].new_zeros(())

    def update(grad, master, exp_avg, exp_avg_sq, ema, count, copy):
        grad = grad.float()
        norm = grad.square().sum().sqrt()
        grad = grad * torch.clamp(CLIP / norm, max=1)
        count.add_(1)
        exp_avg.lerp_(grad, 1 - BETAS[0])
        exp_avg_sq.mul_(BETAS[1]).addcmul_(grad, grad, value=1 - BETAS[1])
        root = (exp_avg_sq / (1 - BETAS[1] ** count)).sqrt() + EPS
        master.mul_(1 - LR * DECAY).sub_(LR / (1 - BETAS[0] ** count) * exp_avg / root)
        ema.lerp_(master, 1 - EMA)
        if copy is not None:
            copy.copy_(master)

    run = peers.compiled(update)
    return lambda: run(torch.cat(grads), *flats, count, copy)


def apex_fused_adam_swa(flats: list[Tensor], grads: list[Tensor], copy: Tensor | None) -> Callable[[], object]:
    make = peers.apex("contrib.openfold_triton.fused_adam_swa", "FusedAdamSWA")
    modes = peers.apex("contrib.openfold_triton.fused_adam_swa", "AdamMathType")
    weights = flats[0].clone() if copy is None else copy
    masters, computed, averages = (
        [torch.nn.Parameter(part) for part in parts(flat, grads)] for flat in (flats[0], weights, flats[3])
    )
    options = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY, "adam_math_mode": modes.ApexAdamW}
    optimizer = make(masters, computed, averages, EMA, **options)

    def step():
        for param, grad in zip(computed, grads, strict=True):
            param.grad = grad
        norm = torch.nn.utils.get_total_norm([grad.float() for grad in grads])
        optimizer.step(grad_clip_scale=torch.clamp(CLIP / norm, max=1))

    return step


PEERS: dict[str, Build] = {
    "fused": by_optimizer(torch_fused),
    "torch_compiled": torch_compiled,
    "apex_fused_adam": by_optimizer(apex_fused_adam),
    "apex_fused_adam_swa": apex_fused_adam_swa,
}


@pytest.mark.parametrize("case", CASES)
def test_adamw_ema(in_turns, case):
    in_turns(build, case, CASES[case])
