"""Whether an op's implementations compute what its reference does: asked of each before it is timed."""

from collections.abc import Callable
from typing import Any

import records
import torch

Judge = Callable[[str, Any], str]
"""Says what is wrong with a contestant's result; "" if nothing is."""


def by_reference(
    op: str,
    build: Callable[[str], Callable[[], Any]],  # a contestant's call
) -> Judge:
    """Holds the op's implementations to its reference, whole numbers to the bit; says nothing of peers.

    A call that changes what it is given, as an update does, must come fresh; its own `fresh()` puts everything back.
    """
    ours = records.ours(op)
    expected = flat(build("reference")()) if ours else []
    return lambda name, result: unlike(flat(result), expected) if name in ours else ""


def flat(result: Any) -> list[torch.Tensor]:
    """The tensors of a result, in order."""
    if isinstance(result, torch.Tensor):
        return [result.detach()]
    parts = vars(result).values() if hasattr(result, "__dict__") else result or ()
    return [tensor for part in parts for tensor in flat(part)]


def unlike(got: list[torch.Tensor], expected: list[torch.Tensor]) -> str:
    """How results differ by more than four units in the last place of their dtypes; "" if they do not.

    A number by itself is a sum or a norm of everything, n numbers: it may differ by sqrt(n) of them, which is what sums
    gather in whatever order (Higham and Mary, SIAM J. Sci. Comput. 41, 2019).
    """
    of_sums = max(4, max((b.numel() for b in expected), default=0) ** 0.5)
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"result {i}: {a.dtype} {list(a.shape)}, the reference has {b.dtype} {list(b.shape)}"
        if not a.is_floating_point():
            if not torch.equal(a, b):
                return f"result {i}: other numbers than the reference's"
            continue
        error, norm = (a.double() - b.double()).norm(), b.double().norm()
        if not error <= (4 if b.dim() else of_sums) * torch.finfo(b.dtype).eps * norm:
            return f"result {i}: error {error:.2e}, norm {norm:.2e}"
    return ""
