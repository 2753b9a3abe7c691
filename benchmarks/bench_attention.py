"""attention, forward and backward on packed qkv: MFLOP/s, beside PyTorch's SDPA and explicit products. See conftest.py.

64 (sequence, head) pairs of width 64; 14 L^2 d FLOPs a pair, the products of a forward and a five-product backward.
"""

import pytest
import torch

import maskdiff_kernels as mk

PAIRS, HEADS, WIDTH = 64, 8, 64
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LENGTHS = (27, 33, 65, 129, 257)
CASES = [f"{length}-{dtype}-{how}" for length in LENGTHS for dtype in DTYPES for how in ("cpp", "sdpa", "explicit")]


def build(case: str):
    length, name, how = case.split("-")
    generator = torch.Generator().manual_seed(0)
    shape = (PAIRS // HEADS, int(length), 3, HEADS, WIDTH)
    qkv = torch.randn(shape, generator=generator).to(DTYPES[name]).requires_grad_()
    grad = torch.randn(shape[0], shape[1], HEADS * WIDTH, generator=generator).to(DTYPES[name])

    def run():
        return torch.autograd.grad(mk.attention(qkv, backend=how), qkv, grad)

    return run, PAIRS * 14 * int(length) ** 2 * WIDTH / 1e6, "MFLOP"


@pytest.mark.benchmark(max_time=0.5, min_rounds=5)
@pytest.mark.parametrize("case", CASES)
def test_attention(measure, case):
    measure(build, case)
