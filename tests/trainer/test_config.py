"""The configuration: precedence, strict keys and types, round trip, checks, presets, resume."""

import dataclasses
import json
import sys
from dataclasses import replace

import pytest

from maskdiff import presets
from maskdiff.config import (
    Config,
    OptimConfig,
    Stage,
    config_from_dict,
    config_to_dict,
    flatten,
    load_config,
    validate,
)
from maskdiff.errors import UserError
from maskdiff.options import FREE_ON_RESUME, parse
from maskdiff_kernels import PowerEma


def resolve(argv: list[str]) -> Config:
    return parse(argv).config


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def error_of(argv: list[str]) -> str:
    with pytest.raises(UserError) as error:
        parse(argv)
    assert "\n" not in str(error.value)
    return str(error.value)


def write(path, values) -> str:
    path.write_text(json.dumps(values))
    return str(path)


# ---- precedence


def test_default_is_the_default_preset():
    assert resolve([]) == replace(presets.get("faces32"), out="runs/faces32")


def test_command_line_over_file_over_preset_over_default(tmp_path):
    default, preset = Config(), presets.get("emoji32")
    file = write(tmp_path / "c.json", {"data": {"path": "from-file"}, "seed": 5, "optim": {"weight_decay": 0.5}})
    config = resolve(["--preset", "emoji32", "--config", file, "--seed", "7"])
    assert config.optim.eps == default.optim.eps  # nobody says
    assert config.optim.ema == preset.optim.ema != default.optim.ema  # preset over default
    assert config.optim.weight_decay == 0.5 != preset.optim.weight_decay  # file over preset
    assert config.data.path == "from-file"
    assert config.seed == 7  # command line over file
    assert config.stages == preset.stages
    # neither the place of a word nor how it is written matters
    argv = ["--seed=7", f"--config={file}", "--preset=emoji32"]
    assert resolve(argv) == config
    assert resolve(["--seed", "1", "--preset", "digits", *argv]) == config  # the last one counts


def test_a_file_may_name_its_preset(tmp_path):
    file = write(tmp_path / "c.json", {"preset": "digits", "seed": 3})
    assert resolve(["--config", file]) == replace(presets.get("digits"), seed=3, out="runs/digits")
    assert resolve(["--config", file, "--preset", "faces64"]).model == presets.get("faces64").model
    assert "did you mean 'digits'" in error_of(["--config", write(tmp_path / "d.json", {"preset": "digit"})])


@pytest.mark.skipif(sys.version_info < (3, 11), reason="no TOML reader before Python 3.11")
def test_toml_file(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("seed = 3\nstages = 'dense x5 b8'\n[optim]\nema = 0.5\n")
    config = resolve(["--config", str(file)])
    assert (config.seed, config.optim.ema, config.stages[0].steps) == (3, 0.5, 5)
    file.write_text("seed = = 3")
    assert "not valid toml" in error_of(["--config", str(file)])


def test_data_is_short_for_data_path():
    assert resolve(["--data", "digits"]).data.path == resolve(["--data.path", "digits"]).data.path == "digits"


def test_image_size_is_short_for_model_image_size():
    assert resolve(["--image-size", "64"]).model.image_size == 64


def test_optimizer_is_short_for_optim_optimizer(tmp_path):
    assert resolve(["--optimizer", "apex"]).optim.optimizer == "apex"
    assert resolve(["--optim.optimizer", "torch", "--optimizer=cpp"]).optim.optimizer == "cpp"
    assert "did you mean --optimizer?" in error_of(["--optimiser", "apex"])
    assert "it takes one of auto, cpp" in error_of(["--optimizer", "lion"])
    (tmp_path / "run").mkdir()
    write(tmp_path / "run" / "config.json", config_to_dict(resolve([])))
    assert resolve(["--resume", "run", "--optimizer", "torch"]).optim.optimizer == "torch"


def test_averages_are_decays_or_widths():
    assert resolve([]).optim.averages() == [presets.get("faces32").optim.ema]
    optim = resolve(["--optim.ema", "0.99", "--optim.ema2", "power:0.1"]).optim
    assert (optim.ema, optim.ema2) == (0.99, "power:0.1")
    decay, power = optim.averages()
    assert decay == 0.99 and isinstance(power, PowerEma) and power.sigma_rel == pytest.approx(0.1)
    assert resolve(["--optim.ema2", "none"]).optim.ema2 is None
    assert OptimConfig(ema="0.5").averages() == [0.5]  # as an environment may write it


def test_run_folders_are_numbered(tmp_path):
    (tmp_path / "runs/faces32").mkdir(parents=True)
    assert resolve([]).out == "runs/faces32-2"
    (tmp_path / "runs/faces32-2").mkdir()
    assert resolve([]).out == "runs/faces32-3"
    assert resolve(["--out", "x"]).out == "x"


# ---- stages on the command line


def test_stages_then_single_keys():
    argv = ["--stages", "block2:0.75 x50 lr1e-3, dense x20 b8", "--stages.1.lr", "3e-4", "--stages.0.batch=4"]
    masked, dense = resolve(argv).stages
    assert (masked.mask, masked.steps, masked.lr, masked.batch) == ("block2:0.75", 50, 1e-3, 4)
    assert (dense.mask, dense.steps, dense.lr, dense.batch) == ("dense", 20, 3e-4, 8)
    preset = presets.get("faces32").stages
    assert masked.clip == preset[0].clip and dense.warmup == preset[1].warmup  # what the text leaves out
    assert resolve(["--stages", "dense", "x5", "b8,", "dense", "x6"]).stages[1].steps == 6  # quotes forgotten


def test_alternatives_give_way():
    stage = resolve(["--stages.0.minutes", "2", "--stages.0.tokens", "999", "--stages.0.cool", "0.3"]).stages[0]
    assert (stage.steps, stage.minutes, stage.batch, stage.tokens) == (None, 2.0, None, 999)
    assert (stage.decay, stage.cool) == ("const", 0.3)
    assert "both steps and minutes" in error_of(["--stages.0.minutes", "2", "--stages.0.steps", "9"])


def test_mask_options_edit_the_only_masked_stage():
    assert resolve(["--mask.rate", "0.9"]).stages[0].mask == "patch:0.9"
    assert resolve(["--mask.kind", "block2"]).stages[0].mask == "block2:0.75"
    assert resolve(["--mask.kind", "crop", "--mask.rate", "0.9"]).stages[0].mask == "crop:0.9"
    assert resolve(["--stages", "dense x5, crop5 x5", "--mask.rate", "0.5"]).stages[1].mask == "crop:0.5"
    two = ["--stages", "patch:0.9 x5, patch:0.5 x5, dense x5", "--mask.rate", "0.3"]
    assert all(word in error_of(two) for word in ("2 masked stages", "--stages.0.mask", "--stages.1.mask"))
    none = ["--stages", "dense x5", "--mask.kind", "patch"]
    assert all(word in error_of(none) for word in ("no masked stage", "--stages.0.mask"))


def test_max_steps_leaves_stage_lengths_alone():
    assert resolve(["--max-steps", "10"]).stages == presets.get("faces32").stages
    assert resolve(["--max-steps", "10"]).max_steps == 10
    assert resolve(["--max-steps", "10", "--max-steps", "none"]).max_steps is None


def test_switches_lists_and_none():
    config = resolve(["--optim.decay-all", "--data.no-labels", "--model.classes", "3", "4", "--stages.0.clip", "None"])
    assert config.optim.decay_all is True and config.data.labels is False
    assert config.model.classes == (3, 4) and config.stages[0].clip is None
    assert resolve(["--data.labels", "false"]).data.labels is False
    assert resolve(["--optim.betas", "0.5", "0.6"]).optim.betas == (0.5, 0.6)
    assert resolve(["--model.image_size", "64"]) == resolve(["--model.image-size", "64"])


# ---- errors of the command line


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--presett", "x"], ["no option --presett", "--preset?"]),
        (["--model.widht", "3"], ["no option --model.widht", "--model.width?"]),
        (["--lr", "3"], ["--stages.0.lr or --stages.1.lr?"]),
        (["--width", "3"], ["--model.width?"]),
        (["--stages.7.lr", "3"], ["no option --stages.7.lr", "2 stages"]),
        (["--stages.0.learning", "3"], ["no option --stages.0.learning"]),
        (["--qqq", "3"], ["no option --qqq", "--help"]),
        (["faces32"], ["unexpected 'faces32'", "--key value"]),
        (["--seed"], ["--seed takes a value"]),
        (["--seed", "1", "2"], ["--seed takes one value", "'1 2'"]),
        (["--seed", "one"], ["--seed got 'one'", "a whole number"]),
        (["--seed", "-1"], ["seed is -1", "from 0"]),
        (["--seed", "1.5"], ["--seed got '1.5'", "a whole number"]),
        (["--stages.0.lr", "nan"], ["stages.0.lr got NaN", "a number"]),
        (["--stages.0.decay", "linear"], ["--stages.0.decay got 'linear'", "const, cosine"]),
        (["--precision", "fp16"], ["--precision got 'fp16'", "auto, bf16, fp32"]),
        (["--device", "tpu"], ["--device got 'tpu'", "cpu"]),
        (["--optim.betas", "0.5"], ["--optim.betas got '0.5'", "2 values"]),
        (["--data.labels", "perhaps"], ["--data.labels got 'Perhaps'", "true or false"]),
        (["--print-config", "now"], ["unexpected 'now'"]),
        (["--print-config=now"], ["--print-config takes no value"]),
        (["--preset", "faces23"], ["no preset 'faces23'", "did you mean 'faces32'"]),
        (["--preset", "zzz"], ["no preset 'zzz'", "celeba64", "faces32"]),
        (["--stages", "dense x5 b8 cosin"], ["stage 1 (--stages.0)", "'cosin' (character 13)", "'cosine'"]),
        (["--config", "absent.json"], ["'absent.json' cannot be read", "No such file"]),
    ],
)
def test_command_line_errors(argv, words):
    message = error_of(argv)
    for word in words:
        assert word in message, message


# ---- files


def test_round_trip_of_every_preset():
    for name in presets.PRESETS:
        config = presets.get(name)
        values = json.loads(json.dumps(config_to_dict(config)))
        assert config_from_dict(values) == config
        assert config_from_dict({}, config) == config


def test_saved_configuration_starts_the_same_run(tmp_path):
    config = resolve(
        ["--preset", "digits", "--seed", "3", "--stages.0.clip", "none", "--model.classes", "10", "--out", "a"]
    )
    file = write(tmp_path / "config.json", config_to_dict(config))
    assert resolve(["--config", file]) == config
    assert resolve(["--config", file, "--out", "b"]) == replace(config, out="b")
    printed = parse(["--config", file, "--print-config"]).text
    assert config_from_dict(json.loads(printed)) == config


OTHER = {
    "preset": "digits", "out": "o", "seed": 1, "max_steps": 9, "time_budget": "2h", "precision": "fp32",
    "device": "cpu", "capture": "off", "compile": True, "init": "i", "init_weights": "ema",
    "checkpoint_every": 2, "keep_checkpoints": 3, "heldout_every": 4, "sample_every": 5, "sample_count": 6,
    "sample_steps": 7, "guidance": 8.5, "probe_steps": 9,
    "recompute": True, "sampler": "heun", "eta": 0.5, "log": ["wandb"], "log_every": 3,
    "data": {"path": "p", "labels": True, "label_dropout": 0.5, "flip": 0.5, "background": "red",
             "crop": "c", "subset": "9", "heldout": 0.5, "reading": "mapped"},
    "model": {
        "image_size": 30, "channels": 1, "patch": 5, "width": 24, "blocks": 7, "heads": 3, "mlp_ratio": 2.0,
        "qkv_bias": True, "time_mlp": True, "classes": [4, 2], "position": "none", "init": "authors",
    },
    "diffusion": {
        "schedule": "shifted-cosine", "shift": 2.0, "timesteps": 99, "target": "x0", "min_snr": None, "v_loss": 4.0,
    },
    "optim": {
        "betas": [0.5, 0.6], "eps": 0.1, "weight_decay": 0.2, "decay_all": True, "ema": 0.3, "ema2": "power:0.1",
        "ema_every": 10, "optimizer": "torch", "overlap": True,
    },
    "stages": [
        {
            "mask": "patch:0.5", "steps": 3, "minutes": 4.0, "batch": 5, "tokens": 6, "micro_batch": 2,
            "lr": 7.0, "warmup": 8, "clip": 9.0, "decay": "cosine", "cool": 0.5, "fresh": True,
        }
    ],
}  # fmt: skip


def test_every_key_survives():
    """A key that the writer or the reader forgot would come back as its default."""
    default = flatten(config_to_dict(replace(Config(), stages=(Stage(),))))
    other = flatten(OTHER)
    assert other.keys() == default.keys()
    assert [key for key in other if other[key] == default[key]] == ["diffusion.min_snr"]  # it excludes v_loss
    assert config_to_dict(config_from_dict(json.loads(json.dumps(OTHER)))) == OTHER
    assert config_from_dict({"diffusion": {"min_snr": 3.0}}).diffusion.min_snr == 3.0


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"sed": 3}, ["no key 'sed'", "'seed'"]),
        ({"optim": {"emma": 0.5}}, ["no key 'optim.emma'", "'optim.ema'"]),
        ({"optim": {"zzzzz": 0.5}}, ["no key 'optim.zzzzz'", "betas", "weight_decay"]),
        ({"stages": [{"mask": "dense", "steps": 3, "lrr": 1}]}, ["no key 'stages.0.lrr'", "'stages.0.lr'"]),
        ({"seed": "3"}, ['seed got "3"', "a whole number"]),
        ({"seed": 3.0}, ["seed got 3.0", "a whole number"]),
        ({"seed": True}, ["seed got true", "a whole number"]),
        ({"guidance": True}, ["guidance got true", "a number"]),
        ({"guidance": float("nan")}, ["guidance got NaN"]),
        ({"max_steps": "9"}, ["max_steps", "a whole number or none"]),
        ({"precision": "fp16"}, ["precision", "one of auto, bf16, fp32"]),
        ({"data": "photos"}, ['data got "photos"', "an object of keys"]),
        ({"data": {"labels": 1}}, ["data.labels got 1", "true or false"]),
        ({"data": {"path": None}}, ["data.path got null", "a text"]),
        ({"optim": {"betas": [0.9]}}, ["optim.betas", "2 values, each a number"]),
        ({"optim": {"betas": [0.9, "x"]}}, ["optim.betas.1", "a number"]),
        ({"model": {"classes": [3, "x"]}}, ["model.classes.1", "a whole number"]),
        ({"stages": {"mask": "dense"}}, ["stages", "a list"]),
        ({"stages": "dense x"}, ["stage 1 (--stages.0)", "'x5000'"]),
        ({"model": {"image_size": 30}}, ["30", "patches of 4"]),
    ],
)
def test_files_are_read_strictly(tmp_path, values, words):
    file = write(tmp_path / "c.json", values)
    with pytest.raises(UserError) as error:
        load_config(file)
    assert "\n" not in str(error.value)
    if not ("stages" in values and isinstance(values["stages"], str)) and "model" not in values:
        assert file in str(error.value)
    for word in words:
        assert word in str(error.value), str(error.value)


def test_integers_are_numbers_and_partial_stages_take_defaults():
    config = config_from_dict({"guidance": 2, "stages": [{"mask": "dense", "steps": 3}]})
    assert config.guidance == 2.0 and isinstance(config.guidance, float)
    assert config.stages == (Stage("dense", steps=3),)


@pytest.mark.parametrize("text", ["{", "[1]", "3", "\xff"])
def test_foreign_files(tmp_path, text):
    file = tmp_path / "c.json"
    file.write_bytes(text.encode("latin1"))
    with pytest.raises(UserError, match="c.json"):
        load_config(file)


# ---- checks


@pytest.mark.parametrize("name", list(presets.PRESETS))
def test_presets_are_valid(name):
    config = presets.get(name)
    assert config.preset == name
    validate(replace(config, data=replace(config.data, path=config.data.path or "images")))
    assert len(presets.PRESETS[name].line) < 120 and f"{name} " in presets.listing()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--model.patch", "5"], ["32", "patches of 5"]),
        (["--model.image-size", "30"], ["30", "patches of 4"]),
        (["--model.heads", "5"], ["heads"]),
        (["--model.blocks", "4"], ["odd"]),
        (["--model.mlp-ratio", "0"], ["model.mlp_ratio is 0", "more than 0"]),
        (["--diffusion.schedule", "cosin"], ["schedule", "cosine"]),
        (["--mask.rate", "1"], ["stages.0", "hides everything", "0.99"]),
        (["--mask.rate", "0.001"], ["stages.0", "hides nothing", "0.02"]),
        (["--mask.rate", "75"], ["did you mean 0.75?"]),
        (["--mask.kind", "block3"], ["stages.0", "3 does not divide", "block2 or block4"]),
        (["--mask.kind", "hexagon"], ["no kind 'hexagon'", "patch"]),
        (["--mask.kind", "crop9"], ["stages.0", "does not fit", "crop7"]),
        (["--mask.rate", "0.5-0.9", "--stages.0.batch", "1"], ["stages.0", "range of rates", "b16", "patch:0.7"]),
        (["--stages.0.mask", "dense:0.5"], ["stages.0", "takes no rate"]),
        (["--stages.1.steps", "0"], ["stages.1.steps is 0", "more than 0"]),
        (["--stages.1.steps", "none"], ["stages.1 has neither steps nor minutes"]),
        (["--stages.1.batch", "0"], ["stages.1.batch is 0"]),
        (["--stages.1.batch", "-4"], ["stages.1.batch is -4"]),
        (["--stages.1.tokens", "50"], ["stages.1", "50 tokens a step", "66 tokens", "t66"]),
        (["--stages.1.lr", "0"], ["stages.1.lr is 0"]),
        (["--stages.1.clip", "0"], ["stages.1.clip", "or none"]),
        (
            ["--optim.ema-every", "25", "--stages", "dense x20 b8, dense x4 b8"],
            ["optim.ema_every is 25", "end with stages.1 have 24", "give 24 or less"],
        ),
        (["--optim.ema-every", "9", "--stages", "dense x20 b8, dense x8 b8 fresh"], ["with stages.1 have 8 steps"]),
        (["--optim.ema-every", "9", "--stages", "dense x8 b8, dense x9 b8 fresh"], ["with stages.0 have 8 steps"]),
        (
            ["--optim.overlap", "--stages.0.clip", "none"],
            ["stages.1.clip is 1.0", "optim.overlap", "give --stages.1.clip none"],
        ),
        (["--stages.1.warmup", "-1"], ["stages.1.warmup"]),
        (["--stages.1.cool", "2"], ["stages.1.cool is 2"]),
        (["--stages.1.cool", "0.5", "--stages.1.decay", "cosine"], ["decay cosine and cool 0.5"]),
        (["--preset", "emoji32"], ["no images of its own", "--data"]),
        (["--optim.ema", "power:nan"], ["optim.ema is power:nan", "power:0.1"]),
        (["--optim.ema2", "power:0.3"], ["optim.ema2 is power:0.3", "at most 0.2887"]),
        (["--optim.ema2", "power:"], ["optim.ema2 is power:;", "power:0.1"]),
        (["--optim.ema2", "pow:0.1"], ["optim.ema2 is pow:0.1", "power:0.1"]),
        (["--max-steps", "0"], ["max_steps is 0", "1 or more"]),
        (["--time-budget", "2x"], ["time_budget got '2x'", "90s, 20m, 2h"]),
        (["--time-budget", "0"], ["time_budget is 0.0", "above 0"]),
        (["--keep-checkpoints", "0"], ["keep_checkpoints is 0"]),
        (["--sample-steps", "1001"], ["sample_steps is 1001", "1000"]),
        (["--eta", "1.5"], ["eta is 1.5", "from 0 to 1"]),
        (["--sampler", "heun", "--eta", "1"], ["eta is 1.0", "with sampler heun"]),
        (["--data.flip", "1.5"], ["data.flip is 1.5"]),
        (["--data.label-dropout", "1"], ["data.label_dropout is 1"]),
        (["--optim.betas", "0.9", "1"], ["optim.betas"]),
        (["--optim.ema-every", "0"], ["optim.ema_every is 0", "from 1 to 1000"]),
        (["--optim.ema-every", "1001"], ["optim.ema_every is 1001"]),
        (["--optim.ema", "1"], ["optim.ema is 1.0", "from 0 to below 1", "power:0.1"]),
    ],
)
def test_what_cannot_work(argv, words):
    message = error_of(argv)
    for word in words:
        assert word in message, message


def test_no_stages():
    with pytest.raises(UserError, match="--stages"):
        validate(Config())


# ---- micro-batches


def test_micro_batches_are_one_option_for_all_stages_or_a_stage_own():
    argv = ["--stages", "patch:0.5 x5 b64/16, dense x5 b8"]
    assert [stage.micro_batch for stage in resolve(argv).stages] == [16, None]
    for words, expected in (
        (["--micro-batch", "4"], [4, 4]), (["--micro-batch", "auto"], ["auto", "auto"]),
        (["--batch", "auto"], ["auto", "auto"]), (["--micro-batch", "none"], [None, None]),
        (["--micro-batch", "4", "--stages.1.micro-batch", "auto"], [4, "auto"]),
    ):  # fmt: skip
        assert [stage.micro_batch for stage in resolve(argv + words).stages] == expected
        assert [stage.batch for stage in resolve(argv + words).stages] == [64, 8]
    assert "takes a whole number or auto or none" in error_of(["--micro-batch", "some"])
    assert "--batch takes auto, " in error_of(["--batch", "64"]) and "--stages.1.batch" in error_of(["--batch", "64"])
    assert "stages.0.micro_batch is 0; give 1 or more, auto, or none" in error_of(["--micro-batch", "0"])
    message = error_of(["--stages", "patch:0.5-0.9 x5 b64/8"])
    assert "over every 16 images" in message and message.endswith("8 at a time are too few, give 16 or more")
    message = error_of(["--stages", "patch:0.5-0.9 x5 b62/8"])
    assert message.endswith("give 31 or more, or a batch that 16 divides")


# ---- run folders and resume


@pytest.fixture
def run(tmp_path):
    """A run folder with nothing but its configuration and the plans of its stages."""
    config = replace(resolve(["--seed", "3", "--max-steps", "10", "--out", "run"]), out="moved/elsewhere")
    (tmp_path / "run").mkdir()
    write(tmp_path / "run/config.json", config_to_dict(config))
    write(tmp_path / "run/plans.json", {"0": {}, "1": {}})
    return config


def test_existing_run(run, tmp_path):
    message = error_of(["--out", "run"])
    assert "run exists" in message and "--resume run" in message and "--out" in message
    (tmp_path / "other").mkdir()
    assert parse(["--out", "other"]).config.out == "other"  # empty folders do no harm
    (tmp_path / "other/file").touch()
    assert "is no run" in error_of(["--out", "other"])
    assert "is no run" in error_of(["--out", "other/file"])


def test_resume_takes_the_saved_configuration(run):
    command = parse(["--resume", "run"])
    assert command.resume and command.config == replace(run, out="run")
    assert not parse(["--out", "new"]).resume


def test_resume_may_repeat_what_is_the_same_and_change_what_is_free(run):
    same = ["--seed", "3", "--preset", "faces32", "--stages.0.lr", str(run.stages[0].lr)]
    assert parse(["--resume", "run", *same]).config == replace(run, out="run")
    command = parse(
        ["--resume", "run", "--max-steps", "20", "--device", "cpu", "--checkpoint-every", "7", "--data", "x"]
        + ["--capture", "off", "--compile", "--recompute", "--micro-batch", "8"]
    )
    assert command.config.recompute and [stage.micro_batch for stage in command.config.stages] == [8, 8]
    assert command.config.capture == "off" and command.config.compile
    assert (command.config.max_steps, command.config.checkpoint_every) == (20, 7)
    assert command.config.data.path == "x"
    assert parse(["--resume", "run", "--stages.1.steps", "9"]).config.stages[1].steps == 9  # the last that has begun
    assert FREE_ON_RESUME <= flatten(config_to_dict(run)).keys()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--seed", "4"], ["seed (is 3, got 4)"]),
        (["--preset", "faces64"], ["preset (is faces32, got faces64)"]),
        (["--stages.1.lr", "1", "--optim.ema", "0.5"], ["stages.1.lr (is 0.004, got 1.0)", "optim.ema"]),
        (["--stages", "dense x5"], ["stages.0.mask", "stages.0.steps", "more"]),
        (["--stages.0.steps", "901"], ["stages.0.steps (is 900, got 901)"]),
        (["--mask.rate", "0.5"], ["stages.0.mask (is patch:0.75, got patch:0.5)"]),
        (["--init", "w.pt"], ["init (is none, got w.pt)"]),
        (["--time-budget", "2h"], ["time_budget (is none, got 2h)"]),
        (["--precision", "bf16"], ["precision"]),
        (["--out", "new"], ["out (is"]),
    ],
)
def test_resume_of_another_configuration(run, argv, words):
    message = error_of(["--resume", "run", *argv])
    for word in ["--resume run", *words]:
        assert word in message, message


def test_resume_hints_at_what_it_takes(run):
    assert "no option --lr, and what --stages.0.lr says is fixed" in error_of(["--resume", "run", "--lr", "1"])
    assert "a run keeps it" in error_of(["--resume", "run", "--width", "1"])
    assert error_of(["--resume", "run", "--steps", "9"]).endswith("did you mean --stages.1.steps?")


def test_resume_of_another_file(run, tmp_path):
    file = write(tmp_path / "c.json", {"seed": 9})
    assert "seed (is 3, got 9)" in error_of(["--resume", "run", "--config", file])


def test_resume_of_what_is_no_run(tmp_path):
    assert "no such folder" in error_of(["--resume", "absent"])
    (tmp_path / "empty").mkdir()
    assert "no config.json" in error_of(["--resume", "empty"])
    assert "--resume takes a value" in error_of(["--resume"])


# ---- what is printed


def test_help_names_every_preset_and_only_options_that_exist():
    text = parse(["-h"]).text
    assert text == parse(["--help", "--seed", "1"]).text
    assert all(name in text for name in presets.PRESETS)
    assert len(text.splitlines()) < 60 and max(map(len, text.splitlines())) <= 100
    samples = {
        "preset": "digits", "data": "x", "out": "x", "resume": "run", "config": "c.json", "init": "x",
        "stages": "dense x5", "mask.rate": "0.5", "mask.kind": "patch", "max-steps": "5",
        "seed": "5", "precision": "fp32", "device": "cpu", "micro-batch": "4", "image-size": "64",
    }  # fmt: skip
    for key, value in samples.items():
        assert f"--{key} " in text
        if key not in ("resume", "config"):
            parse([f"--{key}", value])


def test_help_all_lists_every_key():
    text = parse(["--help-all", "--preset", "digits"]).text
    for field in dataclasses.fields(OptimConfig):
        assert f"--optim.{field.name.replace('_', '-')} " in text
    assert "--stages.1.lr" in text and "--model.image-size" in text


def test_print_config_is_complete_and_starts_nothing(tmp_path):
    values = json.loads(parse(["--print-config", "--seed", "3"]).text)
    assert values["seed"] == 3 and config_from_dict(values) == resolve(["--seed", "3"])
    assert list(tmp_path.iterdir()) == []
