"""adamw_ema: GB/s beside its twin and PyTorch's fused AdamW. See conftest.py.

The bytes are those an update must move: of a parameter, the gradient twice (once for the norm), masters, moments and
the average in and out, the low-precision copy out. celeba64's 44 million parameters in 160 tensors; with "bf16" the
gradients and the copy are bfloat16. "torch" is one more implementation, "fused" what a trainer without the op does:
gradient norm and clipping, torch.optim.AdamW(fused=True), an average by foreach, a cast.
"""

import pytest
import torch

import maskdiff_kernels as mk

PARAMETERS, TENSORS = 44_000_000, 160
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CASES = {name: ("cpp", "torch", "reference", "fused") for name in DTYPES}


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
    if how == "fused":
        return fused(list(flats[0].split(size)), list(flats[3].split(size)), grads, copy), work, "bytes"
    offsets = [i * size for i in range(TENSORS)]
    state = mk.AdamState(*flats, *counts, offsets, sizes, [True] * TENSORS, low=copy)
    hyper = torch.tensor([1e-4, 100.0], device=device)  # no bound that is reached: every call does the same
    updated = [value for value in vars(state).values() if isinstance(value, torch.Tensor)]

    def ours():
        return *mk.adamw_ema(state, grads, hyper, (0.9, 0.99), 1e-8, 0.01, 0.999, backend=how), *updated

    ours.fresh = fresh
    return ours, work, "bytes"


def fused(masters, averages, grads, copy):
    params = [torch.nn.Parameter(master) for master in masters]
    options = {"betas": (0.9, 0.99), "weight_decay": 0.01, "fused": True, "capturable": grads[0].is_cuda}
    optimizer = torch.optim.AdamW(params, lr=1e-4, **options)
    lows = None if copy is None else list(copy.split(masters[0].numel()))

    def step():
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.float()
        torch.nn.utils.clip_grad_norm_(params, 100.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(averages, params, 0.001)
            if lows is not None:
                torch._foreach_copy_(lows, params)

    return step


@pytest.mark.parametrize("case", CASES)
def test_adamw_ema(in_turns, case):
    in_turns(build, case, CASES[case])
