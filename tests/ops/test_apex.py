"""The adapter of apex's kernels: signatures of the real package, absence, impostors, which part writes the copy."""

import inspect
import re
import types

import pytest
import torch
from apex_stand_in import AmpC, apex_on_cpu

import maskdiff_kernels as mk
from maskdiff_kernels import LibraryError
from maskdiff_kernels.ops.adamw_ema import apex

STAND_INS = [getattr(AmpC, name) for name in apex.NEEDS]


@pytest.fixture
def absent(monkeypatch, tmp_path):
    """No package of apex; the folder in which tests may put others."""

    def find(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(apex.importlib, "import_module", find)
    monkeypatch.setattr(apex.importlib.util, "find_spec", lambda name: None)
    apex.kernels.cache_clear()
    yield tmp_path
    apex.kernels.cache_clear()


def test_absent(absent):
    with pytest.raises(LibraryError, match="^apex is not installed; build NVIDIA's from github.com/NVIDIA/apex"):
        apex.load()


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("interfaces", "^the package apex that is installed here is PyPI's, another project of that name; build"),
        ("multi_tensor_apply", r"^the apex installed here has no CUDA extensions \(No module named 'amp_C'\); build"),
    ],
)
def test_a_package_of_that_name_is_looked_at_and_not_imported(absent, monkeypatch, folder, message):
    (absent / folder).mkdir()
    (absent / "__init__.py").write_text("raise AssertionError('a stranger runs')")
    spec = types.SimpleNamespace(submodule_search_locations=[str(absent)])
    monkeypatch.setattr(apex.importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(LibraryError, match=message):
        apex.load()


def test_too_old(absent, monkeypatch):
    old = types.SimpleNamespace(multi_tensor_l2norm=None)
    monkeypatch.setattr(apex.importlib, "import_module", lambda name: old)
    with pytest.raises(LibraryError, match="too old, it has no multi_tensor_adam_capturable;"):
        apex.load()


def test_it_takes_cuda_tensors_alone():
    state = mk.AdamState(*(torch.zeros(3) for _ in range(4)), torch.zeros(()), torch.zeros(()), [0], [3], [True])
    with pytest.raises(ValueError, match="^backend: 'apex' of adamw_ema takes cuda tensors, not cpu"):
        mk.adamw_ema(state, [torch.zeros(3)], torch.zeros(2), (0.9, 0.99), 1e-8, 0.0, 0.9, backend="apex")


@pytest.mark.parametrize("low", [None, torch.bfloat16])
def test_the_kernel_writes_the_copy_where_it_can(monkeypatch, low):
    """Whole parts of their gradients' dtype; the rest is copied, nothing where there is no rest."""
    calls: list[tuple[str, int]] = []
    for function in STAND_INS[1:]:

        def recorded(*arguments, function=function):
            calls.append((function.__name__.removeprefix("multi_tensor_adam_"), len(arguments[2][0])))
            return function(*arguments)

        monkeypatch.setattr(AmpC, function.__name__, staticmethod(recorded))
    copy = None if low is None else torch.zeros(60, dtype=low)  # ends within the third of three
    flats = [torch.rand(90) for _ in range(4)]
    counts = torch.zeros(()), torch.zeros(())
    state = mk.AdamState(*flats, *counts, [0, 20, 40], [20, 20, 50], [True, False, True], low=copy)
    grads = [torch.randn(size).to(low or torch.float32) for size in state.sizes]
    with apex_on_cpu():
        mk.adamw_ema(state, grads, torch.tensor([0.1, 1.0]), (0.9, 0.99), 1e-8, 0.1, 0.9, backend="apex")
    if low is None:
        assert calls == [("capturable", 2), ("capturable", 1)]
    else:
        assert calls == [("capturable_master", 1), ("capturable_master", 1), ("capturable", 1)]
        assert torch.equal(copy, state.master[:60].to(low))


@pytest.mark.parametrize("function", STAND_INS, ids=lambda function: function.__name__)
def test_signatures(function):
    """The real functions have as many arguments as the stand-ins: pybind11 gives them no names, and says so in text."""
    amp_c = pytest.importorskip("amp_C")
    pytest.importorskip("apex.optimizers")  # NVIDIA's
    words = getattr(amp_c, function.__name__).__doc__.partition("->")[0]
    assert len(re.findall(r"\barg\d+", words)) == len(inspect.signature(function).parameters)
