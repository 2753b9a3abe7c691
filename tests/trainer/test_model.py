"""UViT and its layers against an independent plain U-ViT, in fp64 and by the fp64 rule; labels, starts, errors."""

import copy
import dataclasses
import itertools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import maskdiff_kernels
from maskdiff.baselines import PlainUViT
from maskdiff.errors import UserError
from maskdiff.layers import attention
from maskdiff.model import SIZES, ModelConfig, UViT, cast_products, patchify, unpatchify

BATCH = 4
LABELS = torch.tensor([[0, 1], [-1, 3], [-1, -1], [2, -1]])


def shaken(config: ModelConfig) -> UViT:
    """A model whose every parameter, biases and norms too, is away from what it starts as."""
    torch.manual_seed(0)
    model = UViT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def plain_twin(model: UViT) -> PlainUViT:
    plain = PlainUViT(model.config)
    plain.load_state_dict(model.state_dict())
    return plain


def inputs(config: ModelConfig, visible: int | None):
    generator = torch.Generator().manual_seed(1)
    count = visible or config.patches
    order = torch.rand(BATCH, config.patches, generator=generator).argsort(1)
    ids = order[:, :visible].sort(1).values if visible else None
    x = torch.randn(BATCH, count, config.patch_dim, generator=generator)
    return x, torch.tensor([0, 17, 500, 999]), LABELS if config.classes else None, ids


def gradients(model, out, upstream):
    model.zero_grad()
    out.backward(upstream.to(out.dtype))
    return {"output": out.detach()} | {name: p.grad for name, p in model.named_parameters()}


CONFIGS = {
    "plain": ModelConfig(image_size=32, width=64, blocks=5, heads=2),
    "labelled": ModelConfig(image_size=32, width=64, blocks=5, heads=2, classes=(3, 4), qkv_bias=True, time_mlp=True),
    "no positions": ModelConfig(image_size=32, width=64, blocks=3, heads=2, classes=(3, 4), position="none"),
    "one block": ModelConfig(image_size=8, channels=1, patch=2, width=32, blocks=1, heads=1, mlp_ratio=2.5),
}


@pytest.mark.parametrize("visible", [None, 7])
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_plain_model_in_fp64(name, visible):
    config = CONFIGS[name]
    model = shaken(config).double()
    plain = plain_twin(model).double()
    plain.load_state_dict(model.state_dict())
    x, t, label, ids = inputs(config, visible)
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).double()
    ours = gradients(model, model(x.double(), t, label, ids), upstream)
    theirs = gradients(plain, plain.forward_visible(x.double(), t, ids, label), upstream)
    check_equal(ours, theirs)


def check_equal(ours, theirs):
    """To the rounding of fp64."""
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        if key.endswith("qkv.bias"):  # a bias of the keys changes nothing: its gradient is zero but for rounding
            assert value.chunk(3)[1].abs().max() < 1e-12 * value.abs().max()
        torch.testing.assert_close(ours[key], value, rtol=0, atol=1e-12 * value.abs().max().item(), msg=key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("visible", [None, 26])
@pytest.mark.parametrize("name", ["plain", "labelled"])
def test_error_is_within_that_of_plain_pytorch(name, visible, dtype):
    """The fp64 rule: at most twice plain PyTorch's error in the same dtype (gradients three times), plus a rounding."""
    config = CONFIGS[name]
    model = shaken(config)
    exact, plain = plain_twin(model).double(), plain_twin(model).to(dtype)
    cast_products(model, dtype)
    x, t, label, ids = inputs(config, visible)
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    truth = gradients(exact, exact.forward_visible(x.double(), t, ids, label), upstream)
    ours = gradients(model, model(x, t, label, ids), upstream)
    theirs = gradients(plain, plain.forward_visible(x.to(dtype), t, ids, label), upstream)
    check_rule(ours, theirs, truth, dtype)


def check_rule(ours, theirs, truth, dtype):
    assert ours["output"].dtype == torch.float32
    assert ours["position"].dtype == torch.float32 and ours["head.weight"].dtype == dtype
    for key, value in truth.items():
        error, plain_error = ((got[key].double() - value).norm() for got in (ours, theirs))
        allowed = (2 if key == "output" else 3) * plain_error + torch.finfo(dtype).eps * value.norm()
        print(f"{key}: error {error:.3g}, plain PyTorch's {plain_error:.3g}")
        assert error <= allowed, key


def ragged_inputs(config: ModelConfig, counts):
    """As `inputs`, of samples that show so many patches: x [M, E], ids [M]; and where each sample's begin."""
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randperm(config.patches, generator=generator)[:count].sort().values for count in counts]
    x = torch.randn(sum(counts), config.patch_dim, generator=generator)
    cu_patches = torch.tensor([0, *counts]).cumsum(0).int()
    return x, torch.tensor([0, 17, 500, 999]), LABELS if config.classes else None, torch.cat(ids).int(), cu_patches


def one_by_one(model: PlainUViT, x, t, label, ids, cu_patches):
    outs = []
    for b, (first, end) in enumerate(itertools.pairwise(cu_patches.tolist())):
        own = None if label is None else label[b : b + 1]
        outs.append(model.forward_visible(x[None, first:end], t[b : b + 1], ids[None, first:end], own)[0])
    return torch.cat(outs)


@pytest.mark.parametrize("counts", [(16, 1, 7, 2), (5, 5, 5, 5)])
@pytest.mark.parametrize("name", CONFIGS)
def test_ragged_equals_the_plain_model_sample_by_sample_in_fp64(name, counts):
    model = shaken(CONFIGS[name]).double()
    plain = plain_twin(model).double()
    plain.load_state_dict(model.state_dict())
    x, *rest = ragged_inputs(model.config, counts)
    x, upstream = x.double(), torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).double()
    ours = gradients(model, model(x, *rest, max(counts)), upstream)
    check_equal(ours, gradients(plain, one_by_one(plain, x, *rest), upstream))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [1, 2, 4])  # heads of width 16 are the op's no more
@pytest.mark.parametrize("name", ["plain", "labelled"])
def test_error_of_ragged_is_within_that_of_plain_pytorch_sample_by_sample(name, heads, dtype):
    model = shaken(dataclasses.replace(CONFIGS[name], heads=heads))
    exact, plain = plain_twin(model).double(), plain_twin(model).to(dtype)
    cast_products(model, dtype)
    x, *rest = ragged_inputs(model.config, (64, 1, 7, 33))
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    truth = gradients(exact, one_by_one(exact, x.double(), *rest), upstream)
    ours = gradients(model, model(x, *rest, 64), upstream)
    check_rule(ours, gradients(plain, one_by_one(plain, x.to(dtype), *rest), upstream), truth, dtype)


@pytest.mark.parametrize("name", ["plain", "labelled"])
def test_ragged_with_equal_counts_is_the_equal_length_path(name):
    model = shaken(CONFIGS[name]).double()
    x, t, label, ids = inputs(model.config, 9)
    x, cu_patches = x.double(), torch.arange(BATCH + 1, dtype=torch.int32) * 9
    equal = gradients(model, model(x, t, label, ids), torch.ones_like(x))
    packed = model(x.flatten(0, 1), t, label, ids.flatten(), cu_patches, 9).view_as(x)
    check_equal(gradients(model, packed, torch.ones_like(x)), equal)


def explicit(qkv):
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [16, 32])
def test_attention(width, dtype, monkeypatch):
    """By the op, or by SDPA where the op does not take a head's width or dtype; by the fp64 rule either way."""
    taken = []
    op = maskdiff_kernels.attention
    monkeypatch.setattr(maskdiff_kernels, "attention", lambda qkv, *more: taken.append(qkv.shape) or op(qkv, *more))
    generator = torch.Generator().manual_seed(width)
    qkv = torch.randn(2, 27, 3, 2, width, generator=generator).to(dtype)
    upstream = torch.randn(2, 27, 2 * width, generator=generator).to(dtype)

    def both(function, dtype):
        leaf = qkv.to(dtype).requires_grad_()
        out = function(leaf)
        out.backward(upstream.to(dtype))
        return out.detach(), leaf.grad

    truth, plain, ours = both(explicit, torch.float64), both(explicit, dtype), both(attention, dtype)
    assert len(taken) == (width == 32 and dtype != torch.float64)
    for factor, exact, theirs, got in zip((2, 3), truth, plain, ours, strict=True):
        error, plain_error = (got.double() - exact).norm(), (theirs.double() - exact).norm()
        rounding = 1e-12 if dtype == torch.float64 else torch.finfo(dtype).eps
        assert error <= factor * plain_error + rounding * exact.norm()


def test_masked_with_all_patches_is_dense():
    config = CONFIGS["plain"]
    model = shaken(config)
    images = torch.randn(BATCH, 3, 32, 32)
    t = torch.tensor([3, 40, 500, 999])
    everything = torch.arange(config.patches, dtype=torch.int32).expand(BATCH, -1)
    whole = model.predict(images, t)
    torch.testing.assert_close(model.predict(images, t, keep_ids=everything), patchify(whole, 4), rtol=1e-5, atol=1e-5)


def test_predict_sees_nothing_of_hidden_patches_and_its_patches_in_any_order():
    config = CONFIGS["plain"]
    model = shaken(config)
    images, t = torch.randn(BATCH, 3, 32, 32), torch.full((BATCH,), 300)
    ids = torch.rand(BATCH, config.patches).argsort(1)[:, :9]
    seen = torch.zeros(BATCH, config.patches, 1).scatter(1, ids[..., None], 1.0).expand(-1, -1, config.patch_dim)
    other = torch.where(unpatchify(seen, 4, config.grid) > 0, images, torch.randn_like(images))
    out = model.predict(images, t, keep_ids=ids)
    assert torch.equal(model.predict(other, t, keep_ids=ids), out)
    torch.testing.assert_close(model.predict(images, t, keep_ids=ids.flip(1)), out.flip(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("position", ["none", "learned"])
def test_without_positions_patches_are_a_set(position):
    model = shaken(dataclasses.replace(CONFIGS["no positions"], position=position)).double()
    x, t, label, ids = inputs(model.config, 9)
    x, order = x.double(), torch.randperm(9, generator=torch.Generator().manual_seed(3))
    out = model(x, t, label, ids)
    equal = [
        torch.allclose(model(x[:, order], t, label, ids), out[:, order], rtol=0, atol=1e-12),
        torch.allclose(model(x, t, label, (ids + 1) % model.config.patches), out, rtol=0, atol=1e-12),
    ]
    assert equal == [position == "none"] * 2
    assert len(model.position) == 2 + (0 if position == "none" else model.config.patches)  # the label's, the time's
    assert len(model.resized(16).position) == 2 + (0 if position == "none" else 16)


def test_patchify_puts_values_in_the_order_row_column_channel():
    images = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6)
    patches = patchify(images, 2)
    assert patches.shape == (2, 6, 12)
    for b, down, across, row, column, channel in torch.cartesian_prod(*map(torch.arange, (2, 2, 3, 2, 2, 3))).tolist():
        pixel = images[b, channel, 2 * down + row, 2 * across + column]
        assert patches[b, 3 * down + across, (row * 2 + column) * 3 + channel] == pixel
    assert torch.equal(unpatchify(patches, 2, (2, 3)), images)


def test_labels_add_up_and_missing_ones_add_nothing():
    model = shaken(CONFIGS["labelled"])
    table = model.label_table
    embedded = model.embed_label(LABELS, BATCH)
    expected = [table[0] + table[3 + 1], table[3 + 3], model.unconditional, table[2]]
    torch.testing.assert_close(embedded, torch.stack(expected))
    x, t, _, _ = inputs(model.config, None)
    nothing = torch.full((BATCH, 2), -1)
    assert torch.equal(model(x, t, nothing), model(x, t))
    assert not torch.allclose(model(x, t, LABELS), model(x, t))


def test_one_attribute_takes_labels_without_a_second_dimension():
    model = shaken(ModelConfig(width=32, blocks=1, heads=1, classes=(5,)))
    images, t, label = torch.randn(2, 3, 32, 32), torch.tensor([1, 2]), torch.tensor([4, -1], dtype=torch.int32)
    assert torch.equal(model.predict(images, t, label), model.predict(images, t, label[:, None]))
    for wrong in (5, -2):
        with pytest.raises(ValueError, match=f"label {wrong} of attribute 0: it takes 0 to 4, or -1 for missing"):
            model.predict(images, t, torch.tensor([4, wrong]))


def test_timesteps_need_not_be_integers():
    model = shaken(CONFIGS["plain"])
    x, t, _, _ = inputs(model.config, None)
    assert torch.equal(model(x, t.float()), model(x, t))
    assert not torch.equal(model(x, t + 0.5), model(x, t))


def test_gradients_are_the_same_every_time():
    """Exact resume needs it: the backward of table[ids] is not, with several threads."""
    config = CONFIGS["labelled"]
    model = shaken(config)
    generator = torch.Generator().manual_seed(0)
    ids = torch.rand(64, config.patches, generator=generator).argsort(1)[:, :16]
    x, t = torch.randn(64, 16, config.patch_dim, generator=generator), torch.arange(64)
    label = LABELS.repeat(16, 1)
    ragged = x.flatten(0, 1), t, label, ids.flatten(), torch.arange(65, dtype=torch.int32) * 16, 16
    for given in ((x, t, label, ids), ragged):
        runs = [gradients(model, model(*given), torch.ones_like(given[0])) for _ in range(3)]
        for key, value in runs[0].items():
            assert all(torch.equal(run[key], value) for run in runs[1:]), key


@pytest.mark.parametrize("ragged", [False, True])
def test_compiles_as_one_graph(ragged):
    model = shaken(dataclasses.replace(CONFIGS["labelled"], blocks=3))
    cast_products(model, torch.bfloat16)
    given = (*ragged_inputs(model.config, (26, 1, 7, 64)), 64) if ragged else inputs(model.config, 26)
    eager = gradients(model, model(*given), torch.ones_like(given[0]))
    model.zero_grad(set_to_none=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = gradients(model, compiled(*given), torch.ones_like(given[0]))
    for key, value in eager.items():
        assert (got[key].float() - value.float()).norm() <= 2e-2 * value.norm(), key


@pytest.mark.parametrize("size, image, millions", [("small", 64, 44.29), ("small", 256, 46.26), ("base", 256, 102.4)])
def test_sizes_are_the_published_ones(size, image, millions):
    with torch.device("meta"):
        model = UViT(ModelConfig(image_size=image, **SIZES[size]))
    digits = len(str(millions).split(".")[1])
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, digits) == millions


@pytest.mark.parametrize("name", SIZES)
def test_every_size_can_be_made(name):
    with torch.device("meta"):
        config = UViT(ModelConfig(**SIZES[name])).config
    assert config.width // config.heads in (32, 64)


def test_authors_start():
    torch.manual_seed(0)
    model = UViT(ModelConfig(image_size=64, width=256, blocks=3, heads=4, classes=(1000,), init="authors"))
    for name, parameter in model.named_parameters():
        if name == "label_table":
            assert parameter.std().item() == pytest.approx(1.0, rel=0.02)
        elif name.endswith("bias"):
            assert not parameter.any()
        elif "norm" in name:
            assert (parameter == 1).all()
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.15 if parameter.dim() == 1 else 0.03), name


def test_fan_in_start_keeps_the_variance_and_quiets_residual_branches():
    torch.manual_seed(0)
    model = UViT(ModelConfig(image_size=64, width=256, blocks=3, heads=4))
    for name, factor in [("blocks.1.qkv", 1), ("blocks.2.skip", 1), ("blocks.0.proj", 0.3), ("head", 0.1)]:
        linear = model.get_submodule(name)
        assert linear.weight.std().item() == pytest.approx(factor * linear.in_features**-0.5, rel=0.03), name
    fc1, fc2 = model.blocks[0].fc1, model.blocks[0].fc2
    assert fc1.weight.std().item() == pytest.approx(256**-0.5, rel=0.03)
    assert fc2.weight.std().item() == pytest.approx(0.3 * 1024**-0.5, rel=0.03)
    position = model.position[1:].view(16, 16, 256)
    assert torch.equal(position[3, :, :128], position[3, :1, :128].expand(16, -1))  # the row, whatever the column
    assert torch.equal(position[:, 5, 128:], position[:1, 5, 128:].expand(16, -1))
    flat = position.view(256, 256)
    assert (torch.cdist(flat, flat) + 9 * torch.eye(256)).min() > 0.5  # no two patches alike


def test_starting_on_another_device_leaves_the_label_rows_usable():
    config = CONFIGS["labelled"]
    with torch.device("meta"):
        model = UViT(config)
    model.load_state_dict(copy.deepcopy(shaken(config).state_dict()), assign=True)
    assert model.label_first.tolist() == [0, 3]


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"image_size": 30}, "choose a patch size that divides 30"),
        ({"blocks": 4}, "must be odd"),
        ({"width": 100, "heads": 3}, "divisible by 4 and by heads = 3"),
        ({"width": 66, "heads": 1}, "divisible by 4"),
        ({"heads": 0}, "model.heads must be at least 1"),
        ({"init": "xavier"}, "'fan-in' or 'authors'"),
        ({"position": "sincos"}, "'learned' or 'none'"),
        ({"classes": (3, 0)}, "at least one value"),
    ],
)
def test_shapes_that_do_not_fit(settings, words):
    with pytest.raises(UserError, match=words):
        ModelConfig(**settings)


def test_wrong_inputs_are_named():
    model = UViT(CONFIGS["plain"])
    x, t, _, _ = inputs(model.config, None)
    with pytest.raises(UserError, match="without labels"):
        model(x, t, LABELS)
    with pytest.raises(ValueError, match="pass keep_ids"):
        model(x[:, :5], t)
    _, _, _, ids, cu_patches = ragged_inputs(model.config, (1, 2, 3, 4))
    for given in ((x[0, :10], cu_patches, None), (x[:, :10], cu_patches, 4), (x[0, :10], None, 4)):
        with pytest.raises(ValueError, match="beside keep_ids"):
            model(given[0], t, None, ids, *given[1:])
    with pytest.raises(ValueError, match=r"x_t must be \[B, 3, 32, 32\]"):
        model.predict(torch.randn(1, 3, 16, 16), t[:1])
    with pytest.raises(ValueError, match=r"labels must be \[B, 2\]"):
        UViT(CONFIGS["labelled"])(x, t, LABELS[:, :1])


def test_compiled_blocks_are_the_same_and_compiled_once_for_all_rates():
    config = dataclasses.replace(CONFIGS["plain"], blocks=7)
    model, compiled = shaken(config), shaken(config)
    forms = CompileCounterWithBackend("aot_eager")
    compiled.compile_blocks(forms)
    counts = []
    for visible in (None, 32, 7, 1):
        x, t, _, ids = inputs(config, visible)
        with maskdiff_kernels.using(gelu="reference"):  # as in compiled blocks: only rounding by fusing differs
            ours, theirs = (gradients(m, m(x, t, None, ids), x) for m in (compiled, model))
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value)
        counts.append(forms.frame_count)
    assert 0 < counts[0] < config.blocks  # blocks alike share a form
    assert counts == [counts[0]] * len(counts)
    assert list(compiled.state_dict()) == list(model.state_dict())


def test_sdpa_that_is_chosen_runs_once_a_step(monkeypatch):
    """As the op's implementation it would run again in the backward pass."""
    calls, real = [], torch.nn.functional.scaled_dot_product_attention

    def counted(*arguments, **options):
        calls.append(arguments[0].shape)
        return real(*arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    qkv = torch.randn(2, 5, 3, 2, 32, requires_grad=True)
    with maskdiff_kernels.using(attention="sdpa"):
        (ours,) = torch.autograd.grad(attention(qkv).square().sum(), qkv)
    assert len(calls) == 1
    (theirs,) = torch.autograd.grad(attention(qkv).square().sum(), qkv)
    assert len(calls) == 1  # another implementation
    torch.testing.assert_close(ours, theirs)
