"""Checkpoints: safetensors plus JSON, hashed, written whole or not at all."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .config import Config, config_from_dict
from .durable import sync
from .errors import UserError

FORMAT = 1
STATE, META = "state.safetensors", "meta.json"


def directory(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def listing(run: Path) -> list[Path]:
    """The run's finished checkpoints, oldest first."""
    return sorted((run / "checkpoints").glob("step-*"))


def save(run: Path, step: int, tensors: dict[str, Tensor], meta: dict[str, Any], keep: int) -> Path:
    """Writes a checkpoint and then drops all but the newest `keep`.

    It is written beside its place and renamed when it is whole and on disk: a kill or a full disk at any moment
    leaves the earlier ones as they were. OSError says why the disk refused.
    """
    target = directory(run, step)
    partial = target.with_name(f".partial-{target.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        try:
            save_file({name: tensor.detach().cpu() for name, tensor in tensors.items()}, partial / STATE)
        except SafetensorError as error:  # safetensors wraps the disk's refusal in a type of its own
            raise OSError(None, f"checkpoint not written, the earlier ones are kept ({error})", str(target)) from error
        meta = {"format": FORMAT, "step": step, **meta, "files": {STATE: _hash(partial / STATE)}}
        meta["hash"] = _meta_hash(meta)
        (partial / META).write_text(json.dumps(meta, indent=1))
        for name in (STATE, META, "."):
            sync(partial / name)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        sync(target.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for old in listing(run)[:-keep] if keep > 0 else []:
        shutil.rmtree(old)
    return target


def read_meta(path: Path) -> dict[str, Any]:
    """What a checkpoint folder says of itself, checked. Raises UserError that names what is wrong."""
    meta_path = path / META
    try:
        meta = json.loads(meta_path.read_text())
        if not isinstance(meta, dict) or not isinstance(meta.get("files"), dict):
            raise ValueError
    except FileNotFoundError:
        raise UserError(f"{path} is no checkpoint: it has no {META}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{meta_path} is damaged: it is not JSON of a checkpoint; use an earlier checkpoint") from None
    if meta.get("format") != FORMAT:
        raise UserError(f"{meta_path} has format {meta.get('format')!r}; this version of maskdiff reads {FORMAT}")
    if meta.get("hash") != _meta_hash(meta):
        raise UserError(f"{meta_path} was altered after it was written; use an earlier checkpoint")
    return meta


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads a checkpoint folder and checks it against its hashes. Raises UserError that names what is wrong."""
    meta, state_path = read_meta(path), path / STATE
    if not state_path.exists():
        raise UserError(f"{state_path} is missing; use an earlier checkpoint")
    if _hash(state_path) != meta["files"].get(STATE):
        raise UserError(f"{state_path} was truncated or altered after it was written; use an earlier checkpoint")
    try:
        return load_file(state_path), meta
    except SafetensorError as error:
        raise UserError(f"{state_path} cannot be read ({error}); use an earlier checkpoint") from None


def latest(run: Path) -> Path:
    """The newest checkpoint of a run, or the checkpoint itself if `run` is one. Raises UserError without one."""
    if (run / META).exists():
        return run
    if not (run / "config.json").exists():
        raise UserError(f"{run} is no run: it has no config.json; give the folder that --out named")
    found = listing(run)
    if not found:
        raise UserError(f"{run} has no checkpoint yet; it can only be started again with --resume {run}")
    return found[-1]


def load_weights(run: str | os.PathLike, weights: str = "ema") -> tuple[Config, dict[str, Tensor], dict[str, Any]]:
    """Reads a trained model from a run, or from one of its checkpoint folders.

    Args:
        run: folder of the run or of a checkpoint.
        weights: "ema", "ema2" for the second average of a run that has one, or "raw" for the weights as trained.

    Returns (configuration of the run, float32 tensors by parameter name, the checkpoint's meta data).
    Raises UserError for what is no run, or damaged, or has no second average.
    """
    prefixes = {"ema": "ema.", "ema2": "ema2.", "raw": "master."}
    if weights not in prefixes:
        raise UserError(f"weights are 'ema', 'ema2' or 'raw', not {weights!r}")
    tensors, meta = load(latest(Path(run)))
    prefix = prefixes[weights]
    named = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    if not named:
        raise UserError(f"{run} has no {weights} weights: it was trained without optim.{weights}")
    config = meta.get("config")
    if not isinstance(config, dict):
        raise UserError(f"{run} has a checkpoint without a configuration; use an earlier checkpoint")
    return config_from_dict(config, source=str(run)), named, meta


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _meta_hash(meta: dict[str, Any]) -> str:
    rest = {key: value for key, value in meta.items() if key != "hash"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
