"""The block whose backward pass is written by hand, against the same parts under autograd, bit for bit."""

import pytest
import torch
from test_model import shaken
from torch.utils._python_dispatch import TorchDispatchMode

import maskdiff_kernels
from maskdiff import whole_block
from maskdiff.model import ModelConfig, UViT, cast_products
from maskdiff_kernels import library
from maskdiff_kernels.ops import product

CONFIG = ModelConfig(image_size=32, width=64, blocks=5, heads=2, qkv_bias=True, mlp_ratio=2.5)
DENSE = (torch.randn(4, 64, 48, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 17, 500, 999]))
RAGGED = (
    DENSE[0][0, :30],
    torch.tensor([3, 700, 90]),
    None,
    torch.arange(30, dtype=torch.int32),
    torch.tensor([0, 1, 17, 30], dtype=torch.int32),
    16,
)


@pytest.fixture(autouse=True)
def products_of_pytorch(monkeypatch):
    """All of them, as the parts have them: with AMX some are the library's (tests/ops/test_product.py)."""
    monkeypatch.setattr(product, "takes", lambda *_: False)


@pytest.fixture
def made(monkeypatch):
    """The blocks that `run` was called for."""
    blocks, run = [], whole_block.run
    monkeypatch.setattr(whole_block, "run", lambda block, *rest: (blocks.append(block), run(block, *rest))[1])
    return blocks


def model_in(dtype: torch.dtype, config: ModelConfig = CONFIG) -> UViT:
    model = shaken(config)
    cast_products(model, dtype)
    return model


def gradients(model: UViT, batch: tuple) -> dict[str, torch.Tensor | None]:
    model.zero_grad()
    out = model(*batch)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return {"output": out.detach()} | {name: p.grad for name, p in model.named_parameters()}


def by_parts(model: UViT, batch: tuple, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor | None]:
    # in float32 PyTorch's LayerNorm is chosen for few numbers: here both ways run the op
    with monkeypatch.context() as patch, maskdiff_kernels.using(layer_norm="cpp"):
        patch.setattr(whole_block, "takes", lambda *_: False)
        return gradients(model, batch)


@pytest.mark.parametrize("config", [CONFIG, ModelConfig(image_size=32, width=64, blocks=3, heads=2)])
@pytest.mark.parametrize("batch", [DENSE, RAGGED], ids=["equal", "ragged"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_its_parts_bit_for_bit(dtype, batch, config, made, monkeypatch):
    """But for the gradient of fc1's bias, which is summed before it is rounded: held to the fp64 rule."""
    model = model_in(dtype, config)
    parts = by_parts(model, batch, monkeypatch)
    assert made == []
    with maskdiff_kernels.using(layer_norm="cpp"):
        whole = gradients(model, batch)
    assert made == list(model.blocks)
    exact = by_parts(model_in(torch.float32, config).double(), tuple(map(in_double, batch)), monkeypatch)
    for name, mine in whole.items():
        assert mine.dtype == parts[name].dtype
        if name.endswith("fc1.bias"):
            error, peer = ((value.double() - exact[name]).norm() for value in (mine, parts[name]))
            assert error <= 3 * peer + torch.finfo(dtype).eps / 2 * exact[name].norm(), name
        else:
            assert torch.equal(mine, parts[name]), name


def in_double(value):
    return value.double() if isinstance(value, torch.Tensor) and value.dtype == torch.float32 else value


@pytest.mark.parametrize("error", [AttributeError, RuntimeError])
def test_without_the_product_that_adds_a_bias(error, monkeypatch):
    """Where PyTorch has none, or the processor not what it needs for bf16: addmm, the same bits."""

    def refused(*_):
        raise error("could not create a primitive descriptor")

    model = model_in(torch.bfloat16)
    expected = gradients(model, DENSE)
    monkeypatch.setattr(whole_block, "_pointwise", refused)
    whole_block._adds_bias_itself.cache_clear()
    try:
        got = gradients(model, DENSE)
    finally:
        whole_block._adds_bias_itself.cache_clear()
    assert all(torch.equal(value, expected[name]) for name, value in got.items())


@pytest.mark.parametrize("name", [name for name, _ in UViT(CONFIG).named_parameters() if name.startswith("blocks.4.")])
def test_a_frozen_parameter_gets_no_gradient_and_the_others_theirs(name, monkeypatch):
    model = model_in(torch.bfloat16)
    expected = gradients(model, DENSE)
    model.get_parameter(name).requires_grad_(False)
    products, mm = [], torch.Tensor.mm
    monkeypatch.setattr(torch.Tensor, "mm", lambda *pair: (products.append(pair), mm(*pair))[1])
    got = gradients(model, DENSE)
    assert got.pop(name) is None
    assert all(torch.equal(value, expected[other]) for other, value in got.items())
    frozen = len(products)
    model.get_parameter(name).requires_grad_(True)
    gradients(model, DENSE)
    assert len(products) - 2 * frozen == (".weight" in name and "norm" not in name)  # no product is made for nothing


def test_a_frozen_model_passes_the_gradient_through():
    model = model_in(torch.float32)
    model.requires_grad_(False)
    x = DENSE[0].clone().requires_grad_()
    out = model(x, DENSE[1])
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert grad.isfinite().all() and grad.norm() > 0


def test_recomputed_blocks_give_the_same_bits(made):
    model = model_in(torch.bfloat16)
    expected = gradients(model, DENSE)
    model.recompute = True
    made.clear()
    got = gradients(model, DENSE)
    assert len(made) == 2 * CONFIG.blocks
    assert all(torch.equal(value, expected[name]) for name, value in got.items())


class Watching(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.seen.append(str(function))
        return function(*arguments, **(options or {}))


def test_who_watches_ops_sees_its_own():
    model = model_in(torch.bfloat16)
    expected = gradients(model, DENSE)
    with Watching() as mode:
        got = gradients(model, DENSE)
    assert all(torch.equal(value, expected[name]) for name, value in got.items())
    for op in ("layer_norm", "attention", "gelu"):
        for name in (op, f"{op}_backward"):
            assert any(name in seen for seen in mode.seen), name


def replaced(model: UViT) -> None:
    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    old = model.blocks[1].qkv
    model.blocks[1].qkv = Doubled(old.in_features, old.out_features, dtype=old.weight.dtype)


def hooked(model: UViT) -> None:
    model.blocks[1].qkv.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize("change", [replaced, hooked])
def test_a_block_that_is_not_plain_is_left_to_its_parts(change, made):
    model = model_in(torch.float32)
    change(model)
    gradients(model, DENSE)
    assert made == [block for i, block in enumerate(model.blocks) if i != 1]


def test_norms_that_have_no_weight_or_bias_are_not_taken():
    model = model_in(torch.float32)
    x = torch.zeros(5, CONFIG.width)
    model.blocks[1].norm1 = torch.nn.LayerNorm(CONFIG.width, elementwise_affine=False)
    model.blocks[1].norm2 = torch.nn.LayerNorm(CONFIG.width, bias=False)
    assert [whole_block.takes(block, x) for block in model.blocks] == [True, False, True, True, True]
    model.blocks[1].norm1 = torch.nn.LayerNorm(CONFIG.width)
    assert not whole_block.takes(model.blocks[1], x)
    model.blocks[1].norm2 = torch.nn.LayerNorm(CONFIG.width)
    assert whole_block.takes(model.blocks[1], x)


@pytest.mark.parametrize("op", whole_block.OPS)
def test_another_implementation_is_left_to_the_parts(op, made):
    with maskdiff_kernels.using(**{op: "reference"}):
        gradients(model_in(torch.float32), DENSE)
    assert made == []


def test_left_to_the_parts_too(made):
    """Heads that the op does not take, float64, and a model that is not trained."""
    gradients(model_in(torch.float32, ModelConfig(image_size=32, width=64, blocks=3, heads=4)), DENSE)
    model = model_in(torch.float32)
    with torch.no_grad():
        model(*DENSE)
    gradients(model.double(), tuple(map(in_double, DENSE)))
    assert made == []


def test_a_second_derivative_is_an_error():
    model = model_in(torch.float32)
    loss = model(*DENSE).square().mean()
    with pytest.raises(RuntimeError, match="a block has no second derivative on a CPU: call backward without create_"):
        torch.autograd.grad(loss, model.blocks[0].fc1.weight, create_graph=True)


@pytest.mark.skipif(library.cpu_level() in ("baseline", "avx2"), reason="a processor without AVX-512")
@pytest.mark.parametrize("batch", [DENSE, RAGGED], ids=["equal", "ragged"])
def test_with_products_of_the_library(batch, monkeypatch):
    """Held to the fp64 rule: its sums have an order of their own."""
    model = model_in(torch.bfloat16)
    peers = gradients(model, batch)
    exact = by_parts(model_in(torch.float32).double(), tuple(map(in_double, batch)), monkeypatch)
    made = []
    for name in ("add_linear", "input_gradient", "weight_gradient"):
        run = getattr(product, name)
        monkeypatch.setattr(product, name, lambda *given, run=run, name=name: (made.append(name), run(*given))[1])
    monkeypatch.setattr(product, "takes", lambda *_: True)
    monkeypatch.setattr(product, "leaves_threads_idle", lambda *_: True)
    mine = gradients(model, batch)
    skips = sum(block.skip is not None for block in model.blocks)
    counts = {name: made.count(name) for name in set(made)}
    every = 4 * CONFIG.blocks + skips
    assert counts == {"add_linear": 2 * CONFIG.blocks, "input_gradient": every, "weight_gradient": every}
    for name, value in mine.items():
        error, peer = ((one.double() - exact[name]).norm() for one in (value, peers[name]))
        assert error <= 2 * peer + torch.finfo(torch.bfloat16).eps / 2 * exact[name].norm(), name


def test_which_products_are_the_library_s(monkeypatch):
    """Weights' gradients all; others where PyTorch's would leave threads idle."""
    asked = []
    monkeypatch.setattr(product, "takes", lambda *_: True)
    monkeypatch.setattr(product, "leaves_threads_idle", lambda *shape: (asked.append(shape), False)[1])
    monkeypatch.setattr(product, "weight_gradient", lambda grad, x: grad.t().mm(x))
    gradients(model_in(torch.bfloat16), DENSE)
    tokens, width, inner = 4 * 65, 64, 160
    forward = {(tokens, width, width), (tokens, width, inner)}  # proj, fc2
    backward = {(tokens, inner, width), (tokens, width, inner), (tokens, width, width), (tokens, width, 3 * width)}
    assert set(asked) == forward | backward | {(tokens, 2 * width, width)}
