"""The interface of all places that pictures come from, and the hash that tells their contents apart."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np

from maskdiff.packing.items import Item


class Reader(Protocol):
    """Pictures of one source in a fixed order. One small class for each kind of source."""

    kind: str
    name: str  # short, for people
    count: int
    labels: dict[str, list[str]]  # attribute -> names of its classes
    rows: np.ndarray  # [count, A] int32: the class of each picture, -1 where missing
    rejects: list[tuple[str, str]]  # (name, reason) of what is known not to be usable before any work
    fingerprint: str  # of the content: other pictures, other fingerprint

    def names(self) -> Iterable[str]: ...  # of all pictures; unique

    def items(self, chosen: Sequence[int]) -> Iterator[Item]: ...  # of these pictures, by ascending number


def digest(marks: Iterable[str]) -> str:
    """A hash of texts that mark the pictures of a source."""
    hash_ = hashlib.sha256()
    for mark in marks:
        hash_.update(f"{mark}\0".encode("utf-8", "surrogatepass"))
    return hash_.hexdigest()
