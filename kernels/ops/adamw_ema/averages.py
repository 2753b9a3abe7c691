"""How the weights' averages forget: by a final decay, or by a power function of the updates they have seen."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

NO_POWER = -1.0  # in the place of gamma: an average with a final decay


@dataclass(frozen=True)
class PowerEma:
    """An average whose decay at update k is (1 - 1/k)^(gamma + 1): its reach grows with the run, and update 1 replaces
    what it started from. gamma 0 weighs all updates alike, a larger one the late ones.

    Raises ValueError for a gamma below 0.

    Source: Karras et al., Analyzing and Improving the Training Dynamics of Diffusion Models, arXiv 2312.02696, section
    3.1, which names an average by its relative width sigma_rel.
    """

    gamma: float

    def __post_init__(self) -> None:
        if not 0 <= self.gamma < math.inf:
            raise ValueError(f"gamma: got {self.gamma}, takes 0 or more")

    @classmethod
    def of_width(cls, sigma_rel: float) -> "PowerEma":
        """The average of which the weights that it is made of spread over the share `sigma_rel` of the run so far, as a
        standard deviation: above 0, at most 12^-0.5 = 0.288 (gamma 0). Raises ValueError for others."""
        if not 0 < sigma_rel <= 12**-0.5:
            raise ValueError(f"sigma_rel: got {sigma_rel}, takes more than 0 and at most {12**-0.5:.4f}")
        low, high = 0.0, 1 / sigma_rel  # the width falls as gamma rises, and is below 1 / (gamma + 2)
        while low < (middle := (low + high) / 2) < high:
            low, high = (middle, high) if _width(middle) > sigma_rel else (low, middle)
        return cls(low)

    @property
    def sigma_rel(self) -> float:
        return _width(self.gamma)


def _width(gamma: float) -> float:
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def numbers(average: float | PowerEma) -> tuple[float, float]:
    """(final decay, gamma), as the op takes an average."""
    return (1.0, average.gamma) if isinstance(average, PowerEma) else (average, NO_POWER)


def decay(
    seen: Tensor,  # [] float64
    final: float,
    gamma: float,  # NO_POWER: none
    every: int = 1,
) -> Tensor:  # [] float64
    """The product of an average's decays at its update number `seen` and the every - 1 before; stays on the device.

    Means nothing where `seen` is no multiple of `every`, or 0; but is finite there.
    """
    if gamma != NO_POWER:
        return (1 - 1 / (seen / every).clamp(min=1)) ** (gamma + 1)  # ((seen - every) / seen)^(gamma + 1)
    k = (seen - torch.arange(every, device=seen.device)).clamp(min=0)
    return torch.clamp((1 + k) / (10 + k), max=final).prod()
