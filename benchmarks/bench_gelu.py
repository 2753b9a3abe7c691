"""gelu, forward and backward, and a bias' gradient: GB/s, beside its twin, PyTorch, torch.compile. See conftest.py.

The hidden layer of preset celeba64, batch 8, dense and 90 % masked. The bytes are those that must move: the input in,
the value out; input and incoming gradient in, gradient out. The bias' gradient, sums by column, needs none of its own;
to PyTorch it is an operator that reads the gradient again.
"""

import peers
import pytest
import torch
import torch.nn.functional as F

from maskdiff.precision import keep_freed_memory

TOKENS, HIDDEN = (2056, 216), 2048
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CASES = {f"{tokens}-{dtype}": ("cpp", "reference", "torch", "torch_compiled") for tokens in TOKENS for dtype in DTYPES}


def build(case: str, device="cpu"):
    keep_freed_memory()
    tokens, name, how = case.split("-")
    shape, dtype = (int(tokens), HIDDEN), DTYPES[name]
    generator = torch.Generator().manual_seed(0)
    x, grad_out = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
    work = 5 * x.numel() * dtype.itemsize

    def ours():
        grad, sums = torch.ops.maskdiff.gelu_backward(grad_out, x, True, how)
        return torch.ops.maskdiff.gelu(x, how), grad, sums

    def plain(x, grad_out):
        grad = torch.ops.aten.gelu_backward(grad_out, x)
        return F.gelu(x), grad, grad.sum(0)

    if not how.startswith("torch"):
        return ours, work, "bytes"
    call = peers.compiled(plain) if how == "torch_compiled" else plain
    return lambda: call(x, grad_out), work, "bytes"


@pytest.mark.parametrize("case", CASES)
def test_gelu(in_turns, case):
    in_turns(build, case, CASES[case])
