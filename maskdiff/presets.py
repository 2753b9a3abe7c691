"""Named configurations that are worth running: --preset NAME."""

from dataclasses import dataclass

from .config import Config, DataConfig, OptimConfig
from .diffusion import DiffusionConfig
from .errors import UserError, nearest
from .model import SIZES, ModelConfig
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
# MaskDM's, from the configurations that its authors published (see _maskdm): separate runs become stages that start
# with fresh moments and averages. They trained 200,000 steps masked; how long the stages after were is not known, nor
# is church256's masked stage. Batches are theirs: /auto takes as many images at a time as the memory holds.
CELEBA = "patch:0.9 x200000 b256 lr2e-4 w0 c0 const, dense x200000 b128 lr2e-4 w0 c0 const fresh"
CELEBA_HQ = (
    "block4:0.9 x200000 b256/auto lr2e-4 w0 c1.0 const, block4:0.5 x200000 b64/auto lr2e-4 w5000 c1.0 const fresh, "
    "dense x200000 b32/auto lr1e-5 w5000 c1.0 const fresh"
)
VGG_FACE = "block4:0.9 x200000 b256/auto lr2e-4 w0 c1.0 const"
TRANSFER = "dense x50000 b64/auto lr5e-5 w0 c0 const"
CHURCH = "block4:0.9 x200000 b256/auto lr2e-4 w0 c1.0 const, dense x200000 b64/auto lr1e-4 w5000 c1.0 const fresh"
# Ours, by the example of the others: a warm-up and a bound on the norm from the start.
AT_128 = "block4:0.9 x200000 b256/auto lr2e-4 w5000 c1.0 const, dense x200000 b64/auto lr1e-4 w5000 c1.0 const fresh"


def _maskdm(
    name: str,
    stages: str,
    image_size: int,
    size: str,  # of model.SIZES
    schedule: str = "cosine",
    ema: float = 0.999,
    flip: float = 0.0,
    init: str | None = None,
) -> Config:
    """What all runs of MaskDM (arXiv 2306.11363, configs/ of github.com/jiachenlei/maskdm) share: patches of 4 pixels,
    AdamW (0.99, 0.99) with decay 0.03 of every parameter, eps-prediction, a constant rate after a linear warm-up."""
    shape = SIZES[size]
    return Config(
        preset=name,
        init=init,
        data=DataConfig(path="", flip=flip),
        model=ModelConfig(
            image_size=image_size,
            channels=3,
            patch=4,
            width=shape["width"],
            blocks=shape["blocks"],
            heads=shape["heads"],
            init="authors",
        ),
        diffusion=DiffusionConfig(schedule=schedule, target="eps"),
        optim=OptimConfig(betas=(0.99, 0.99), weight_decay=0.03, decay_all=True, ema=ema),
        stages=parse_stages(stages),
        checkpoint_every=10000,
        sample_every=10000,
        heldout_every=1000,
        sample_steps=50,
    )


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
        "emoji at 32 px, or any small set of real images given by --data: some minutes on 2 CPU cores",
        _small(
            "emoji32",
            EMOJI,
            DataConfig(path=""),
            ModelConfig(image_size=32, channels=3, patch=4, width=128, blocks=5, heads=2),
        ),
    ),
    "emoji64": Preset(
        "the same at 64 px: some ten minutes, for colours and outlines; details take several times the steps",
        _small(
            "emoji64",
            EMOJI,
            DataConfig(path=""),
            ModelConfig(image_size=64, channels=3, patch=4, width=128, blocks=5, heads=2),
        ),
    ),
    "celeba64": Preset(
        "MaskDM's CelebA ablation at 64 px (small, 44 M parameters), on a GPU; its grid: --mask.kind, --mask.rate",
        _maskdm("celeba64", CELEBA, 64, "small", schedule="linear"),
    ),
    "celebahq256": Preset(
        "MaskDM's CelebA-HQ at 256 px (base, 102 M parameters): 90 %, 50 %, then nothing masked, as one run",
        _maskdm("celebahq256", CELEBA_HQ, 256, "base"),
    ),
    "vggface2-256": Preset(
        "MaskDM's pre-training on VGGFace2 at 256 px (small, 46 M parameters), 90 % masked",
        _maskdm("vggface2-256", VGG_FACE, 256, "small"),
    ),
    "celebahq256-transfer": Preset(
        "and its fine-tuning on a part of CelebA-HQ (--data.subset 10% or 1%); --init: the run before",
        _maskdm("celebahq256-transfer", TRANSFER, 256, "small", flip=0.5, init="runs/vggface2-256"),
    ),
    "church256": Preset(
        "MaskDM's LSUN Church at 256 px (base); its dense stage is the authors', the masked one ours",
        _maskdm("church256", CHURCH, 256, "base", schedule="linear", ema=0.9999, flip=0.5),
    ),
    "celeba128": Preset(
        "ours: CelebA at 128 px (small; aligned originals: --data.crop celeba128); the authors' settings are unknown",
        _maskdm("celeba128", AT_128, 128, "small", flip=0.5),
    ),
    "ffhq128": Preset(
        "ours: FFHQ at 128 px (base); the authors' settings are unknown",
        _maskdm("ffhq128", AT_128, 128, "base", flip=0.5),
    ),
}


def get(name: str) -> Config:
    """The preset's configuration. Raises UserError with the nearest name."""
    if name not in PRESETS:
        raise UserError(f"no preset {name!r}; {nearest(name, list(PRESETS))}")
    return PRESETS[name].config


def listing() -> str:
    """A line for each preset."""
    longest = max(map(len, PRESETS))
    return "\n".join(f"{name:{longest}} {preset.line}" for name, preset in PRESETS.items())
