"""Modes that watch what PyTorch is asked to do: for reads by the host, for copies to a device, to do it all again."""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

READS = {
    f"aten::{name}"
    for name in (
        "_local_scalar_dense", "is_nonzero", "equal", "allclose", "nonzero", "nonzero_numpy", "argwhere",
        "masked_select", "bincount", "histc", "unique_consecutive", "unique_dim", "_unique", "_unique2", "multinomial",
    )
}  # fmt: skip
METHODS = {
    getattr(Tensor, name)
    for name in (
        "item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__", "__contains__",
    )
}  # fmt: skip


class NoWaiting(TorchDispatchMode):
    """Fails where the host would have to wait for a device: a value read, a shape that depends on values.

    On a CPU some reads reach no op (`tolist`, `cpu`): NoReading sees those.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func._schema.name
        assert name not in READS, f"{name} makes the host wait"
        if name == "aten::repeat_interleave":
            assert kwargs.get("output_size") is not None, f"{name} makes the host wait for the length of its result"
        if name == "aten::segment_reduce":
            assert kwargs.get("unsafe"), f"{name} makes the host wait for its lengths"
        if name.startswith(("aten::index", "aten::_index_put")) and isinstance(args[1], list | tuple):
            for index in args[1]:
                assert index is None or index.dtype not in (torch.bool, torch.uint8), "an index by booleans waits"
        result = func(*args, **kwargs)
        devices = {x.device for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor) and x.dim()}
        for made in tree_flatten(result)[0]:
            if isinstance(made, Tensor):
                assert not devices - {made.device}, f"{name} copies from {devices} to {made.device}, and waits"
        return result


class NoReading(TorchFunctionMode):
    """Fails where Python code reads a tensor's values."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert func not in METHODS, f"{func.__name__} makes the host wait"
        return func(*args, **(kwargs or {}))


class LiveBytes(TorchDispatchMode):
    """Counts the memory of the tensors that ops make, for as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for made in tree_flatten(result)[0]:
            if isinstance(made, Tensor) and (key := made.untyped_storage()._cdata) not in self._seen:
                storage = made.untyped_storage()
                self._seen.add(key)
                self.bytes += storage.nbytes()
                self.peak = max(self.peak, self.bytes)
                weakref.finalize(storage, self._freed, key, storage.nbytes())
        return result

    def _freed(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.bytes -= size


class Recorder(TorchDispatchMode):
    """Keeps every op and the tensors that it was given, and does it all again on request, as a CUDA graph does.

    Memory that a recorded op has made is made anew, and with it whatever lies in it (autograd passes on tensors that no
    op has seen, but their memory is known). All else is used as it is then.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))  # which keeps them alive: no memory is given out twice
        return result

    def replay(self, result: Any) -> Any:
        """Does all that was recorded, and returns what became of `result`, tensors of the recording."""
        made: dict[int, Any] = {}  # where memory of the recording lies now

        def now(x: Any) -> Any:
            if not isinstance(x, Tensor) or x.untyped_storage()._cdata not in made:
                return x
            where = made[x.untyped_storage()._cdata]
            return torch.empty(0, dtype=x.dtype).set_(where, x.storage_offset(), x.shape, x.stride())

        with torch.no_grad():
            for func, args, kwargs, before in self.calls:
                after = func(*tree_map(now, args), **tree_map(now, kwargs))
                for old, new in zip(tree_flatten(before)[0], tree_flatten(after)[0], strict=True):
                    if isinstance(old, Tensor) and old.untyped_storage()._cdata != new.untyped_storage()._cdata:
                        made.setdefault(old.untyped_storage()._cdata, new.untyped_storage())
        return tree_map(now, result)
