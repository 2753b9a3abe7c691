"""adamw_ema: GB/s beside its twin and PyTorch's fused AdamW. See conftest.py.

The bytes are those an update must move: of a parameter, the gradient twice (once for the norm), masters, moments and
the average in and out, the low-precision copy out. Parameters stand in 160 tensors, 44 million of them as in celeba64;
with "bf16" the gradients and the copy are bfloat16. "torch" is one of the op's implementations, "fused" what a trainer
without the op does: gradient norm and clipping, torch.optim.AdamW(fused=True), an average by foreach, a cast.
"""

import pytest
import torch

import maskdiff_kernels as mk

TENSORS = 160
SIZES = {"small": 2560, "celeba64": 275_008}  # elements of a tensor
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CASES = {f"{size}-{name}": ("cpp", "torch", "reference", "fused") for size in SIZES for name in DTYPES}


def build(case: str, device="cpu"):
    shape, name, how = case.split("-")
    size, dtype, low = SIZES[shape], DTYPES[name], name == "bf16"
    total, generator = size * TENSORS, torch.Generator().manual_seed(0)
    flats = [torch.rand(total, generator=generator).to(device) for _ in range(4)]
    copy = flats[0].bfloat16() if low else None
    grads = [torch.randn(size, generator=generator).to(device, dtype) for _ in range(TENSORS)]
    counts = torch.zeros((), device=device), torch.zeros((), device=device)
    offsets = [i * size for i in range(TENSORS)]
    state = mk.AdamState(*flats, *counts, offsets, [size] * TENSORS, [True] * TENSORS, low=copy)
    hyper = torch.tensor([1e-4, 1e6], device=device)  # a bound that is not reached: every call does the same

    def ours():
        return mk.adamw_ema(state, grads, hyper, (0.9, 0.99), 1e-8, 0.01, 0.999, backend=how)

    run = fused(state, grads) if how == "fused" else ours
    return run, total * (2 * dtype.itemsize + 8 * 4 + 2 * low), "bytes"


def fused(state: mk.AdamState, grads: list[torch.Tensor]):
    size = grads[0].numel()
    params = [torch.nn.Parameter(master) for master in state.master.split(size)]
    capturable = grads[0].is_cuda
    options = {"betas": (0.9, 0.99), "weight_decay": 0.01, "fused": True, "capturable": capturable}
    optimizer = torch.optim.AdamW(params, lr=1e-4, **options)
    averages = state.ema.split(size)
    lows = None if state.low is None else state.low.split(size)

    def step():
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.float()
        torch.nn.utils.clip_grad_norm_(params, 1e6)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(averages, params, 0.001)
            if lows is not None:
                torch._foreach_copy_(lows, params)

    return step


@pytest.mark.parametrize("case", CASES)
def test_adamw_ema(in_turns, case):
    in_turns(build, case, CASES[case])
