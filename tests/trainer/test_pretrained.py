"""The authors' checkpoints, made here in their format, against a plain implementation of their model; damage; runs."""

import math
import os
import zipfile
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.functional import gelu, layer_norm, linear

import maskdiff
from maskdiff import checkpoint
from maskdiff.config import Config, OptimConfig, config_to_dict
from maskdiff.errors import UserError
from maskdiff.model import ModelConfig, UViT
from maskdiff.optim import FlatState
from maskdiff.pretrained import initial_weights, load_maskdm, load_run

WIDTH, HEADS, HALF, PATCH, SIDE = 128, 2, 2, 4, 4


def authors_state(seed: int, channels: int = 3, classes: int = 0, bias: bool = False, time_mlp: bool = False):
    """Tensors by the names and shapes of github.com/jiachenlei/maskdm, without any prefix."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=0.05):
        return scale * torch.randn(shape, generator=generator)

    def dense(name, outward, inward):
        return {f"{name}.weight": normal(outward, inward), f"{name}.bias": normal(outward)}

    def norm(name):
        return {f"{name}.weight": 1 + normal(WIDTH), f"{name}.bias": normal(WIDTH)}

    state = {
        "encoder.encoder_pos_embed": normal(1, (2 if classes else 1) + SIDE * SIDE, WIDTH, scale=0.5),
        "encoder.patch_embed.proj.weight": normal(WIDTH, channels, PATCH, PATCH, scale=0.2),
        "encoder.patch_embed.proj.bias": normal(WIDTH),
    }
    if classes:
        state["encoder.label_emb.weight"] = normal(classes, WIDTH, scale=1.0)
        state["encoder.uncond_embed"] = normal(1, WIDTH, scale=1.0)
    if time_mlp:
        state |= dense("encoder.time_embed.0", 4 * WIDTH, WIDTH) | dense("encoder.time_embed.2", WIDTH, 4 * WIDTH)
    names = [f"in_blocks.{i}" for i in range(HALF)] + ["mid_block"] + [f"out_blocks.{i}" for i in range(HALF)]
    for block in (f"encoder.{name}" for name in names):
        state |= norm(f"{block}.norm1") | norm(f"{block}.norm2")
        state[f"{block}.attn.qkv.weight"] = normal(3 * WIDTH, WIDTH)
        if bias:
            state |= {f"{block}.attn.q_bias": normal(WIDTH, scale=1.0), f"{block}.attn.v_bias": normal(WIDTH)}
        state |= dense(f"{block}.attn.proj", WIDTH, WIDTH)
        state |= dense(f"{block}.mlp.fc1", 4 * WIDTH, WIDTH) | dense(f"{block}.mlp.fc2", WIDTH, 4 * WIDTH)
        if "out_blocks" in block:
            state |= dense(f"{block}.skip_linear", WIDTH, 2 * WIDTH)
    return state | norm("encoder.norm") | dense("encoder_to_output", PATCH * PATCH * channels, WIDTH)


def authors_forward(state, x, t, y=None, hidden=None):
    """Their model on their tensors: x [B, C, H, W], hidden [B, n] bool -> [B, K, P*P*C]."""
    state = {name: tensor.double() for name, tensor in state.items()}
    tokens = F.conv2d(
        x.double(), state["encoder.patch_embed.proj.weight"], state["encoder.patch_embed.proj.bias"], stride=PATCH
    )
    tokens = tokens.flatten(2).transpose(1, 2)
    frequency = torch.exp(-math.log(10000) * torch.arange(0, WIDTH // 2, dtype=torch.float32) / (WIDTH // 2))
    angle = t[:, None].float() * frequency[None]
    token = torch.cat([torch.cos(angle), torch.sin(angle)], dim=-1).double()
    if "encoder.time_embed.0.weight" in state:
        token = linear(token, state["encoder.time_embed.0.weight"], state["encoder.time_embed.0.bias"])
        token = linear(F.silu(token), state["encoder.time_embed.2.weight"], state["encoder.time_embed.2.bias"])
    tokens = torch.cat([token[:, None], tokens], dim=1)
    if "encoder.label_emb.weight" in state:
        label = state["encoder.uncond_embed"].expand(len(x), -1) if y is None else state["encoder.label_emb.weight"][y]
        tokens = torch.cat([label[:, None], tokens], dim=1)
    extras = tokens.shape[1] - SIDE * SIDE
    tokens = tokens + state["encoder.encoder_pos_embed"]
    if hidden is not None:
        kept = torch.cat([torch.ones(len(x), extras, dtype=torch.bool), ~hidden], dim=1)
        tokens = tokens[kept].view(len(x), -1, WIDTH)

    def block(name, z, skip=None):
        at = {key.removeprefix(f"encoder.{name}."): tensor for key, tensor in state.items()}
        if skip is not None:
            z = linear(torch.cat([z, skip], dim=-1), at["skip_linear.weight"], at["skip_linear.bias"])
        qkv = linear(layer_norm(z, (WIDTH,), at["norm1.weight"], at["norm1.bias"]), at["attn.qkv.weight"])
        if "attn.q_bias" in at:
            qkv = qkv + torch.cat([at["attn.q_bias"], torch.zeros(WIDTH), at["attn.v_bias"]])
        q, k, v = qkv.view(*z.shape[:2], 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * (WIDTH // HEADS) ** -0.5).softmax(dim=-1)
        z = z + linear((weights @ v).transpose(1, 2).flatten(2), at["attn.proj.weight"], at["attn.proj.bias"])
        inner = linear(
            layer_norm(z, (WIDTH,), at["norm2.weight"], at["norm2.bias"]), at["mlp.fc1.weight"], at["mlp.fc1.bias"]
        )
        return z + linear(gelu(inner), at["mlp.fc2.weight"], at["mlp.fc2.bias"])

    skips = []
    for i in range(HALF):
        tokens = block(f"in_blocks.{i}", tokens)
        skips.append(tokens)
    tokens = block("mid_block", tokens)
    for i in range(HALF):
        tokens = block(f"out_blocks.{i}", tokens, skips.pop())
    tokens = layer_norm(tokens, (WIDTH,), state["encoder.norm.weight"], state["encoder.norm.bias"])
    return linear(tokens, state["encoder_to_output.weight"], state["encoder_to_output.bias"])[:, extras:]


def save(path, raw, averaged, **changes):
    """A file as their train_step.py writes it, schedule buffers and optimizer included."""
    buffers = {"betas": torch.linspace(1e-4, 0.02, 1000), "alphas_cumprod": torch.rand(1000)}
    average = {f"ema_model.model.{name}": tensor for name, tensor in averaged.items()}
    average |= {f"online_model.model.{name}": tensor for name, tensor in raw.items()}
    saved = {
        "step": 3,
        "model": {f"model.{name}": tensor for name, tensor in raw.items()} | buffers,
        "opt": {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(4)}}, "param_groups": [{"lr": 2e-4}]},
        "ema": average | {"initted": torch.tensor(True), "step": torch.tensor(3), "ema_model.betas": torch.rand(9)},
        "scaler": {"scale": 65536.0, "growth_interval": 2000},
    }
    torch.save(saved | changes, path)
    return path


KINDS = {
    "plain": {},
    "gray": {"channels": 1},
    "labelled": {"classes": 5, "bias": True, "time_mlp": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_equal_those_of_the_authors_model(tmp_path, kind):
    raw, ema = (authors_state(seed, **KINDS[kind]) for seed in (1, 2))
    path = save(tmp_path / "model-1.pt", raw, ema)
    generator = torch.Generator().manual_seed(0)
    channels = KINDS[kind].get("channels", 3)
    x = torch.randn(4, channels, 16, 16, generator=generator)
    t = torch.tensor([0, 7, 500, 999])
    y = torch.tensor([4, 0, 2, 2]) if kind == "labelled" else None
    visible = torch.rand(4, 16, generator=generator).argsort(1)[:, :5].sort(1).values
    hidden = torch.ones(4, 16, dtype=torch.bool).scatter(1, visible, False)
    for weights, state in (("model", raw), ("ema", ema)):
        model = maskdiff.load_maskdm(path, weights=weights)
        for labels in (y, None):
            whole = authors_forward(state, x, t, labels)
            image = whole.view(4, SIDE, SIDE, PATCH, PATCH, channels).permute(0, 5, 1, 3, 2, 4).reshape(x.shape)
            assert whole.abs().max() > 0.1
            torch.testing.assert_close(model.predict(x, t, labels), image, rtol=0, atol=1e-5, check_dtype=False)
            masked = authors_forward(state, x, t, labels, hidden)
            got = model.predict(x, t, labels, keep_ids=visible)
            torch.testing.assert_close(got, masked, rtol=0, atol=1e-5, check_dtype=False)


def test_loaded_models_train(tmp_path):
    model = load_maskdm(save(tmp_path / "m.pt", authors_state(1), authors_state(2)))
    model.predict(torch.randn(2, 3, 16, 16), torch.tensor([1, 2])).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    FlatState(model, OptimConfig())


def test_heads_can_be_told(tmp_path):
    path = save(tmp_path / "m.pt", authors_state(1), authors_state(2))
    assert (load_maskdm(path).config.heads, load_maskdm(path, heads=4).config.heads) == (2, 4)


class Payload:
    def __reduce__(self):
        return os.mkdir, ("run-by-the-pickle",)


def broken(path, what: str):
    raw = authors_state(1)
    if what == "missing key":
        del raw["encoder.out_blocks.1.mlp.fc2.bias"]
    elif what == "missing table":
        del raw["encoder.encoder_pos_embed"]
    elif what == "wrong shape":
        raw["encoder.in_blocks.0.attn.proj.weight"] = torch.zeros(WIDTH, WIDTH + 1)
    elif what == "odd table":
        raw["encoder.encoder_pos_embed"] = torch.zeros(1, 12, WIDTH)
    elif what == "extra key":
        raw["encoder.decoder.weight"] = torch.zeros(2)
    changes = {
        "code": {"scaler": Payload()},
        "no ema": {"ema": None},
        "another network": {"model": {"unet.conv.weight": torch.zeros(3)}},
    }.get(what, {})
    save(path, raw, authors_state(2), **changes)
    data = path.read_bytes()
    if what == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif what == "altered":
        middle = len(data) // 2
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    elif what == "text":
        path.write_text("a text that is no checkpoint\n")
    elif what == "empty":
        path.write_bytes(b"")
    elif what == "another zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("hello.txt", "hello")
    elif what == "a list":
        torch.save([1, 2, 3], path)
    elif what == "bare weights":
        torch.save(raw, path)


@pytest.mark.parametrize(
    "what, words",
    [
        ("truncated", "damaged"),
        ("altered", "altered"),
        ("text", "no PyTorch checkpoint"),
        ("empty", "no PyTorch checkpoint"),
        ("another zip", "no PyTorch checkpoint"),
        ("code", "could run code"),
        ("a list", "a MaskDM checkpoint is a dict"),
        ("bare weights", "holds no 'model' weights"),
        ("another network", "holds no tensors named model"),
        ("missing key", "lacks"),
        ("missing table", "lacks 'encoder.encoder_pos_embed'"),
        ("wrong shape", "is \\[128, 129\\]"),
        ("odd table", "no square image"),
        ("extra key", "which no MaskDM U-ViT has"),
    ],
)
def test_damaged_and_foreign_files(tmp_path, monkeypatch, what, words):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model-1.pt"
    broken(path, what)
    with pytest.raises(UserError, match=words) as caught:
        load_maskdm(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert not (tmp_path / "run-by-the-pickle").exists()


def test_code_in_an_old_style_pickle_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Payload()}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match="could run code"):
        load_maskdm(tmp_path / "old.pt")
    assert not (tmp_path / "run-by-the-pickle").exists()


def test_other_mistakes(tmp_path):
    path = tmp_path / "m.pt"
    with pytest.raises(UserError, match="no such file"):
        load_maskdm(path)
    broken(path, "no ema")
    with pytest.raises(UserError, match="no 'ema' weights"):
        load_maskdm(path, weights="ema")
    with pytest.raises(UserError, match="'model' or 'ema'"):
        load_maskdm(path, weights="raw")
    with pytest.raises(UserError, match="divisible"):
        load_maskdm(path, heads=3)


@pytest.fixture
def run(tmp_path):
    """The folder of a run whose EMA differs from its weights."""
    config = Config(model=ModelConfig(width=32, blocks=3, heads=1, classes=(3,)))
    torch.manual_seed(0)
    state = FlatState(UViT(config.model), OptimConfig())
    state.ema.normal_()
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    checkpoint.save(folder, 7, state.tensors(), {"sample": 56, "config": config_to_dict(config)}, keep=1)
    return folder, state


def test_load_reads_runs(run):
    folder, state = run
    x, t, label = torch.randn(2, 3, 32, 32), torch.tensor([1, 900]), torch.tensor([2, -1])
    assert torch.equal(maskdiff.load(folder, weights="raw").predict(x, t, label), state.model.predict(x, t, label))
    with state.ema_weights() as averaged:
        assert torch.equal(maskdiff.load(folder).predict(x, t, label), averaged.predict(x, t, label))
    loaded = load_run(folder / "checkpoints" / "step-00000007")
    assert loaded.config.model.classes == (3,) and loaded.meta["step"] == 7
    assert loaded.diffusion.config == loaded.config.diffusion
    with pytest.raises(UserError, match="no run"):
        maskdiff.load(folder.parent)
    with pytest.raises(UserError, match="has no ema2 weights: it was trained without optim.ema2"):
        maskdiff.load(folder, weights="ema2")
    with pytest.raises(UserError, match="weights are 'ema', 'ema2' or 'raw', not 'ema3'"):
        maskdiff.load(folder, weights="ema3")


def test_the_second_average_of_a_run(tmp_path):
    config = Config(model=ModelConfig(width=32, blocks=3, heads=1), optim=OptimConfig(ema2=0.5))
    state = FlatState(UViT(config.model), config.optim)
    state.ema2.normal_()
    (tmp_path / "config.json").write_text("{}")
    checkpoint.save(tmp_path, 7, state.tensors(), {"sample": 56, "config": config_to_dict(config)}, keep=1)
    loaded = dict(maskdiff.load(tmp_path, weights="ema2").named_parameters())
    for segment in state.segments:
        assert torch.equal(loaded[segment.name], segment.view(state.ema2))


def test_initial_weights_come_from_runs_and_from_files(run, tmp_path):
    folder, state = run
    weights = initial_weights(folder, "raw", state.model.config)
    assert all(torch.equal(weights[name], p) for name, p in state.model.named_parameters())
    path = save(tmp_path / "m.pt", authors_state(1), authors_state(2))
    config = ModelConfig(image_size=16, width=WIDTH, blocks=5, heads=2)
    for which, seed in (("raw", 1), ("ema", 2)):
        weights = initial_weights(path, which, config)
        assert torch.equal(weights["position"], authors_state(seed)["encoder.encoder_pos_embed"][0])
        UViT(config).load_state_dict(weights)
    with pytest.raises(UserError, match="width is 128, not 64, heads is 2, not 1; set"):
        initial_weights(path, "raw", ModelConfig(image_size=16, width=64, blocks=5, heads=1))
    with pytest.raises(UserError, match="its heads is 2, not 4"):
        initial_weights(path, "raw", ModelConfig(image_size=16, width=WIDTH, blocks=5, heads=4))
    with pytest.raises(UserError, match="classes is .3,., not .."):
        initial_weights(folder, "ema", ModelConfig(width=32, blocks=3, heads=1))


def test_initial_weights_of_another_image_size_are_interpolated(run):
    folder, state = run
    config, said = state.model.config, []
    larger = replace(config, image_size=48)
    weights = initial_weights(folder, "raw", larger, said.append)
    assert said == [f"{folder}: positions interpolated from 32 to 48 pixels"]
    expected = state.model.resized(48).state_dict()
    assert weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in expected)
    UViT(larger).load_state_dict(weights)
    with pytest.raises(UserError, match=r"patch is 4, not 8; set") as caught:
        initial_weights(folder, "raw", replace(larger, patch=8), said.append)
    assert "image_size" not in str(caught.value) and len(said) == 1
    with pytest.raises(UserError, match="position is learned, not none; set"):
        initial_weights(folder, "raw", replace(config, position="none"))


def test_weights_without_positions_fit_any_image_size(tmp_path):
    config = Config(model=ModelConfig(width=32, blocks=3, heads=1, position="none"))
    state = FlatState(UViT(config.model), OptimConfig())
    (tmp_path / "config.json").write_text("{}")
    checkpoint.save(tmp_path, 7, state.tensors(), {"sample": 56, "config": config_to_dict(config)}, keep=1)
    weights = initial_weights(tmp_path, "raw", replace(config.model, image_size=64))
    assert all(torch.equal(weights[name], p) for name, p in state.model.named_parameters())
