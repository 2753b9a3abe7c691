"""gather_patches: the plain gather's bytes at every instruction set, from any layout, only what is visible; errors."""

import ctypes
import dataclasses
import mmap

import pytest
import torch

import maskdiff_kernels as mk
from maskdiff_kernels.ops.samples import Samples, flatten


def plain(store, batch):
    return Samples(*flatten(store, batch, None, batch.n)).stored()


@pytest.mark.parametrize("pad", [0, 64])
@pytest.mark.parametrize("visible", [1, 9, 24, [3, 0, 24, 10]])
def test_the_patches_as_they_are_stored(level, make_store, make_batch, visible, pad):
    store = make_store(pad=pad)
    batch = make_batch(store, visible)
    out = torch.full((batch.keep_ids.numel() + 2, 48), 99, dtype=torch.uint8)
    got = mk.gather_patches(store, batch, out[1:-1])
    assert got.data_ptr() == out[1:-1].data_ptr() and torch.equal(got, plain(store, batch))
    assert (out[[0, -1]] == 99).all()
    slots = torch.arange(len(got), dtype=torch.int32)
    staged = mk.Store(got[None], store.grid, store.patch, slots)
    moved = dataclasses.replace(batch, image_ids=torch.zeros_like(batch.image_ids))
    assert torch.equal(mk.gather_patches(staged, moved), got)
    seed = torch.tensor([1])
    assert torch.equal(mk.noisy_patches(staged, moved, None, seed), mk.noisy_patches(store, batch, None, seed))


def test_nothing_else_is_read(level, make_batch):
    """Images that are not shown lie on pages that may not be touched."""
    page, grid = mmap.PAGESIZE, (4, 6)
    memory = mmap.mmap(-1, 7 * page)
    flat = torch.frombuffer(memory, dtype=torch.uint8)
    store = mk.Store(flat.as_strided((7, 24, 48), (page, 48, 1)), grid, 4)
    flat.copy_(torch.arange(7 * page) % 251)
    batch = make_batch(store, 9)
    shown = set(batch.image_ids.tolist())
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    hidden = [image for image in range(7) if image not in shown]
    expected = plain(store, batch)
    for image in hidden:
        assert protect(ctypes.c_void_p(flat.data_ptr() + image * page), ctypes.c_size_t(page), 0) == 0
    got = mk.gather_patches(store, batch)
    for image in hidden:
        protect(ctypes.c_void_p(flat.data_ptr() + image * page), ctypes.c_size_t(page), 3)
    assert hidden and torch.equal(got, expected)


@pytest.mark.parametrize("plain_kernels", [False, True])
@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, r"^image_ids: got values from 0 to 7, takes 0 to 6", {"image_ids": torch.tensor([0, 7, 1, 1])}),
        (ValueError, r"^keep_ids: got values from -1", {"keep_ids": torch.tensor([[0, -1]] * 4, dtype=torch.int32)}),
        (ValueError, r"^batch: got tensors on meta, takes .* cpu", {"keep_ids": torch.zeros(4, 2, device="meta")}),
        (TypeError, r"^flip: got torch.uint8", {"flip": torch.zeros(4, dtype=torch.uint8)}),
        (ValueError, r"^out: got shape \[7, 48\]", {"out": torch.zeros(7, 48, dtype=torch.uint8)}),
        (TypeError, r"^out: got torch.int8", {"out": torch.zeros(8, 48, dtype=torch.int8)}),
    ],
)  # fmt: skip
def test_errors(make_store, make_batch, monkeypatch, plain_kernels, error, message, change):
    if plain_kernels:
        monkeypatch.setenv("MASKDIFF_KERNELS", "reference")
    store, change = make_store(), dict(change)
    out = change.pop("out", None)
    with pytest.raises(error, match=message):
        mk.gather_patches(store, dataclasses.replace(make_batch(store, 2), **change), out)
