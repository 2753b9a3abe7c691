"""The configuration of a run: typed, checked in one place, and written to JSON and read back strictly."""

import dataclasses
import json
import math
import sys
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from maskdiff_kernels import PowerEma

from .diffusion import DiffusionConfig
from .errors import UserError, nearest
from .model import ModelConfig
from .sampling import SamplerName
from .stages import Stage, fit, micro_batch, minutes_of, parse_stages, templates

__all__ = ["Config", "DataConfig", "DiffusionConfig", "ModelConfig", "OptimConfig", "Stage"]


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and the moving averages of the weights."""

    betas: tuple[float, float] = (0.9, 0.99)
    """decay of AdamW's first and second moment"""
    eps: float = 1e-8
    """AdamW's epsilon"""
    weight_decay: float = 0.01
    """AdamW's weight decay"""
    decay_all: bool = False
    """decays every parameter, as the paper does, not matrices alone"""
    ema: float | str = 0.999
    """decay of the weights' moving average, or power:W for a power function of relative width W"""
    ema2: float | str | None = None
    """the same of a second average; none: there is one alone"""
    ema_every: int = 1
    """updates from one change of the averages to the next: 10 leaves them alone at nine of ten"""
    optimizer: Literal["auto", "cpp", "cuda", "torch", "apex", "reference"] = "auto"
    """what computes the update"""
    overlap: bool = False
    """updates a block as soon as the backward pass has left its gradients: less memory; on a GPU beside it; no clip"""

    def averages(self) -> list[float | PowerEma]:
        """The decay of `ema` and, where there is one, of `ema2`. Raises UserError for what is none."""
        given = {"optim.ema": self.ema, "optim.ema2": self.ema2}
        return [_average(key, value) for key, value in given.items() if value is not None]


def _average(key: str, value: float | str) -> float | PowerEma:
    try:
        if isinstance(value, str) and value.startswith("power:"):
            return PowerEma.of_width(float(value.removeprefix("power:")))
        if 0 <= (decay := float(value)) < 1:
            return decay
    except ValueError:
        pass
    widest = f"{12**-0.5:.4f}"
    raise UserError(
        f"{key} is {value}; give a decay from 0 to below 1, or power:W, W above 0 and at most {widest}, as power:0.1"
    )


@dataclass(frozen=True)
class DataConfig:
    """Images, and what is done to them."""

    path: str = "faces:20000"
    """a packed set, a folder, zip or tar of images, Parquet, .npy, .npz, hf:NAME, or faces:N, faces-b:N, digits"""
    labels: bool = False
    """trains with the data's labels"""
    label_dropout: float = 0.1
    """share of samples that are trained without their label, for guidance"""
    flip: float = 0.0
    """share of samples that are mirrored left to right"""
    background: str = "white"
    """colour behind transparent images"""
    crop: str = "centre"
    """part of an image that is kept: centre, centre:SIDE, LEFT,TOP,SIDE, celeba64, celeba64-140, celeba128"""
    subset: str | None = None
    """so many of the images, 3000 or 10%, always the same; none: all"""
    heldout: float = 0.02
    """share of the images that is held out of training"""
    reading: Literal["auto", "device", "mapped", "ahead"] = "auto"
    """device: copies the images there; mapped: reads the memory map; ahead: a thread reads it for steps to come"""


@dataclass(frozen=True)
class Config:
    """All of a run. The defaults here are plain; `presets.py` holds what is worth running."""

    preset: str = "faces32"
    """what the rest started from; --preset list describes them"""
    out: str = ""
    """new folder of the run (default: runs/PRESET, numbered)"""
    seed: int = 0
    """seed of everything random"""
    max_steps: int | None = None
    """ends the run after so many steps in all; stage lengths stay"""
    time_budget: float | str | None = None
    """training time in all, 2h, 30m, 90s or minutes, which stages share in proportion to their own; none: their own"""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 where the device has it natively, unless a CPU multiplies fp32 1.25x faster; else fp32"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to train"""
    compile: bool = False
    """compiles each block by torch.compile, once for all mask rates; needs a C++ compiler, on a GPU Triton"""
    recompute: bool = False
    """keeps each block's input alone for the backward pass, which computes the rest again: less memory, more time"""
    capture: Literal["auto", "off"] = "auto"
    """auto: on a GPU, steps are CUDA graphs where they can be; off: each of their launches is the host's"""
    init: str | None = None
    """starts from these weights: a run, a checkpoint of one, or a .pt file of MaskDM; at any image size"""
    init_weights: Literal["raw", "ema", "ema2"] = "raw"
    """which of the weights in --init"""
    checkpoint_every: int = 1000
    """steps between checkpoints; 0: at the end only"""
    keep_checkpoints: int = 2
    """how many checkpoints are kept"""
    heldout_every: int = 200
    """steps between measurements of the held-out loss; 0: never"""
    sample_every: int = 500
    """steps between sample grids; 0: at the end only"""
    sample_count: int = 36
    """images of a sample grid; 0: no grids"""
    sample_steps: int = 25
    """evaluations of the model for an image of a sample grid"""
    sampler: SamplerName = "ddim"
    """what draws the sample grids"""
    eta: float = 0.0
    """fresh noise a step of the sampler ddim: 0 none, 1 as much as ddpm"""
    guidance: float = 1.0
    """classifier-free guidance of labelled models; 1: none"""
    probe_steps: int = 5
    """discarded steps that measure a stage's speed-up over dense; 0: one that measures its own time alone"""
    log: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """where figures and sample grids go beside metrics.jsonl: tensorboard, wandb, both"""
    log_every: int = 10
    """steps between the figures that --log gets; metrics.jsonl has every step"""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    stages: tuple[Stage, ...] = ()
    """the parts of the run, in order"""


# ---- to JSON and back


def config_to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain dicts, lists, numbers, strings, booleans and None."""
    return {key: _plain(value) for key, value in dataclasses.asdict(config).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """{"optim.ema": 0.999, "stages.0.mask": "dense", ...}: a configuration with a dotted name for each key."""
    if isinstance(values, dict):
        items = list(values.items())
    elif isinstance(values, list) and values and isinstance(values[0], dict):
        items = [(str(number), item) for number, item in enumerate(values)]
    else:
        return {prefix[:-1]: values}
    return {key: value for name, item in items for key, value in flatten(item, f"{prefix}{name}.").items()}


def config_from_dict(values: Mapping[str, Any], base: Config | None = None, source: str = "configuration") -> Config:
    """The configuration that `values` describes, over `base` where it says nothing.

    `stages` is a list, or the text that --stages takes. Raises UserError that names `source` and the key: for an
    unknown key with the nearest name, for a value of another type with what it got and what it takes.
    """
    return _dataclass(Config, values, Config() if base is None else base, "", source)


def load_config(path: str | Path, base: Config | None = None) -> Config:
    """Reads a .json or .toml file (see `config_from_dict`). Raises UserError where it is absent or not readable."""
    return config_from_dict(read_values(path), base, str(path))


def read_values(path: str | Path) -> dict[str, Any]:
    """The keys of a .json or .toml file as they stand there."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"configuration {str(path)!r} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UserError(f"configuration {str(path)!r} is not text; give a .json or .toml file") from None
    try:
        values = _toml(text, path) if path.suffix == ".toml" else json.loads(text)
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"configuration {str(path)!r} is not valid {path.suffix[1:] or 'JSON'}: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"configuration {str(path)!r} holds a {type(values).__name__}; it takes an object of keys")
    return values


def _toml(text: str, path: Path) -> dict[str, Any]:
    if sys.version_info < (3, 11):
        raise UserError(f"configuration {str(path)!r}: TOML needs Python 3.11 or newer; write it as JSON")
    import tomllib

    return tomllib.loads(text)


T = TypeVar("T")


def _dataclass(kind: type[T], values: Any, base: T, prefix: str, source: str) -> T:
    if not isinstance(values, Mapping):
        raise UserError(f"{source}: {prefix or 'it'} got {_shown(values)}; it takes an object of keys")
    hints = get_type_hints(kind)
    changes: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        if key not in hints:
            raise UserError(f"{source}: no key {name!r}; {nearest(str(key), list(hints), prefix)}")
        if name == "stages" and isinstance(value, str):
            changes[key] = parse_stages(value, *templates(getattr(base, key)))
        else:
            changes[key] = _value(hints[key], value, getattr(base, key), name, source)
    return dataclasses.replace(base, **changes)  # type: ignore[type-var]


def _value(hint: Any, value: Any, base: Any, name: str, source: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _dataclass(hint, value, base, name, source)
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        for inner in args:
            if inner is type(None) or value is None:
                continue
            try:
                return _value(inner, value, base, name, source)
            except _WrongType:
                pass
    elif origin is Literal:
        if value in args and not isinstance(value, bool):
            return value
    elif origin is tuple:
        if isinstance(value, (list, tuple)):
            if args[-1] is Ellipsis:
                default = Stage() if args[0] is Stage else None
                return tuple(_value(args[0], item, default, f"{name}.{i}", source) for i, item in enumerate(value))
            if len(args) == len(value):
                pairs = enumerate(zip(args, value, strict=True))
                return tuple(_value(arg, item, None, f"{name}.{i}", source) for i, (arg, item) in pairs)
    elif hint is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if number and abs(value) <= sys.float_info.max:  # no infinity, no NaN, no whole number beyond all floats
            return float(value)
    elif hint is int:
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63:
            return value
    elif isinstance(value, hint):
        return value
    raise _WrongType(f"{source}: {name} got {_shown(value)}; it takes {describe(hint)}")


class _WrongType(UserError):
    pass


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def describe(hint: Any) -> str:
    """What a key of this type takes, in words."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join("none" if arg is type(None) else describe(arg) for arg in args)
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(str(arg) for arg in args)
    if origin is tuple:
        if args[-1] is Ellipsis:
            return f"a list, each {describe(args[0])}"
        return f"{len(args)} values, each {describe(args[0])}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    return words.get(hint, "an object of keys")


# ---- checks


def validate(config: Config) -> None:
    """Raises UserError for the first thing in a configuration that cannot work, in one line that says what to do."""
    _check_ranges(config)
    if not config.data.path:
        raise UserError(
            f"preset {config.preset} has no images of its own; name a folder, an archive or a packed set with --data"
        )
    if not config.stages:
        raise UserError("the run has no stages; give --stages, for example 'patch:0.75 x1000, dense x1000'")
    for number, stage in enumerate(config.stages):
        _check_stage(number, stage, config)
    _check_averages(config)


def _check_averages(config: Config) -> None:
    since = 0.0  # steps since the averages started; a stage given in minutes has enough
    for number, stage in enumerate(config.stages):
        since = (0 if stage.fresh else since) + (math.inf if stage.steps is None else stage.steps)
        last = number + 1 == len(config.stages) or config.stages[number + 1].fresh
        if last and since < config.optim.ema_every:
            raise UserError(
                f"optim.ema_every is {config.optim.ema_every}, but the averages that end with stages.{number} have "
                f"{since:g} steps: they would never leave their start; give {since:g} or less"
            )


def _check_ranges(config: Config) -> None:
    optim, data, diffusion = config.optim, config.data, config.diffusion
    checks: list[tuple[str, Any, bool, str]] = [
        ("seed", config.seed, 0 <= config.seed < 2**63, "from 0 to 2^63 - 1"),
        ("max_steps", config.max_steps, config.max_steps is None or config.max_steps >= 1, "1 or more, or none"),
        ("checkpoint_every", config.checkpoint_every, config.checkpoint_every >= 0, "0 or more"),
        ("keep_checkpoints", config.keep_checkpoints, config.keep_checkpoints >= 1, "1 or more"),
        ("heldout_every", config.heldout_every, config.heldout_every >= 0, "0 or more"),
        ("sample_every", config.sample_every, config.sample_every >= 0, "0 or more"),
        ("sample_count", config.sample_count, config.sample_count >= 0, "0 or more"),
        (
            "sample_steps",
            config.sample_steps,
            1 <= config.sample_steps <= diffusion.timesteps,
            f"from 1 to diffusion.timesteps, {diffusion.timesteps}",
        ),
        (
            "eta",
            config.eta,
            0 <= config.eta <= (config.sampler == "ddim"),
            "from 0 to 1" if config.sampler == "ddim" else f"0: with sampler {config.sampler} there is no other",
        ),
        ("guidance", config.guidance, config.guidance >= 0, "0 or more; 1 means none"),
        ("probe_steps", config.probe_steps, config.probe_steps >= 0, "0 or more"),
        ("log_every", config.log_every, config.log_every >= 1, "1 or more"),
        ("data.flip", data.flip, 0 <= data.flip <= 1, "from 0 to 1"),
        ("data.label_dropout", data.label_dropout, 0 <= data.label_dropout < 1, "from 0 to below 1"),
        ("data.heldout", data.heldout, 0 <= data.heldout < 1, "from 0 to below 1"),
        ("model.mlp_ratio", config.model.mlp_ratio, config.model.mlp_ratio > 0, "more than 0"),
        ("optim.betas", list(optim.betas), all(0 <= beta < 1 for beta in optim.betas), "two values from 0 to below 1"),
        ("optim.eps", optim.eps, optim.eps > 0, "more than 0"),
        ("optim.weight_decay", optim.weight_decay, optim.weight_decay >= 0, "0 or more"),
        ("optim.ema_every", optim.ema_every, 1 <= optim.ema_every <= 1000, "from 1 to 1000"),
    ]
    for name, value, good, takes in checks:
        if not good:
            raise UserError(f"{name} is {value}; give {takes}")
    optim.averages()
    if config.time_budget is not None:
        minutes_of(config.time_budget)


_MOST = {"steps": 2**40, "minutes": 2**40, "batch": 2**20, "tokens": 2**26}  # of a stage


def _check_stage(number: int, stage: Stage, config: Config) -> None:
    key = f"stages.{number}"
    for one, other in (("steps", "minutes"), ("batch", "tokens")):
        given = [name for name in (one, other) if getattr(stage, name) is not None]
        if len(given) != 1:
            has = f"both {one} and" if given else f"neither {one} nor"
            raise UserError(f"{key} has {has} {other}; give one of the two")
        if not 0 < getattr(stage, given[0]) <= _MOST[given[0]]:
            raise UserError(
                f"{key}.{given[0]} is {getattr(stage, given[0])}; give more than 0, up to {_MOST[given[0]]}"
            )
    micro = stage.micro_batch
    for name, good, takes in (
        ("lr", stage.lr > 0, "more than 0"),
        ("warmup", stage.warmup >= 0, "0 or more"),
        ("micro_batch", not isinstance(micro, int) or micro >= 1, "1 or more, auto, or none"),
        ("clip", stage.clip is None or stage.clip > 0, "more than 0, or none"),
        ("cool", 0 <= stage.cool <= 1, "from 0 to 1"),
    ):
        if not good:
            raise UserError(f"{key}.{name} is {getattr(stage, name)}; give {takes}")
    if config.optim.overlap and stage.clip is not None:
        raise UserError(
            f"{key}.clip is {stage.clip}, which takes the norm of all gradients, and optim.overlap updates blocks "
            f"before all of them are there; give --{key}.clip none, or leave optim.overlap out"
        )
    if stage.cool and stage.decay == "cosine":
        raise UserError(f"{key} has decay cosine and cool {stage.cool}; give one of the two")
    extras = 2 if config.data.labels or config.model.classes else 1  # time token, label token
    try:
        micro_batch(stage, *fit(stage, config.model.grid, extras))
    except UserError as error:
        raise UserError(f"{key}: {error}") from None


# ---- run folders


def check_new_run(path: str | Path) -> None:
    """Raises UserError where a new run would stand on something that exists. An empty folder is fine."""
    path = Path(path)
    if path.is_dir() and not any(path.iterdir()):
        return
    if (path / "config.json").exists():
        raise UserError(f"{path} exists; --resume {path} goes on with it, --out another folder starts a new run")
    if path.exists():
        raise UserError(f"{path} exists and is no run; name a new folder with --out (a run is continued with --resume)")


def free_run_path(preset: str) -> str:
    """runs/PRESET, or the first of runs/PRESET-2, -3, ... that is free."""
    number, path = 1, Path("runs") / preset
    while path.exists():
        number += 1
        path = path.with_name(f"{preset}-{number}")
    return str(path)
