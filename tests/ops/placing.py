"""Where the op tests' tensors stand: on the device that the implementation under test takes; CUDA kernels on a CPU."""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import emulate
import pytest
import torch
from torch import Tensor

from maskdiff_kernels import dispatch, library


def here(tensor: Tensor) -> Tensor:
    """On the default device, which the fixture `implementation` sets; numbers drawn on the CPU are the same on all."""
    return tensor.to(torch.empty(0).device)


@contextmanager
def cuda_on_cpu(ops: Sequence[str] = emulate.OPS) -> Iterator[None]:
    """Lets the implementations "cuda" run on CPU tensors, by the emulated library."""
    emulated = emulate.load_ops()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "cuda", lambda: emulated)
        for op in ops:
            cuda = dataclasses.replace(dispatch._OPS[op]["cuda"], devices=("cpu",), load=lambda: "emulated")
            patch.setitem(dispatch._OPS[op], "cuda", cuda)
        dispatch._choice.cache_clear()
        yield
    dispatch._choice.cache_clear()
