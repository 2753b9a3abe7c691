"""layer_norm in plain PyTorch, differentiable: what the op means, and what runs wherever the C++ does not."""

import torch.nn.functional as F
from torch import Tensor


def run(
    x: Tensor,  # [..., D]
    weight: Tensor,  # [D]
    bias: Tensor,  # [D]
    shift: Tensor | None,  # [D]
    eps: float,
) -> tuple[Tensor, Tensor | None]:  # [..., D] each
    """The normalised rows, and x + shift.

    In the weights' dtype: given x in bf16, PyTorch's CPU kernel sums their gradients in bf16, percents off.
    """
    out = F.layer_norm(x.to(weight.dtype), weight.shape, weight, bias, eps).to(x.dtype)
    return out, None if shift is None else x + shift
