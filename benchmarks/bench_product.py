"""Products of the library's own, by AMX's tiles, beside PyTorch's: FLOP/s. See conftest.py.

Those of preset celeba64's fc1 and fc2, batch 8, at 0, 50, 75 and 90 % masked: the gradients of both weights, fc2's
product added to a residual and the gradient of fc1's input. In training the last two are the library's only where
kernels/ops/product.py says that PyTorch leaves a thread idle.
"""

import pytest
import torch

from maskdiff.precision import keep_freed_memory
from maskdiff_kernels import library
from maskdiff_kernels.ops import product

TOKENS, WIDTH, HIDDEN = (2056, 1032, 520, 216), 512, 2048
FORMS = ("weight_gradient fc1", "weight_gradient fc2", "add_linear fc2", "input_gradient fc1")
CASES = [f"{tokens}-{form}" for tokens in TOKENS for form in FORMS]


def build(case: str):
    keep_freed_memory()
    tokens, form, how = case.split("-")
    narrow, wide, fc1, fc2 = (
        torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
        for shape in ((int(tokens), WIDTH), (int(tokens), HIDDEN), (HIDDEN, WIDTH), (WIDTH, HIDDEN))
    )
    runs = {
        "weight_gradient fc1": (lambda: product.weight_gradient(wide, narrow), lambda: wide.t().mm(narrow)),
        "weight_gradient fc2": (lambda: product.weight_gradient(narrow, wide), lambda: narrow.t().mm(wide)),
        "add_linear fc2": (lambda: product.add_linear(narrow, wide, fc2), lambda: narrow.addmm_(wide, fc2.t())),
        "input_gradient fc1": (lambda: product.input_gradient(wide, fc1), lambda: wide.mm(fc1)),
    }
    return runs[form][how == "torch"], 2 * int(tokens) * WIDTH * HIDDEN, "flops"


@pytest.mark.skipif(library.cpu_level() != "amx_bf16", reason="a processor without AMX")
@pytest.mark.parametrize("case", CASES)
def test_product(in_turns, case):
    in_turns(build, case, ("cpp", "torch"))
