"""adamw_ema by the compiled CPU library."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from maskdiff_kernels.ops.adamw_ema.state import Update
from maskdiff_kernels.ops.structs import DTYPES, AdamwNumbersStruct, AdamwStruct, call, pointer


def run(u: Update) -> tuple[Tensor, Tensor]:
    """Norm before clipping [] and skipped [], float32; the state is updated in place."""
    norm, skipped = torch.empty(()), torch.empty(())
    outputs = (ctypes.c_void_p(norm.data_ptr()), ctypes.c_void_p(skipped.data_ptr()))
    call("maskdiff_cpu_adamw_ema", *(ctypes.byref(struct) for struct in structs(u)), *outputs)
    return norm, skipped


def structs(u: Update) -> tuple[AdamwStruct, AdamwNumbersStruct]:
    """The update as the C functions take it. It borrows the tensors: keep them alive."""
    tables = (
        (ctypes.c_void_p * len(u.grads))(*(grad.data_ptr() for grad in u.grads)),
        _table([DTYPES[grad.dtype] for grad in u.grads]),
        _table(u.offsets),
        _table(u.sizes),
        _table(u.decays),
    )
    update = AdamwStruct(
        *(pointer(tensor) for tensor in u[:8]),
        u.hyper.data_ptr(),
        *(ctypes.cast(table, ctypes.c_void_p) for table in tables),
        len(u.grads),
        0 if u.low is None else u.low.shape[0],
        0 if u.low is None else DTYPES[u.low.dtype],
    )
    return update, AdamwNumbersStruct(u.beta1, u.beta2, u.eps, u.weight_decay, u.ema_decay, u.ema2_decay)


def _table(numbers: Sequence[int]) -> ctypes.Array:
    return (ctypes.c_int64 * len(numbers))(*numbers)
