"""Implementations and inputs of the op tests."""

import dataclasses
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import emulate
import pytest
import torch
from apex_stand_in import apex_on_cpu
from placing import here
from torch import Tensor

import maskdiff_kernels as mk
from maskdiff_kernels import dispatch, library
from maskdiff_kernels.triton_package import INTERPRETED

TIMESTEPS = 50
ON_CUDA, EMULATOR, STAND_IN = "on-cuda", "emulated", "stand-in"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic products on a GPU take


if INTERPRETED:
    from triton.runtime import interpreter

    patch_tensor, convert_float = interpreter._patch_lang_tensor, interpreter._convert_float

    def patch_tensor_for_new_numpy(tensor, scope) -> None:
        """Triton 3.6 takes int() of arrays of one number, which NumPy has refused since 2.4."""
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def round_to_nearest(values, from_dtype, to_dtype, mode):
        """Triton 3.6 cuts the last bits of float32 off to make it bfloat16; kernels on a GPU round."""
        if (str(from_dtype), str(to_dtype)) != ("fp32", "bf16"):
            return convert_float(values, from_dtype, to_dtype, mode)
        return torch.tensor(values).bfloat16().view(torch.uint16).numpy()

    interpreter._patch_lang_tensor, interpreter._convert_float = patch_tensor_for_new_numpy, round_to_nearest


@pytest.fixture(params=library.cpu_levels())
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that this processor has."""
    with library.use_cpu_level(request.param):
        yield request.param


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test's `implementation`: each backend of its op, on each device that it takes."""
    if "implementation" in metafunc.fixturenames:
        path = metafunc.definition.path
        found = implementations(backends_of(path))
        if path.stem.removeprefix("test_") in emulate.OPS and not emulate.no_emulator():
            found.append(f"cuda-{EMULATOR}")
        if "apex" in backends_of(path):
            found.append(f"apex-{STAND_IN}")
        metafunc.parametrize("implementation", found, indirect=True)


def backends_of(path: Path) -> dict[str, dispatch.Implementation]:
    """Those of the op that test_<op>.py is named after; elsewhere those that all ops of images have."""
    return dispatch._OPS.get(path.stem.removeprefix("test_"), dispatch._OPS["denoising_loss"])


def implementations(backends: dict[str, dispatch.Implementation]) -> list[str]:
    """ "cpp-avx2", ... for every instruction set; "reference"; "cuda-on-cuda", "reference-on-cuda", ... on a GPU."""
    found = []
    for name, known in backends.items():
        if name == "cpp":
            found += [f"cpp-{level}" for level in library.cpu_levels()]
        elif known.can_run("cpu")[0]:
            found.append(name)
        if not known.devices or "cuda" in known.devices:
            found.append(f"{name}-{ON_CUDA}")
    return found


@pytest.fixture
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """A value of `backend`. New tensors stand on the device that it is to run on: ask for this fixture first."""
    backend, _, where = request.param.partition("-")
    if where == ON_CUDA:
        able, reason = backends_of(request.path)[backend].can_run("cuda")
        if not torch.cuda.is_available():
            pytest.skip("PyTorch sees no CUDA device")
        if not able:
            pytest.skip(f"{backend}: {reason}")
        with torch.device("cuda"):
            yield backend
    elif where == EMULATOR:
        with cuda_on_cpu():
            yield backend
    elif where == STAND_IN:
        with apex_on_cpu():
            yield backend
    else:
        with library.use_cpu_level(where or library.cpu_level()):
            yield backend


@contextmanager
def cuda_on_cpu() -> Iterator[None]:
    """Lets the implementations "cuda" run on CPU tensors, by the emulated library."""
    emulated = emulate.load_ops()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "cuda", lambda: emulated)
        for op in emulate.OPS:
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
        shape = (images, count * size + pad)
        flat = here(torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator, device="cpu"))
        return mk.Store(flat[:, : count * size].unflatten(1, (count, size)), grid, patch)

    return make


@pytest.fixture
def make_batch() -> Callable[..., mk.Batch]:
    """What samples `first`, first + 1, ... of a store show: K visible patches each, or a list of counts (ragged)."""

    def make(store: mk.Store, visible: int | list[int], batch: int = 4, first: int = 2**32 - 1) -> mk.Batch:
        patches = store.grid[0] * store.grid[1]
        counts = [visible] * batch if isinstance(visible, int) else visible
        generator = torch.Generator().manual_seed(2)
        draw = {"generator": generator, "device": "cpu"}
        kept = [torch.randperm(patches, **draw)[:count].sort().values.int() for count in counts]
        image_ids = torch.randint(0, len(store.patches), (len(counts),), **draw)
        return mk.Batch(
            n=torch.arange(first, first + len(counts)),
            image_ids=here(image_ids),
            keep_ids=here(torch.stack(kept) if isinstance(visible, int) else torch.cat(kept)),
            cu_patches=None if isinstance(visible, int) else torch.tensor([0, *counts]).cumsum(0).int(),
            flip=torch.arange(len(counts)) % 2 == 1,
            timestep=here(torch.randint(0, TIMESTEPS, (len(counts),), **draw)),
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
