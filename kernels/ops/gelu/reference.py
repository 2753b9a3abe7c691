"""gelu in plain PyTorch: what the op means. Computes in float32, or in float64 where that is the input's type."""

import torch
import torch.nn.functional as F
from torch import Tensor


def run(x: Tensor) -> Tensor:
    """x Phi(x), rounded once."""
    return F.gelu(x)


def run_backward(
    grad_out: Tensor,  # like x
    x: Tensor,  # [.., N]
    sums: bool,
) -> tuple[Tensor, Tensor]:  # like x; [N], else [0]
    """The gradient of x, rounded once, and its sums over all but the last dimension, before it is rounded."""
    exact = torch.promote_types(x.dtype, torch.float32)
    grad = torch.ops.aten.gelu_backward(grad_out.to(exact), x.to(exact))
    return grad.to(x.dtype), grad[None].sum_to_size(x.shape[-1:]) if sums else grad.new_empty(0)
