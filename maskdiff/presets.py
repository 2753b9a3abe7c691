"""Named configurations that are worth running: --preset NAME."""

from dataclasses import dataclass

from .config import Config, DataConfig, OptimConfig, nearest
from .diffusion import DiffusionConfig
from .errors import UserError
from .model import ModelConfig
from .stages import parse_stages

DEFAULT = "faces32"


@dataclass(frozen=True)
class Preset:
    """A configuration and a line that says what it is."""

    line: str
    config: Config


def _small(name: str, stages: str, data: DataConfig, model: ModelConfig, guidance: float = 1.0) -> Config:
    """What all recipes for some minutes on a CPU share.

    The cosine schedule; a model that predicts x0 under the weights of v's loss (in a minute's training of faces32 a
    classifier read 0.66 of the labels off its samples, of a v-predicting one's 0.46); an EMA that does not lag.
    """
    return Config(
        preset=name,
        data=data,
        model=model,
        diffusion=DiffusionConfig(schedule="cosine", target="x0", v_loss=5.0),
        optim=OptimConfig(betas=(0.9, 0.99), weight_decay=0.01, ema=0.995),
        stages=parse_stages(stages),
        guidance=guidance,
        heldout_every=500,
        sample_every=1000,
    )


# One optimizer step of each stage costs about the same: the batches are to each other as the visible patches are.
FACES = "patch:0.75 x900 b64 lr4e-3 w50 c1.0 cosine, dense x2000 b16 lr4e-3 w50 c1.0 cosine"
FACES64 = "patch:0.75 x2000 b32 lr3e-3 w100 c1.0 cosine, dense x5000 b8 lr3e-3 w100 c1.0 cosine"
DIGITS = "patch:0.75 x400 b64 lr4e-3 w50 c1.0 cosine, dense x1000 b16 lr4e-3 w50 c1.0 cosine"
EMOJI = "patch:0.75 x2000 b64 lr2e-3 w100 c1.0 cool0.3, dense x2000 b16 lr2e-3 w100 c1.0 cool0.3 fresh"
# MaskDM's ablation on CelebA at 64 pixels: two runs of their own, constant rate, no warm-up, no clipping.
CELEBA = "patch:0.9 x200000 b256 lr2e-4 w0 c0 const, dense x200000 b128 lr2e-4 w0 c0 const fresh"

PRESETS: dict[str, Preset] = {
    "faces32": Preset(
        "drawn portraits at 32 px, with labels: some minutes on 2 CPU cores (the default)",
        _small(
            "faces32",
            FACES,
            DataConfig(path="faces:20000", labels=True, label_dropout=0.12),
            ModelConfig(image_size=32, channels=3, patch=4, width=96, blocks=5, heads=3),
            guidance=1.5,
        ),
    ),
    "faces64": Preset(
        "drawn portraits at 64 px, with labels: about an hour on 2 CPU cores",
        _small(
            "faces64",
            FACES64,
            DataConfig(path="faces:20000", labels=True, label_dropout=0.12),
            ModelConfig(image_size=64, channels=3, patch=4, width=128, blocks=5, heads=2),
            guidance=1.5,
        ),
    ),
    "digits": Preset(
        "scikit-learn's handwritten digits at 16 px, with labels: a minute or two (takes the extra 'digits')",
        _small(
            "digits",
            DIGITS,
            DataConfig(path="digits", labels=True, label_dropout=0.12),
            ModelConfig(image_size=16, channels=1, patch=2, width=96, blocks=5, heads=3),
            guidance=1.5,
        ),
    ),
    "emoji32": Preset(
        "emoji at 32 px, or any small set of real images given by --data, without labels",
        _small(
            "emoji32",
            EMOJI,
            DataConfig(path=""),
            ModelConfig(image_size=32, channels=3, patch=4, width=128, blocks=5, heads=2),
        ),
    ),
    "emoji64": Preset(
        "the same at 64 px",
        _small(
            "emoji64",
            EMOJI,
            DataConfig(path=""),
            ModelConfig(image_size=64, channels=3, patch=4, width=128, blocks=5, heads=2),
        ),
    ),
    "celeba64": Preset(
        "MaskDM's CelebA ablation at 64 px (small model, 44 M parameters), images given by --data: for a GPU",
        Config(
            preset="celeba64",
            data=DataConfig(path=""),
            model=ModelConfig(image_size=64, channels=3, patch=4, width=512, blocks=13, heads=8, init="authors"),
            diffusion=DiffusionConfig(schedule="linear", target="eps"),
            optim=OptimConfig(betas=(0.99, 0.99), weight_decay=0.03, decay_all=True, ema=0.999),
            stages=parse_stages(CELEBA),
            checkpoint_every=10000,
            sample_every=10000,
            heldout_every=1000,
            sample_steps=50,
        ),
    ),
}


def get(name: str) -> Config:
    """The preset's configuration. Raises UserError with the nearest name."""
    if name not in PRESETS:
        raise UserError(f"no preset {name!r}; {nearest(name, list(PRESETS))}")
    return PRESETS[name].config


def listing() -> str:
    """A line for each preset."""
    return "\n".join(f"{name:9} {preset.line}" for name, preset in PRESETS.items())
