"""What stands in for NVIDIA apex's compiled module amp_C on a CPU: its signatures, what they refuse, their arithmetic.

Read from apex at 6424da3b: csrc/amp_C_frontend.cpp, multi_tensor_adam.cu, multi_tensor_l2norm_kernel.cu. Scalars arrive
as C floats, and all arithmetic is float32; a set flag stops an update, and a gradient is left multiplied.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor

from maskdiff_kernels import dispatch
from maskdiff_kernels.ops.adamw_ema import apex

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class AmpC:
    """The functions of amp_C that the adapter calls; all their arguments are positional."""

    @staticmethod
    def multi_tensor_l2norm(
        chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], per_tensor: bool | None, /
    ) -> tuple[Tensor, Tensor]:
        check_lists(tensor_lists, 1, noop_flag)
        assert per_tensor in (None, True, False)
        total = torch.stack([x.float().square().sum() for x in tensor_lists[0]]).sum().sqrt()
        if not total.isfinite():
            noop_flag.fill_(1)
        return total.view(1), total.new_zeros(0)

    @staticmethod
    def multi_tensor_adam_capturable(
        chunk_size: int,
        noop_flag: Tensor,
        tensor_lists: list[list[Tensor]],  # gradients, weights; first and second moments in float32
        lr: Tensor,
        beta1: float,
        beta2: float,
        epsilon: float,
        step: Tensor,
        mode: int,
        bias_correction: int,
        weight_decay: float,
        inv_scale: Tensor,
        /,
    ) -> None:
        check_lists(tensor_lists, 4, noop_flag)
        for grad, weight, exp_avg, exp_avg_sq in zip(*tensor_lists, strict=True):
            assert grad.dtype == weight.dtype
            numbers = (lr, beta1, beta2, epsilon, step, mode, bias_correction, weight_decay, inv_scale)
            adam(noop_flag, grad, weight, exp_avg, exp_avg_sq, *numbers)

    @staticmethod
    def multi_tensor_adam_capturable_master(
        chunk_size: int,
        noop_flag: Tensor,
        tensor_lists: list[list[Tensor]],  # as above, and float32 masters of the weights
        lr: Tensor,
        beta1: float,
        beta2: float,
        epsilon: float,
        step: Tensor,
        mode: int,
        bias_correction: int,
        weight_decay: float,
        inv_scale: Tensor,
        /,
    ) -> None:
        check_lists(tensor_lists, 5, noop_flag)
        for grad, weight, exp_avg, exp_avg_sq, master in zip(*tensor_lists, strict=True):
            assert grad.dtype == weight.dtype and master.dtype == torch.float32
            numbers = (lr, beta1, beta2, epsilon, step, mode, bias_correction, weight_decay, inv_scale)
            adam(noop_flag, grad, master, exp_avg, exp_avg_sq, *numbers)
            if noop_flag != 1:
                weight.copy_(master)


def check_lists(tensor_lists: list[list[Tensor]], depth: int, noop_flag: Tensor) -> None:
    """What multi_tensor_apply and its caller refuse, or read wrongly."""
    assert len(tensor_lists) == depth and len(tensor_lists[0]) > 0
    assert noop_flag.dtype == torch.int32 and noop_flag.shape == (1,)
    for number, tensors in enumerate(tensor_lists):
        assert len(tensors) == len(tensor_lists[0])
        for x, grad in zip(tensors, tensor_lists[0], strict=True):
            assert x.is_contiguous() and x.device == noop_flag.device and x.numel() == grad.numel()
            expected = tensor_lists[0][0].dtype if number < 2 else torch.float32  # one dtype for each list
            assert x.dtype == expected and x.dtype in FLOATS


def adam(
    noop_flag: Tensor,
    grad: Tensor,
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    lr: Tensor,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: Tensor,
    mode: int,
    bias_correction: int,
    weight_decay: float,
    inv_scale: Tensor,
) -> None:
    for number, dtype in ((lr, torch.float32), (step, torch.int32), (inv_scale, torch.float32)):
        assert number.dtype == dtype and number.shape == (1,) and number.device == grad.device
    assert (mode, bias_correction) == (1, 1), "this stands in for corrected AdamW alone"
    if noop_flag == 1:
        return
    b1, b2, eps, decay = (np.float32(x) for x in (beta1, beta2, epsilon, weight_decay))
    corrections = [float(np.float32(1 - float(b) ** int(step))) for b in (b1, b2)]
    g = grad.float() * inv_scale
    grad.copy_(g)
    m = float(b1) * exp_avg + float(1 - b1) * g
    v = float(b2) * exp_avg_sq + float(1 - b2) * g * g
    update = (m / corrections[0]) / ((v / corrections[1]).sqrt() + float(eps)) + float(decay) * weight.float()
    weight.copy_(weight.float() - lr * update)
    exp_avg.copy_(m)
    exp_avg_sq.copy_(v)


@contextmanager
def apex_on_cpu() -> Iterator[None]:
    """Lets the implementation "apex" run on CPU tensors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(apex, "kernels", lambda: AmpC)
        stand_in = dataclasses.replace(dispatch._OPS["adamw_ema"]["apex"], devices=(), load=lambda: "a stand-in")
        patch.setitem(dispatch._OPS["adamw_ema"], "apex", stand_in)
        dispatch._choice.cache_clear()
        yield
    dispatch._choice.cache_clear()
