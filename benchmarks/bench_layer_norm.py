"""Residual and LayerNorm, forward and backward: GB/s of the op, PyTorch, torch.compile, apex's kernel. See conftest.py.

As a block has them: the rows of x normalised, and x + the bias of the branch's last product. Preset celeba64, batch 8,
dense and 90 % masked; the base model. The bytes are those that must move: x in, both outputs out; their gradients and x
in, its gradient out. What is as long as a row does not count. Of its gradients only sums are given back: they sum over
so many rows that their last places differ.
"""

import peers
import pytest
import torch

import maskdiff_kernels as mk
from maskdiff_kernels.ops.layer_norm import reference

SHAPES = ((2056, 512), (216, 512), (4160, 768))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CASES = {
    f"{rows}x{width}-{dtype}": ("cpp", "reference", "torch_compiled") for rows, width in SHAPES for dtype in DTYPES
}
CUDA_PEERS = ("apex_fused",)


def build(case: str, device="cpu"):
    shape, name, how = case.split("-")
    rows, width = map(int, shape.split("x"))
    dtype = DTYPES[name]
    generator = torch.Generator().manual_seed(0)
    x, grad_sum, grad_out = (torch.randn(rows, width, generator=generator).to(device, dtype) for _ in range(3))
    weight, bias, shift = torch.ones(width), torch.zeros(width), torch.zeros(width, dtype=dtype)  # as the model's are
    inputs = [tensor.to(device).requires_grad_() for tensor in (x, weight, bias, shift)]

    def plain(x, weight, bias, shift):
        return reference.run(x, weight, bias, shift, 1e-5)

    def ours(x, weight, bias, shift):
        return mk.layer_norm(x, weight, bias, shift=shift, backend=how)

    forward = peers.compiled(plain) if how == "torch_compiled" else ours
    if how == "apex_fused":
        fused = peers.apex("normalization.fused_layer_norm", "mixed_dtype_fused_layer_norm_affine")

        def forward(x, weight, bias, shift):
            return fused(x, weight, bias, (width,), 1e-5).to(dtype), x + shift

    def call():
        outputs = forward(*inputs)
        grad_x, *grads = torch.autograd.grad(outputs, inputs, (grad_out, grad_sum))
        return *outputs, grad_x, *(grad.sum() for grad in grads)

    return call, 7 * x.numel() * dtype.itemsize, "bytes"


@pytest.mark.parametrize("case", CASES)
def test_layer_norm(in_turns, case):
    in_turns(build, case, CASES[case])
