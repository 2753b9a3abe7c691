"""Trained weights from elsewhere: our own runs, and checkpoints of the authors' code (github.com/jiachenlei/maskdm)."""

import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .config import Config
from .diffusion import Diffusion
from .errors import UserError
from .model import ModelConfig, UViT

PREFIXES = {"model": "model.", "ema": "ema_model.model."}
HEAD_DIM = 64  # of all published sizes; a state dict does not tell


class LoadedRun(NamedTuple):
    """A model out of a run's folder, with what sampling needs beside it."""

    model: UViT  # float32, on the CPU
    diffusion: Diffusion
    config: Config
    meta: dict[str, Any]  # the checkpoint's: step, environment, ...


def load(run: str | os.PathLike, weights: str = "ema") -> UViT:
    """Reads a trained model from a run's folder, or from one of its checkpoint folders.

    Args:
        run: the folder that --out named, or RUN/checkpoints/step-....
        weights: "ema", "ema2" for the second average of a run that has one, or "raw" for the weights as trained.

    Returns the model in float32 on the CPU. Raises UserError for what is no run, or damaged.
    """
    return load_run(run, weights).model


def load_run(run: str | os.PathLike, weights: str = "ema") -> LoadedRun:
    """As `load`, and returns what the run's configuration says about sampling, too."""
    from . import checkpoint

    config, state, meta = checkpoint.load_weights(run, weights)
    return LoadedRun(_build(config.model, state, os.fspath(run)), Diffusion(config.diffusion), config, meta)


def load_maskdm(path: str | os.PathLike, weights: str = "model", heads: int | None = None) -> UViT:
    """Reads a checkpoint of MaskDM's own code: torch.save of {step, model, ema, opt, scaler}.

    Args:
        path: the .pt file.
        weights: "model" for the weights as trained, "ema" for their moving average.
        heads: attention heads; the file does not tell. None: of 64 channels each, as all published sizes have.

    Returns the model in float32 on the CPU: its predictions equal the original's. Nothing in the file is executed.
    Raises UserError for a file that is damaged, holds code, or is of another kind or shape.
    """
    if weights not in PREFIXES:
        raise UserError(f"weights must be 'model' or 'ema', got {weights!r}")
    config, state = _translate(_encoder_state(_read(path), weights, path), heads, path)
    return _build(config, state, os.fspath(path))


def check_initial(path: str | os.PathLike) -> None:
    """Raises UserError where --init names nothing."""
    if not Path(path).exists():
        raise UserError(
            f"init is {os.fspath(path)}: there is no such run, checkpoint or .pt file; name one with --init, "
            "or start from new weights with --init none"
        )


def initial_weights(
    path: str | os.PathLike,
    weights: str,  # "raw" | "ema" | "ema2"
    config: ModelConfig,
    say: Callable[[str], None] = print,  # is told where they had to be fitted to the size of the images
) -> dict[str, Tensor]:
    """The weights that --init names, for a model of `config`: a run or checkpoint folder, or a file of MaskDM's.

    Where they were trained at another image size, their table of positions is interpolated to the model's. Raises
    UserError where they are of another shape than the model: it says which of its settings differ.
    """
    check_initial(path)
    if Path(path).is_dir():
        model = load(path, weights)
    else:
        # The model's own number of heads only where the published rule gives none: a wrong one would go unnoticed.
        heads = config.heads if config.width % HEAD_DIM else None
        model = load_maskdm(path, "model" if weights == "raw" else weights, heads)
    found = model.config
    compared = "channels patch width blocks heads mlp_ratio qkv_bias time_mlp classes position".split()
    differing = [name for name in compared if getattr(found, name) != getattr(config, name)]
    if differing:
        pairs = ", ".join(f"{name} is {getattr(found, name)}, not {getattr(config, name)}" for name in differing)
        raise UserError(f"{path} does not fit the model to be trained: its {pairs}; set model.* to match it")
    if found.image_size != config.image_size:
        model = model.resized(config.image_size)
        sizes = f"{found.image_size} to {config.image_size} pixels"
        what = "has no positions: taken" if found.position == "none" else "positions interpolated"
        say(f"{path}: {what} from {sizes}")
    return model.state_dict()


def _build(config: ModelConfig, state: dict[str, Tensor], path: str) -> UViT:
    with torch.device("meta"):
        model = UViT(config)
    wanted = model.state_dict()
    if odd := sorted(wanted.keys() ^ state.keys()):
        what = "lacks" if odd[0] in wanted else "holds, unlike the model,"
        raise UserError(f"{path} {what} {odd[0]!r}" + (f" and {len(odd) - 1} more" if odd[1:] else ""))
    for name, tensor in wanted.items():
        if state[name].shape != tensor.shape:
            raise UserError(f"{path}: {name!r} is {list(state[name].shape)}, the model's is {list(tensor.shape)}")
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    return model.requires_grad_(True)


def _read(path: str | os.PathLike) -> Any:
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; give the .pt file of a MaskDM checkpoint")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            try:
                damaged = archive.testzip()  # reads all and compares the checksums: torch.load does not
            except (zipfile.BadZipFile, OSError) as error:
                raise UserError(f"{path} is damaged ({error}): fetch it again") from None
        if damaged is not None:
            raise UserError(f"{path} is truncated or was altered: {damaged} fails its checksum; fetch it again")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if found := re.search(r"(?:Unsupported|GLOBAL) (?:global: GLOBAL )?([\w.]+)", str(error)):
            raise UserError(
                f"{path} holds more than tensors ({found[1]}): it could run code when loaded and is refused; "
                "save it again with tensors, numbers and strings only"
            ) from None
        raise UserError(f"{path} is no PyTorch checkpoint, or it is damaged: fetch it again") from None
    except (RuntimeError, EOFError, ValueError, KeyError, AttributeError, IndexError, TypeError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is no PyTorch checkpoint, or it is damaged ({first[:120]})") from None


def _encoder_state(saved: Any, weights: str, path: str | os.PathLike) -> dict[str, Tensor]:
    """The network's tensors by the authors' names, the prefix of the diffusion wrapper taken off."""
    expected = "a MaskDM checkpoint is a dict of step, model, ema, opt, scaler"
    if not isinstance(saved, dict) or not isinstance(saved.get(weights), dict):
        found = f"a dict of {', '.join(map(str, list(saved)[:6]))}" if isinstance(saved, dict) else type(saved).__name__
        raise UserError(f"{path} holds no {weights!r} weights ({expected}; this is {found})")
    prefix = PREFIXES[weights]
    state = {
        name.removeprefix(prefix): tensor
        for name, tensor in saved[weights].items()
        if isinstance(name, str) and name.startswith(prefix) and isinstance(tensor, Tensor)
    }
    if not state:
        raise UserError(f"{path} holds no tensors named {prefix}*: {expected}")
    return state


_BLOCK = re.compile(r"encoder\.(in_blocks\.(\d+)|mid_block|out_blocks\.(\d+))\.(.+)")
_PARTS = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.qkv": "qkv",
    "attn.proj": "proj",
    "mlp.fc1": "fc1",
    "mlp.fc2": "fc2",
    "skip_linear": "skip",
}
_OUTSIDE = {
    "encoder.norm": "norm",
    "encoder_to_output": "head",
    "encoder.time_embed.0": "time_embed.0",
    "encoder.time_embed.2": "time_embed.2",
}


def _translate(
    theirs: dict[str, Tensor], heads: int | None, path: str | os.PathLike
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Their names, shapes and order of values to ours, and the shape of the model they belong to."""

    def get(name: str, *dims: int) -> Tensor:
        if name not in theirs:
            raise UserError(f"{path} lacks {name!r}: it is no MaskDM checkpoint of a U-ViT, or not a whole one")
        if theirs[name].dim() not in dims:
            raise UserError(f"{path}: {name!r} has the shape {list(theirs[name].shape)}, not {dims[0]} dimensions")
        return theirs[name]

    kernel = get("encoder.patch_embed.proj.weight", 4)  # [D, C, P, P]
    position = get("encoder.encoder_pos_embed", 3)  # [1, extras + n, D]
    hidden = get("encoder.mid_block.mlp.fc1.weight", 2)
    width, channels, patch, _ = kernel.shape
    labelled = "encoder.label_emb.weight" in theirs
    patches = position.shape[1] - (2 if labelled else 1)
    side = round(max(patches, 0) ** 0.5)
    if side < 1 or side * side != patches:
        raise UserError(f"{path}: its position table of {position.shape[1]} rows is of no square image")
    if heads is None and width % HEAD_DIM:
        raise UserError(f"{path}: its width, {width}, is no multiple of {HEAD_DIM}: say how many heads it has (heads=)")
    half = 1 + max((int(found[2] or -1) for name in theirs if (found := _BLOCK.fullmatch(name))), default=-1)
    config = ModelConfig(
        image_size=side * patch,
        channels=channels,
        patch=patch,
        width=width,
        blocks=2 * half + 1,
        heads=heads or width // HEAD_DIM,
        mlp_ratio=hidden.shape[0] / width,
        qkv_bias="encoder.mid_block.attn.q_bias" in theirs,
        time_mlp="encoder.time_embed.0.weight" in theirs,
        classes=(get("encoder.label_emb.weight", 2).shape[0],) if labelled else (),
        init="authors",
    )
    ours = {
        "patch_embed.weight": kernel.permute(0, 2, 3, 1).reshape(width, -1),  # values as (row, column, channel)
        "patch_embed.bias": get("encoder.patch_embed.proj.bias", 1),
        "position": position[0],  # the label's row, the time token's, the patches'
    }
    used = {"encoder.patch_embed.proj.weight", "encoder.patch_embed.proj.bias", "encoder.encoder_pos_embed"}
    if labelled:
        ours["label_table"] = theirs["encoder.label_emb.weight"]
        ours["unconditional"] = get("encoder.uncond_embed", 2)[0]
        used |= {"encoder.label_emb.weight", "encoder.uncond_embed"}
    for name, tensor in theirs.items():
        stem, _, kind = name.rpartition(".")
        if found := _BLOCK.fullmatch(name):
            index = half if found[1] == "mid_block" else int(found[2]) if found[2] else half + 1 + int(found[3])
            part, _, kind = found[4].rpartition(".")
            if (part, kind) == ("attn", "q_bias"):  # their keys have no bias: softmax would cancel it
                value = get(name.removesuffix("q_bias") + "v_bias", 1)
                ours[f"blocks.{index}.qkv.bias"] = torch.cat([tensor, torch.zeros_like(tensor), value])
            elif part in _PARTS:
                ours[f"blocks.{index}.{_PARTS[part]}.{kind}"] = tensor
            elif (part, kind) != ("attn", "v_bias"):
                raise UserError(f"{path} holds {name!r}, which no MaskDM U-ViT has")
        elif stem in _OUTSIDE:
            ours[f"{_OUTSIDE[stem]}.{kind}"] = tensor
        elif name not in used:
            raise UserError(f"{path} holds {name!r}, which no MaskDM U-ViT has")
    return config, ours
