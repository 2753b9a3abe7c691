"""What the benches of several ops share about their peers: torch.compile, and packages that may be absent."""

import importlib
from collections.abc import Callable
from typing import Any

import torch


def compiled(call: Callable) -> Callable:
    """By torch.compile, for one shape alone."""
    torch._dynamo.reset()  # beyond eight shapes it would go on uncompiled, in silence
    return torch.compile(call, dynamic=False)


def apex(module: str, name: str) -> Any:
    """Something of NVIDIA's apex. Raises ImportError where it is not there, or PyPI's package of that name is."""
    try:
        return getattr(importlib.import_module(f"apex.{module}"), name)
    except Exception as error:  # noqa: BLE001  the other package fails in ways of its own
        raise ImportError(
            f"no NVIDIA apex with {module}.{name} is installed ({type(error).__name__}: {error})"
        ) from None
