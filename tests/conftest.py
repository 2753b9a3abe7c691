"""What tests of every part share; Triton 3.6's interpreter put right for new NumPy and bfloat16."""

from collections.abc import Iterator

import pytest
import torch

from maskdiff_kernels.triton_package import INTERPRETED

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

LONGEST = """
    test_install emulation/test_attention ops/test_attention ops/test_attention_triton test_agreement test_docs
    test_training test_visible test_images_triton ops/test_adamw_ema emulation/test_adamw_ema test_library test_faults
    test_gpu_kernels test_gpu test_capture test_pack
""".split()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """`make test` has two workers, each of which takes the next whole file when it is done with one: most tests keep
    one core busy. The longest files come first, so that both workers end at about the same time."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: [f"/{name}.py" not in str(item.path) for name in LONGEST])


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fills every new, uninitialised tensor with NaN, or the largest integer: what is not written shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)  # some of PyTorch's on a GPU are not
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture
def threads() -> Iterator[None]:
    """Lets a test call torch.set_num_threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="module")
def threads_of_the_module() -> Iterator[None]:
    """Commands that tests run call it, too."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
