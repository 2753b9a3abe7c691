"""Residual and LayerNorm, forward and backward: GB/s of PyTorch, torch.compile, and apex's kernel. See conftest.py.

No op of maskdiff: it shows what an own one could win. The bytes are those that must move: two summands in, sum and norm
out; their gradients and the sum in, the summands' common gradient out. The norm's weights are too few to count.
"""

import peers
import pytest
import torch

from maskdiff.layers import layer_norm

TOKENS, WIDTHS = 64 * 65, (512, 768)  # celeba64's width, the base model's
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CASES = {f"{width}-{dtype}": ("torch", "torch_compiled") for width in WIDTHS for dtype in DTYPES}
CUDA_PEERS = ("apex_fused",)


def build(case: str, device="cpu"):
    width, name, how = case.split("-")
    shape, dtype = (TOKENS, int(width)), DTYPES[name]
    generator = torch.Generator().manual_seed(0)
    x, residual, grad_sum, grad_norm = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(4))
    x, residual = x.requires_grad_(), residual.requires_grad_()
    norm = torch.nn.LayerNorm(int(width), device=device)  # in float32, as the model's are

    def plain(x, residual):
        total = x + residual
        return total, layer_norm(total, norm)

    forward = peers.compiled(plain) if how == "torch_compiled" else plain
    if how == "apex_fused":
        fused = peers.apex("normalization.fused_layer_norm", "mixed_dtype_fused_layer_norm_affine")

        def forward(x, residual):
            total = x + residual
            return total, fused(total, norm.weight, norm.bias, norm.normalized_shape, norm.eps).to(dtype)

    inputs = (x, residual, norm.weight, norm.bias)
    work = 8 * TOKENS * int(width) * dtype.itemsize
    return lambda: torch.autograd.grad(forward(x, residual), inputs, (grad_sum, grad_norm)), work, "bytes"


@pytest.mark.parametrize("case", CASES)
def test_layer_norm(in_turns, case):
    in_turns(build, case, CASES[case])
