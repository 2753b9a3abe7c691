"""Implementations and inputs of the op tests."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import emulate
import pytest
import torch
from torch import Tensor

import maskdiff_kernels as mk
from maskdiff_kernels import dispatch, library

TIMESTEPS = 50


@pytest.fixture(params=library.cpu_levels())
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that this processor has."""
    with library.use_cpu_level(request.param):
        yield request.param


IMPLEMENTATIONS = ["reference", *(f"cpp-{name}" for name in library.cpu_levels())]
EMULATED = ("noisy_patches", "denoising_loss")  # ops whose CUDA kernels run here too, in the emulator


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Gives `implementation` its values, but where a module or a test has its own."""
    marked = any("implementation" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize"))
    if "implementation" not in metafunc.fixturenames or marked or hasattr(metafunc.module, "implementation"):
        return
    op = metafunc.module.__name__.rpartition("test_")[2]
    emulated = ["cuda"] if op in EMULATED and not emulate.no_emulator() else []
    metafunc.parametrize("implementation", [*IMPLEMENTATIONS, *emulated], indirect=True)


@pytest.fixture
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each value of `backend` that can run here; C++ at each instruction set, CUDA C++ in the emulator."""
    backend, _, name = request.param.partition("-")
    with cuda_on_cpu() if backend == "cuda" else library.use_cpu_level(name or library.cpu_level()):
        yield backend


@contextmanager
def cuda_on_cpu() -> Iterator[None]:
    """Lets the implementations "cuda" run on CPU tensors, by the emulated library."""
    emulated = emulate.load(emulate.build("visible", emulate.VISIBLE))
    emulated.maskdiff_cuda_error_text = emulated.wrapper_error
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "cuda", lambda: emulated)
        for op in EMULATED:
            cuda = dataclasses.replace(dispatch._OPS[op]["cuda"], devices=("cpu",), load=lambda: "emulated")
            patch.setitem(dispatch._OPS[op], "cuda", cuda)
        dispatch._choice.cache_clear()
        yield
    dispatch._choice.cache_clear()


@pytest.fixture
def make_store() -> Callable[..., mk.Store]:
    """Random images; `pad` bytes lie between one image and the next."""

    def make(
        grid: tuple[int, int] = (4, 6), patch: int = 4, channels: int = 3, images: int = 7, pad: int = 0
    ) -> mk.Store:
        size, count = patch * patch * channels, grid[0] * grid[1]
        generator = torch.Generator().manual_seed(1)
        flat = torch.randint(0, 256, (images, count * size + pad), dtype=torch.uint8, generator=generator)
        return mk.Store(flat[:, : count * size].unflatten(1, (count, size)), grid, patch)

    return make


@pytest.fixture
def make_batch() -> Callable[..., mk.Batch]:
    """What samples `first`, first + 1, ... of a store show: K visible patches each, or a list of counts (ragged)."""

    def make(store: mk.Store, visible: int | list[int], batch: int = 4, first: int = 2**32 - 1) -> mk.Batch:
        patches = store.grid[0] * store.grid[1]
        counts = [visible] * batch if isinstance(visible, int) else visible
        generator = torch.Generator().manual_seed(2)
        kept = [torch.randperm(patches, generator=generator)[:count].sort().values.int() for count in counts]
        return mk.Batch(
            n=torch.arange(first, first + len(counts)),
            image_ids=torch.randint(0, len(store.patches), (len(counts),), generator=generator),
            keep_ids=torch.stack(kept) if isinstance(visible, int) else torch.cat(kept),
            cu_patches=None if isinstance(visible, int) else torch.tensor([0, *counts]).cumsum(0).int(),
            flip=torch.arange(len(counts)) % 2 == 1,
            timestep=torch.randint(0, TIMESTEPS, (len(counts),), generator=generator),
            drop_label=torch.zeros(len(counts), dtype=torch.bool),
        )

    return make


@pytest.fixture
def one_sample() -> Callable[[mk.Batch, int], mk.Batch]:
    """Sample b of a ragged batch, as a batch of its own of equal lengths."""

    def cut(batch: mk.Batch, b: int) -> mk.Batch:
        assert batch.cu_patches is not None
        begin, end = batch.cu_patches[b : b + 2]
        per_sample = ("n", "image_ids", "flip", "timestep", "drop_label")
        return mk.Batch(
            **{name: getattr(batch, name)[b : b + 1] for name in per_sample},
            keep_ids=batch.keep_ids[None, begin:end],
            cu_patches=None,
        )

    return cut


@pytest.fixture
def alpha_sigma() -> Tensor:  # [T, 2]
    angle = torch.linspace(0.01, 1.5, TIMESTEPS)
    return torch.stack((angle.cos(), angle.sin()), dim=1)


@pytest.fixture
def weight() -> Tensor:  # [T]
    return torch.linspace(0.5, 5.0, TIMESTEPS)


@pytest.fixture
def seed() -> Tensor:
    return torch.tensor([-1234567890123456789])
