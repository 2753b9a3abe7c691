"""What adamw_ema updates: flat buffers and where the parameters lie in them; and all its arguments, checked."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from maskdiff_kernels.ops import checks
from maskdiff_kernels.ops.adamw_ema.averages import NO_POWER, PowerEma, decay, numbers

LOW = (torch.bfloat16, torch.float16)
MOST_EVERY = 1000  # updates between those at which averages are taken up

SCHEMA = (
    "Tensor(a!) master, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!) ema, Tensor(e!)? ema2, Tensor(f!)? low,"
    " Tensor(g!) adam_step, Tensor(h!) ema_step, int[] offsets, int[] sizes, bool[] decays, Tensor(i!)[] grads,"
    " Tensor hyper, float beta1, float beta2, float eps, float weight_decay, float ema_decay, float ema2_decay,"
    " float ema_gamma, float ema2_gamma, int ema_every"
)


@dataclass(frozen=True)
class AdamState:
    """Flat buffers of N elements, and the S parameters in them, one after another. Elements between parameters have no
    meaning: they may be updated as if their gradients were 0, or left alone."""

    master: Tensor  # [N] float32: the weights
    exp_avg: Tensor  # [N] float32: first moments
    exp_avg_sq: Tensor  # [N] float32: second moments
    ema: Tensor  # [N] float32: averages of the masters
    adam_step: Tensor  # [] float32: updates made
    ema_step: Tensor  # [] float32: updates that the averages have seen
    offsets: Sequence[int]  # [S] where each parameter starts, ascending
    sizes: Sequence[int]  # [S] its elements
    decays: Sequence[bool]  # [S] whether AdamW decays it
    low: Tensor | None = None  # [L] bfloat16 or float16: the first L masters, rounded
    ema2: Tensor | None = None  # [N] float32: averages of another decay


class Update(NamedTuple):
    """The arguments of the registered op, in the order of SCHEMA: state, gradients, numbers."""

    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    ema: Tensor
    ema2: Tensor | None
    low: Tensor | None
    adam_step: Tensor
    ema_step: Tensor
    offsets: Sequence[int]
    sizes: Sequence[int]
    decays: Sequence[bool]
    grads: Sequence[Tensor]  # S dense tensors, float32 / bfloat16 / float16
    hyper: Tensor  # [2] float32: learning rate, bound on the gradient norm
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    ema_decay: float
    ema2_decay: float
    ema_gamma: float
    ema2_gamma: float
    ema_every: int = 1

    def parts(self, flat: Tensor) -> list[Tensor]:
        """The parameters' parts of a flat buffer, each [size]."""
        return [flat[offset : offset + size] for offset, size in zip(self.offsets, self.sizes, strict=True)]

    def averages(
        self,
        seen: Tensor,  # []
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The averages that there are, each with its decay [] float64 at update number `seen` of theirs, where due."""
        yield self.ema, decay(seen.double(), self.ema_decay, self.ema_gamma, self.ema_every)
        if self.ema2 is not None:
            yield self.ema2, decay(seen.double(), self.ema2_decay, self.ema2_gamma, self.ema_every)

    def due(
        self,
        seen: Tensor,  # []
    ) -> Tensor:  # [] bool
        """Whether the averages are to change at update number `seen` of theirs."""
        return seen % self.ema_every == 0

    def written(self) -> list[Tensor]:
        """The state's tensors."""
        return [t for t in self[:8] if isinstance(t, Tensor)]

    def check(self) -> None:
        """Raises TypeError or ValueError for an argument that does not fit."""
        device, size = self.master.device, self.master.shape[:1]
        checks.tensor("state.master", self.master, "float32 [N]", torch.float32, (None,), device)
        for name in ("exp_avg", "exp_avg_sq", "ema", "ema2"):
            flat = getattr(self, name)
            if flat is not None:
                checks.tensor(f"state.{name}", flat, "float32 [N]", torch.float32, size, device)
        if self.low is not None:
            checks.tensor("state.low", self.low, "bfloat16 or float16 [L]", LOW, (None,), device)
            if self.low.shape[0] > size[0]:
                raise ValueError(f"state.low: got {self.low.shape[0]} elements, takes at most {size[0]}, the masters'")
        checks.tensor("state.adam_step", self.adam_step, "float32 []", torch.float32, (), device)
        checks.tensor("state.ema_step", self.ema_step, "float32 []", torch.float32, (), device)
        checks.tensor("hyper", self.hyper, "float32 [2]", torch.float32, (2,), device)
        self._check_layout(size[0])
        self._check_grads(device)
        for name, beta in (("betas[0]", self.beta1), ("betas[1]", self.beta2)):
            if not 0 <= beta < 1:
                raise ValueError(f"{name}: got {beta}, takes 0 to below 1")
        for name in ("ema_decay", "ema2_decay"):
            checks.number(name, getattr(self, name), 0, 1)
        for name in ("ema_gamma", "ema2_gamma"):
            if getattr(self, name) != NO_POWER:
                checks.number(name, getattr(self, name), 0, float("inf"))
        for name in ("eps", "weight_decay"):
            checks.number(name, getattr(self, name), 0, float("inf"))
        checks.number("ema_every", self.ema_every, 1, MOST_EVERY)

    def _check_layout(self, size: int) -> None:
        count, end = len(self.offsets), 0
        if count == 0:
            raise ValueError("state.offsets: got none, takes one for each parameter")
        for name in ("sizes", "decays", "grads"):
            if len(getattr(self, name)) != count:
                shown = name if name == "grads" else f"state.{name}"
                raise ValueError(f"{shown}: got {len(getattr(self, name))}, takes {count}, one for each parameter")
        for i, (offset, length) in enumerate(zip(self.offsets, self.sizes, strict=True)):
            if offset < end or length < 1:
                raise ValueError(
                    f"state.offsets[{i}]: got {offset} for {length} elements, takes at least {end}, the end of the"
                    " parameter before, and at least one element"
                )
            end = offset + length
        if end > size:
            raise ValueError(f"state.sizes: got parameters up to element {end}, takes at most {size}, the masters'")

    def _check_grads(self, device: torch.device) -> None:
        for i, (grad, length) in enumerate(zip(self.grads, self.sizes, strict=True)):
            if grad.numel() != length:
                raise ValueError(f"grads[{i}]: got {grad.numel()} elements, takes {length}, as the parameter has")
            if grad.dtype in checks.FLOATS and grad.is_contiguous() and grad.device == device:
                continue  # the common case, in 1 us: there are hundreds
            takes = "a float32, bfloat16 or float16 tensor"
            checks.tensor(f"grads[{i}]", grad, takes, checks.FLOATS, grad.shape, device)


def flatten(
    state: AdamState,
    grads: Sequence[Tensor] | Tensor,
    hyper: Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    ema_decay: float | PowerEma,
    ema2_decay: float | PowerEma,
    ema_every: int = 1,
) -> tuple[Any, ...]:
    """The arguments of SCHEMA, which are those of Update."""
    if isinstance(grads, Tensor):
        checks.tensor("grads", grads, "float32 [N] or a list", torch.float32, state.master.shape, state.master.device)
        grads = [grads[offset : offset + size] for offset, size in zip(state.offsets, state.sizes, strict=True)]
    (decay1, gamma1), (decay2, gamma2) = numbers(ema_decay), numbers(ema2_decay)
    return (
        state.master, state.exp_avg, state.exp_avg_sq, state.ema, state.ema2, state.low, state.adam_step,
        state.ema_step, state.offsets, state.sizes, state.decays, grads, hyper, *betas, eps, weight_decay, decay1,
        decay2, gamma1, gamma2, ema_every,
    )  # fmt: skip
