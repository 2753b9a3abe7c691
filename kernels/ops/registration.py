"""Registers an op with PyTorch: one implementation for all devices, a fake kernel for compilers, no autograd."""

from collections.abc import Callable
from typing import Any

import torch


def unseen(x: torch.Tensor) -> bool:
    """Whether nothing traces or counts ops on x: then an op's implementation may be called past torch.ops, which takes
    some 10 us, as much as a small op itself."""
    return type(x) is torch.Tensor and not torch._C._len_torch_dispatch_stack()


def registered(name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> torch._ops.OpOverload:
    """Makes torch.ops.maskdiff.<name> of `run` (called without gradients) and returns its bound overload.

    `run` holds every check: autocast and torch.compile reach it without passing through the public function. The op
    falls through the Autograd key, so that a call which should have gone through the autograd.Function gives outputs
    that require no gradient, and differentiating them is an error.
    """
    qualified = f"maskdiff::{name}"

    def without_gradients(*arguments: Any) -> Any:
        if not torch.is_grad_enabled():  # as from an autograd.Function: saves 5 us
            return run(*arguments)
        with torch.no_grad():
            return run(*arguments)

    torch.library.define(qualified, schema)
    torch.library.impl(qualified, "CompositeExplicitAutograd")(without_gradients)
    torch.library.impl(qualified, "Autograd", torch.library.fallthrough_kernel)
    torch.library.register_fake(qualified)(fake)
    return getattr(torch.ops.maskdiff, name).default
