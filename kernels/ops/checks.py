"""Checks of arguments, shared by the ops. Every message names the argument, what it got and what it takes."""

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def tensor(
    name: str,
    value: Tensor,
    takes: str,  # in words, e.g. "int32 [B, K]"
    dtypes: torch.dtype | Sequence[torch.dtype],
    shape: Sequence[int | None],  # None: any size
    device: torch.device | None = None,
    contiguous: bool = True,
) -> None:
    """Raises TypeError for a dtype, ValueError for a shape, a device or strides that an op does not take."""
    if value.dtype is dtypes and value.shape == shape and device == value.device and value.is_contiguous():
        return  # the common case, in 1 us
    if value.dtype not in (dtypes if isinstance(dtypes, Sequence) else (dtypes,)):
        raise TypeError(f"{name}: got {value.dtype}, takes {takes}")
    if value.dim() != len(shape) or any(want not in (None, got) for want, got in zip(shape, value.shape, strict=True)):
        sizes = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name}: got shape {list(value.shape)}, takes {takes} (here [{sizes}])")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: got a tensor on {value.device}, takes one on {device}, where the others are")
    if contiguous and not value.is_contiguous():
        raise ValueError(f"{name}: got strides {list(value.stride())}, takes a contiguous tensor (call .contiguous())")


def within(name: str, values: Tensor, low: int, high: int) -> None:
    """Raises ValueError where integers lie outside [low, high). Reads the values: for CPU tensors only."""
    if values.numel() == 0:
        return
    least, most = (int(value) for value in torch.aminmax(values))
    if least < low or most >= high:
        raise ValueError(f"{name}: got values from {least} to {most}, takes {low} to {high - 1}")


def number(name: str, value: float, low: float, high: float) -> None:
    """Raises ValueError where a plain number lies outside [low, high]."""
    if not low <= value <= high:
        raise ValueError(f"{name}: got {value}, takes {low} to {high}")
