"""Reading: what is chosen, the same steps by every reading, patches gathered ahead by a thread, private memory."""

import dataclasses
import re
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from small_step import BATCH, MODEL, SEED, mask_of, setup

from maskdiff import capture, reading
from maskdiff.capture import Steps
from maskdiff.errors import UserError
from maskdiff.optim import Hyper
from maskdiff.reading import COPIED, Staging, resolve, staged
from maskdiff.step import draw
from maskdiff_kernels import Mask, Store

MASKS = ["dense", "patch:0.5", "block2:0.75", "crop:0.5", "patch:0.1-0.9", "block2:0.2-0.8", "crop:0.3-0.95"]
CPU, GPU = torch.device("cpu"), torch.device("cuda")
HYPER = Hyper(1e-3, 1.0)


def steps_of(ahead):
    state, source, objective = setup()
    return Steps(state, source, objective, SEED, ahead=ahead)


def same(state, other):
    ours, theirs = state.tensors(), other.tensors()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# ---- what is chosen


def test_what_fits_on_a_device_lies_there_and_the_rest_is_read_ahead(monkeypatch):
    store = setup()[1].store
    size = store.patches.numel()
    found = resolve(store, CPU)
    assert found.mode == "device" and torch.equal(found.store.patches, store.patches)
    assert found.store.patches.data_ptr() != store.patches.data_ptr()  # the file may be slow, or gone
    large = Store(torch.empty(COPIED // 768 + 1, 16, 48, dtype=torch.uint8), (4, 4), 4)
    found = resolve(large, CPU)
    assert (
        found.mode == "ahead" and found.store is large and "134.2 MB of images, they stay memory-mapped" in found.words
    )
    free = [2 * size - 2]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0], 1 << 40))
    assert resolve(store, GPU).store is store and resolve(store, GPU).mode == "ahead"
    free[0] += 2
    moved: list[torch.device] = []
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device, copy: moved.append(device) or tensor)
    assert resolve(store, GPU).mode == "device" and moved == [GPU]


def test_a_reading_can_be_forced_where_it_can_be(monkeypatch):
    store = setup()[1].store
    for mode in ("device", "mapped", "ahead"):
        found = resolve(store, CPU, mode)
        assert found.mode == mode and found.words.startswith(f"reading {mode}: 0.0 MB of images, they ")
        assert (found.store is store) == (mode != "device")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (store.patches.numel() - 1, 1 << 40))
    with pytest.raises(UserError, match=r"data.reading is device, but the images take .*give ahead or auto"):
        resolve(store, GPU, "device")
    with pytest.raises(UserError, match=r"data.reading is mapped, and a GPU cannot .*give ahead, device or auto"):
        resolve(store, GPU, "mapped")
    assert resolve(store, GPU, "ahead").store is store


# ---- steps whose patches are gathered ahead


@pytest.mark.parametrize("mask", MASKS)
def test_steps_read_ahead_are_the_same(mask):
    ahead, direct = steps_of(ahead=True), steps_of(ahead=False)
    for turn in range(5):
        got, expected = ahead(mask_of(mask), BATCH, HYPER), direct(mask_of(mask), BATCH, HYPER)
        assert torch.equal(got.loss, expected.loss)
        if turn == 2:  # elsewhere in the stream, as after a resume
            ahead.state.sample = direct.state.sample = 301
    same(ahead.state, direct.state)


def test_what_a_batch_shows_alone_is_a_source(monkeypatch):
    _, source, objective = setup()
    batch = draw(source, objective, mask_of("patch:0.1-0.9"), SEED, torch.arange(BATCH))
    assert staged(source, batch) is source
    elsewhere = dataclasses.replace(batch, n=batch.n.to("meta"))
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: batch.n if tensor is elsewhere.n else tensor)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device: tensor)
    found = staged(source, elsewhere).store
    assert found.patches.shape == (1, batch.keep_ids.numel(), MODEL.patch_dim)
    assert found.slots.tolist() == list(range(batch.keep_ids.numel()))


@pytest.fixture
def fetched(monkeypatch):
    """(thread, first sample) of every fetch; each takes a while."""
    log = []
    fetch = Staging._fetch

    def slow(staging, slot, first):
        time.sleep(0.02)
        log.append((threading.current_thread(), first))
        return fetch(staging, slot, first)

    monkeypatch.setattr(Staging, "_fetch", slow)
    return log


def test_another_thread_is_two_steps_ahead(fetched, monkeypatch):
    """It begins anew only where a shape begins, and leaves this thread its cores."""
    steps, inside = steps_of(ahead=True), []
    step = capture.device_step

    def watched(*arguments):
        staging = steps.prepare(arguments[3], BATCH)[0]
        inside.append([first for first, _ in staging.coming])
        return step(*arguments)

    monkeypatch.setattr(capture, "device_step", watched)
    before = torch.get_num_threads()
    for mask in ("dense", "dense", "patch:0.5"):
        steps(mask_of(mask), BATCH, HYPER)
    assert inside == [[8, 16], [16, 24], [24, 32]]
    stagings = [steps.prepare(mask_of(mask), BATCH)[0] for mask in ("dense", "patch:0.5")]
    for staging in stagings:
        staging.settle()
        assert all(future.done() for _, future in staging.coming)
        assert staging.thread.submit(torch.get_num_threads).result() == 1
    assert sorted(first for _, first in fetched) == [0, 8, 16, 16, 24, 24, 32]
    assert {thread for thread, _ in fetched}.isdisjoint({threading.current_thread()})
    assert torch.get_num_threads() == before
    assert stagings[0].source.store.patches.shape == (1, BATCH * MODEL.patches, MODEL.patch_dim)
    assert stagings[1].source.store.patches.shape == (1, BATCH * 8, MODEL.patch_dim)


def test_no_thread_is_at_work_while_a_graph_is_captured(monkeypatch):
    """What comes after the first step is fetched no sooner than somebody waits for it."""
    steps, idle = steps_of(ahead=True), []
    steps.captures = True
    gate, fetch, settle = threading.Event(), Staging._fetch, Staging.settle
    monkeypatch.setattr(Staging, "settle", lambda staging: (gate.set(), settle(staging)))
    monkeypatch.setattr(Staging, "_fetch", lambda *args: (args[2] == 0 or gate.wait(), fetch(*args))[1])

    def refused(*_):
        idle.append(all(future.done() for shape in steps._shapes.values() for _, future in shape.staging.coming))
        (gate.set if idle[1:] else gate.clear)()
        raise RuntimeError("no GPU")

    monkeypatch.setattr(capture, "Captured", refused)
    for mask in ("dense", "patch:0.5"):
        steps(mask_of(mask), BATCH, HYPER)
    assert idle == [True, True]


def test_an_error_of_the_thread_is_the_steps(monkeypatch):
    steps = steps_of(ahead=True)
    steps(mask_of("dense"), BATCH, HYPER)
    steps.prepare(mask_of("dense"), BATCH)[0].settle()
    monkeypatch.setattr(reading, "gather_patches", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        for _ in range(4):
            steps(mask_of("dense"), BATCH, HYPER)


def test_plain_kernels_read_ahead_without_the_library(monkeypatch):
    monkeypatch.setenv("MASKDIFF_KERNELS", "draw_batch=reference,noisy_patches=reference")
    monkeypatch.setattr("maskdiff_kernels.library.cpu", lambda: 1 / 0)
    _, source, objective = setup()
    staging = Staging(source, objective, mask_of("patch:0.5"), SEED, BATCH)
    staging.hand_over(16)
    monkeypatch.undo()
    other = Staging(source, objective, mask_of("patch:0.5"), SEED, BATCH)
    other.hand_over(16)
    assert torch.equal(staging.source.store.patches, other.source.store.patches)


def private():
    return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) << 10


def test_a_set_takes_no_private_memory(tmp_path):
    """Half a gigabyte of images, mostly a hole in the file; every image is read."""
    count, n, size = 40_000, 256, 48
    with open(tmp_path / "images.u8", "wb") as file:
        file.truncate(count * n * size)
    pixels = torch.from_numpy(np.memmap(tmp_path / "images.u8", np.uint8, "c"))
    _, source, objective = setup()
    store = Store(pixels.view(count, n, size), (16, 16), 4)
    source = dataclasses.replace(source, store=store, ids=torch.arange(count), labels=None)
    before = private()
    staging = Staging(source, objective, Mask("patch", counts=(26,)), SEED, 256)
    for first in range(0, count, 256):
        staging.hand_over(first)
    assert private() - before < 32 << 20
