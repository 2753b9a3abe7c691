"""The command line of a training run. Command line over --config file over --preset over default.

--preset, --config, --resume, --stages and --mask.* decide which stages there are, so they are read first and build the
default configuration; tyro then takes the rest, --stages.N.* among it.
"""

import contextlib
import dataclasses
import io
import json
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from . import presets
from .config import (
    Config,
    check_new_run,
    config_from_dict,
    config_to_dict,
    describe,
    flatten,
    free_run_path,
    load_config,
    read_values,
    validate,
)
from .errors import UserError, nearest
from .masking import parse_mask, with_mask
from .stages import Stage, parse_stages, templates

HELP = """\
usage: python -m maskdiff.train [--preset P] [--data PATH] [--out RUN] [--KEY VALUE ...]

Trains an image diffusion transformer: first on masked images, then on whole ones.

what to train
  --preset P          {presets}
                      (--preset list says what they are)
  --data PATH         a packed set (python -m maskdiff.pack), a folder, zip or tar of images,
                      Parquet, .npy, .npz, hf:NAME, or faces:N, faces-b:N, digits
  --out RUN           new folder of the run (default: runs/PRESET, numbered)
  --resume RUN        goes on with a run from its last checkpoint; takes its configuration
  --config FILE       .json or .toml with any keys; RUN/config.json starts the same run again
  --image-size N      pixels of the side that images are scaled to, a multiple of the patch
  --init FILE         starts from the weights of a run, a checkpoint, or a .pt file of MaskDM

how
  --stages 'S, S'     the stages in order; each S is
                        patch:RATE, block4:RATE, crop:RATE, crop5 or dense; RATE is 0.75,
                        or 0.5-0.9: each step then shows all of the range, evenly spread
                        x5000 steps, or 10m or 1.5h of training time
                        b64 images or t8192 tokens a step, b64/16: 16 images at a time;
                        lr2e-4 learning rate
                        w500 warm-up steps                     c1.0 clip, c0 none
                        const, cosine or cool0.3 (rate falls over the last 30 %)
                        fresh: moments and EMA start anew
                      what S leaves out, but for the length, comes from the preset's stages
  --mask.rate R       the mask rate of the only masked stage
  --mask.kind K       its kind: patch, block4, crop, crop5
  --micro-batch N     most images at a time in every stage, gradients added up over its batch;
                      auto (or --batch auto): as many as fit in memory
  --recompute         keeps less for the backward pass and computes it again: less memory, slower
  --stages.N.KEY V    one key of stage N, from 0: mask steps minutes batch tokens lr warmup clip ...
  --time-budget T     2h, 30m or 90s of training: all stages end in it, with their shares of it
  --max-steps N       ends the run after N steps in all; stage lengths stay
  --seed S            seed of everything random
  --precision P       auto, bf16 or fp32
  --device D          auto, cpu or cuda
  --optimizer O       auto, cpp, cuda, torch, apex or reference: what updates the weights
  --optim.ema A       average of the weights that samples are drawn with: its decay, as 0.999,
                      or power:W, a power function of relative width W, as power:0.1
  --optim.ema2 A      a second one (maskdiff.sample --weights ema2)
  --optim.ema-every N changes the averages at every N-th update alone: fewer bytes to move
  --log WHERE         tensorboard, wandb or both: figures and samples go there, too

more
  --print-config      prints the whole configuration as JSON and stops
  --help-all          every key, with its default in this preset

examples
  python -m maskdiff.train
  python -m maskdiff.train --data photos/ --preset emoji32 --out runs/photos
  python -m maskdiff.train --stages 'block2:0.75 x2000 b128 lr1e-3 w100, dense 5m b32'
"""
_OWN = (
    "preset", "config", "resume", "stages", "mask.rate", "mask.kind", "micro-batch", "batch", "print-config", "help",
    "help-all",
)  # fmt: skip
_SHORT = {"data": "data.path", "image-size": "model.image-size", "optimizer": "optim.optimizer"}
_SWITCHES = ("print-config", "help", "help-all")

# What a resumed run may change: how long it goes on, where, and what it writes; of stages, what _is_free says. Data may
# have moved: training compares its hash.
FREE_ON_RESUME = frozenset(
    "max_steps device data.path out checkpoint_every keep_checkpoints heldout_every sample_every sample_count "
    "sample_steps sampler eta guidance probe_steps capture compile recompute optim.optimizer log log_every "
    "data.reading optim.overlap".split()
)


@dataclass(frozen=True)
class Command:
    """What a command line asks for."""

    config: Config
    resume: bool = False  # go on with the run in config.out
    text: str | None = None  # print this instead of training


def parse(argv: list[str]) -> Command:
    """Reads and checks a command line.

    Raises UserError: unknown keys, presets and words of stages (with the nearest name), values of a wrong type, a
    configuration that cannot work, an existing --out, --resume of what is no run or with keys that differ from its own.
    """
    options = _split(argv)
    own = {key: value for key, value in options if key in _OWN}
    if "help" in own:
        return Command(Config(), text=HELP.format(presets=_wrapped(", ".join(presets.PRESETS))))
    if own.get("preset") == ["list"]:
        return Command(Config(), text=presets.listing())
    run = _one("resume", own["resume"]) if "resume" in own else None
    saved = None if run is None else _saved_config(run)
    config = _base(own, saved)
    keys = _keys(config)
    rest = [(_SHORT.get(key, key), value) for key, value in options if key not in _OWN]
    begun = None if run is None else _stages_begun(run)
    rest = [_normal(key, value, keys, config, begun) for key, value in rest]
    config = _drop_alternatives(config, {key for key, _ in rest})
    config = _apply(config, rest, keys)
    if "help-all" in own:
        return Command(config, text=_help_all(config))
    if run is not None and saved is not None:
        if not any(key == "out" for key, _ in rest):
            config = replace(config, out=saved.out)
        _check_same(saved, config, run)
        config = replace(config, out=run)
    elif not config.out:
        config = replace(config, out=free_run_path(config.preset))
    presets.get(config.preset)  # raises for an unknown name, wherever it came from
    shown = "print-config" in own
    validate(replace(config, data=replace(config.data, path="-")) if shown else config)  # a recipe needs no images yet
    if shown:
        return Command(config, text=json.dumps(config_to_dict(config), indent=1))
    if run is None:
        check_new_run(config.out)
    return Command(config, resume=run is not None)


def _wrapped(names: str) -> str:
    return textwrap.fill(names, 72).replace("\n", "\n" + 22 * " ")


# ---- the words of the command line


def _split(argv: list[str]) -> list[tuple[str, list[str]]]:
    """[("max-steps", ["10"]), ...]: keys without dashes in front, with dashes inside."""
    options: list[tuple[str, list[str]]] = []
    for word in argv:
        if word == "-h":
            word = "--help"
        if word.startswith("--") and len(word) > 2:
            key, equals, value = word[2:].partition("=")
            options.append((key.replace("_", "-"), [value] if equals else []))
        elif not options or options[-1][0] in _SWITCHES:
            raise UserError(f"unexpected {word!r}; options are written --key value (--help lists them)")
        else:
            options[-1][1].append(word)
    for key, values in options:
        if key in _SWITCHES and values:
            raise UserError(f"--{key} takes no value, got {values[0]!r}")
    return options


def _one(key: str, values: list[str]) -> str:
    if not values:
        raise UserError(f"--{key} takes a value, got none")
    if len(values) > 1:
        raise UserError(f"--{key} takes one value, got {' '.join(values)!r}; put quotes around it if it is one")
    return values[0]


def _keys(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every key that the command line takes for this configuration, with its type."""
    found: dict[str, Any] = {}
    for name, hint in get_type_hints(type(config)).items():
        key, value = prefix + name.replace("_", "-"), getattr(config, name)
        if dataclasses.is_dataclass(value):
            found |= _keys(value, f"{key}.")
        elif name == "stages":
            for number, stage in enumerate(value):
                found |= _keys(stage, f"{key}.{number}.")
        else:
            found[key] = hint
    return found


def _normal(
    key: str,
    values: list[str],
    keys: dict[str, Any],
    config: Config,
    begun: int | None,  # stages, of a run that is gone on with
) -> tuple[str, list[str]]:
    """A key and its values as tyro takes them: True, False, None by these names, and one value where one is due."""
    head, _, leaf = key.rpartition(".")
    positive = f"{head}.{leaf[3:]}" if head else leaf[3:]
    if leaf.startswith("no-") and keys.get(positive) is bool and not values:
        return positive, ["False"]
    if key not in keys:
        raise UserError(_unknown(key, keys, config, begun))
    hint = keys[key]
    if hint is bool:
        values = values or ["true"]
        return key, [_one(key, values).capitalize()]
    if get_origin(hint) is tuple:
        return key, values
    value = _one(key, values)
    return key, ["None" if value.lower() == "none" and type(None) in get_args(hint) else value]


def _unknown(key: str, keys: dict[str, Any], config: Config, begun: int | None) -> str:
    head, _, rest = key.partition(".")
    number = rest.partition(".")[0]
    if head == "stages" and number.isdigit() and int(number) >= len(config.stages):
        count = len(config.stages)
        return (
            f"no option --{key}: the run has {count} stage{'s' * (count > 1)}, numbered from 0; --stages gives others"
        )
    leaves = [known for known in keys if known.rpartition(".")[2] == key.rpartition(".")[2]]
    free = [leaf for leaf in leaves if begun is None or _is_free(leaf.replace("-", "_"), begun)]
    if free:
        return f"no option --{key}; did you mean {' or '.join(f'--{leaf}' for leaf in free[:4])}?"
    if leaves:
        what = "stages that have begun keep it" if leaves[0].startswith("stages.") else "a run keeps it"
        return f"no option --{key}, and what --{leaves[0]} says is fixed: {what}; start a new run with --out"
    hint = nearest(key, [*keys, *_OWN, *_SHORT]) if len(key) > 2 else ""
    return f"no option --{key}; " + (
        hint.replace("'", "--", 1).replace("'", "") if "mean" in hint else "--help lists them"
    )


# ---- from the default to the whole


def _saved_config(run: str) -> Config:
    path = Path(run) / "config.json"
    if not path.is_file():
        why = "it has no config.json" if Path(run).is_dir() else "there is no such folder"
        raise UserError(f"--resume {run}: that is no run, {why}; give the folder that --out named")
    return load_config(path)


def _base(own: dict[str, list[str]], saved: Config | None) -> Config:
    """The configuration before single keys: preset, file, --stages, --mask.*."""
    values: dict[str, Any] = {}
    source = _one("config", own["config"]) if "config" in own else ""
    if source:
        values = read_values(source)
    asked = _one("preset", own["preset"]) if "preset" in own else None
    if saved is not None:
        config = saved
    else:
        config = presets.get(str(values.get("preset", presets.DEFAULT)) if asked is None else asked)
    config = config_from_dict(values, config, source)
    if asked is not None:
        presets.get(asked)
        config = replace(config, preset=asked)
    if "stages" in own:
        text = " ".join(own["stages"])  # without quotes the shell makes many words of it
        config = replace(config, stages=parse_stages(text, *templates(config.stages)))
    if not config.stages:
        raise UserError("the run has no stages; give --stages, for example 'patch:0.75 x1000, dense x1000'")
    if "mask.rate" in own or "mask.kind" in own:
        config = _edit_mask(config, own)
    for key in ("batch", "micro-batch"):
        if key in own:
            config = _edit_micro_batch(config, key, _one(key, own[key]))
    return config


def _edit_micro_batch(config: Config, key: str, value: str) -> Config:
    if key == "batch" and value != "auto":
        keys = " or ".join(f"--stages.{number}.batch" for number in range(len(config.stages)))
        raise UserError(f"--batch takes auto, as many images at a time as fit in memory; a stage's batch is {keys}")
    words = ["None" if value.lower() == "none" else value]
    micro = _read(key, words, get_type_hints(Stage)["micro_batch"])
    return replace(config, stages=tuple(replace(stage, micro_batch=micro) for stage in config.stages))


def _edit_mask(config: Config, own: dict[str, list[str]]) -> Config:
    kind, rate = (_one(key, own[key]) if key in own else None for key in ("mask.kind", "mask.rate"))
    name = "--mask.rate" if kind is None else "--mask.kind"
    masked = [number for number, stage in enumerate(config.stages) if not parse_mask(stage.mask).is_dense]
    if len(masked) != 1:
        count = f"{len(masked)} masked stages" if masked else "no masked stage"
        keys = " or ".join(f"--stages.{number}.mask" for number in masked or range(len(config.stages)))
        raise UserError(f"{name} edits the only masked stage, but this run has {count}; use {keys}")
    stages = list(config.stages)
    stage = stages[masked[0]]
    stages[masked[0]] = replace(stage, mask=with_mask(stage.mask, kind, rate))
    return replace(config, stages=tuple(stages))


def _drop_alternatives(config: Config, keys: set[str]) -> Config:
    """Where --stages.N.minutes is given, the default's steps give way, and so with the other pairs."""
    pairs: list[tuple[str, str, Any]] = [
        ("steps", "minutes", None), ("minutes", "steps", None), ("batch", "tokens", None), ("tokens", "batch", None),
        ("decay", "cool", 0.0), ("cool", "decay", "const"),
    ]  # fmt: skip
    stages = list(config.stages)
    for number in range(len(stages)):
        for given, other, empty in pairs:
            if f"stages.{number}.{given}" in keys and f"stages.{number}.{other}" not in keys:
                stages[number] = replace(stages[number], **{other: empty})
    return replace(config, stages=tuple(stages))


def _apply(config: Config, options: list[tuple[str, list[str]]], keys: dict[str, Any]) -> Config:
    if not options:
        return config
    values = config_to_dict(config)
    for key, words in options:
        *path, leaf = key.replace("-", "_").split(".")
        part: Any = values
        for name in path:
            part = part[int(name)] if name.isdigit() else part[name]
        part[leaf] = _read(key, words, keys[key])
    return config_from_dict(values, config, "command line")


def _read(key: str, words: list[str], hint: Any) -> Any:
    """The value that tyro reads as one of this type. tyro's own message is a box of many lines: ours is one."""
    import tyro

    option = dataclasses.make_dataclass("Option", [("value", hint)])
    quiet = io.StringIO()
    try:
        with contextlib.redirect_stderr(quiet), contextlib.redirect_stdout(quiet):
            return tyro.cli(option, args=["--value", *words], config=(tyro.conf.FlagConversionOff,)).value
    except SystemExit:
        got = " ".join(words) or "nothing"
        raise UserError(f"--{key} got {got!r}; it takes {describe(hint)}") from None


def _help_all(config: Config) -> str:
    import tyro

    shown = io.StringIO()
    try:
        with contextlib.redirect_stdout(shown):
            tyro.cli(
                Config,
                default=config,
                args=["--help"],
                prog="python -m maskdiff.train",
                description="Every key of a run beside those that --help names.",
                config=(tyro.conf.FlagConversionOff,),
            )
    except SystemExit:
        pass
    return shown.getvalue().rstrip()


# ---- resume


def _check_same(saved: Config, asked: Config, run: str) -> None:
    """Raises UserError that names the keys in which a resumed run would differ from what it has done so far."""
    begun = _stages_begun(run)
    old, new = flatten(config_to_dict(saved)), flatten(config_to_dict(asked))
    differ = [key for key in [*old, *(k for k in new if k not in old)] if old.get(key) != new.get(key)]
    differ = [key for key in differ if not _is_free(key, begun)]
    if differ:
        told = ", ".join(f"{key} (is {_text(old.get(key))}, got {_text(new.get(key))})" for key in differ[:6])
        more = f" and {len(differ) - 6} more" if len(differ) > 6 else ""
        raise UserError(
            f"--resume {run}: that run has another {told}{more}; leave them out, or start a new run with --out"
        )


def _is_free(key: str, begun: int) -> bool:
    """Stages that have not begun are free, so are micro-batches, and the length of the last of the `begun` ones."""
    if not key.startswith("stages."):
        return key in FREE_ON_RESUME and key != "out"
    number, name = key.removeprefix("stages.").split(".")
    if name == "micro_batch":
        return True
    return int(number) >= begun or (int(number) == begun - 1 and name in ("steps", "minutes"))


def _stages_begun(run: str) -> int:
    plans = Path(run) / "plans.json"
    return len(json.loads(plans.read_text())) if plans.exists() else 0


def _text(value: Any) -> str:
    return "none" if value is None else str(value)
