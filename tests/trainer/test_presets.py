"""The presets: each fits its model and grid, and MaskDM's are what its authors published."""

import re

import pytest
import torch

from maskdiff import presets
from maskdiff.errors import UserError
from maskdiff.model import UViT
from maskdiff.options import parse
from maskdiff.stages import fit, micro_batches


@pytest.mark.parametrize("name", list(presets.PRESETS))
def test_models_and_stages_fit(name):
    config = presets.get(name)
    with torch.device("meta"):
        model = UViT(config.model)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    if found := re.search(r"(\d+) M parameters", presets.PRESETS[name].line):
        assert round(size) == int(found[1])
    for stage in config.stages:
        batch, mask = fit(stage, config.model.grid, config.model.extras)
        assert micro_batches(batch, mask)[-1] == batch and (stage.batch, stage.tokens) == (batch, None)


# What the authors' configurations say (configs/ of github.com/jiachenlei/maskdm): mask, batch, rate, warm-up, clip.
MASKDM = {
    "celeba64": [("patch:0.9", 256, 2e-4, 0, None), ("dense", 128, 2e-4, 0, None)],
    "celebahq256": [
        ("block4:0.9", 256, 2e-4, 0, 1.0), ("block4:0.5", 64, 2e-4, 5000, 1.0), ("dense", 32, 1e-5, 5000, 1.0)
    ],
    "vggface2-256": [("block4:0.9", 256, 2e-4, 0, 1.0)],
    "celebahq256-transfer": [("dense", 64, 5e-5, 0, None)],
    "church256": [None, ("dense", 64, 1e-4, 5000, 1.0)],
}  # fmt: skip
# noise schedule, average, flips, width, patches
MASKDM_RUNS = {
    "celeba64": ("linear", 0.999, 0.0, 512, 256),
    "celebahq256": ("cosine", 0.999, 0.0, 768, 4096),
    "vggface2-256": ("cosine", 0.999, 0.0, 512, 4096),
    "celebahq256-transfer": ("cosine", 0.999, 0.5, 512, 4096),
    "church256": ("linear", 0.9999, 0.5, 768, 4096),
}


@pytest.mark.parametrize("name", list(MASKDM))
def test_presets_of_maskdm_are_as_published(name):
    config = presets.get(name)
    for stage, said in zip(config.stages, MASKDM[name], strict=True):
        assert said in (None, (stage.mask, stage.batch, stage.lr, stage.warmup, stage.clip))
        assert stage.decay == "const" and stage.cool == 0 and stage.fresh == (stage is not config.stages[0])
    model, optim, diffusion = config.model, config.optim, config.diffusion
    told = diffusion.schedule, optim.ema, config.data.flip, model.width, model.patches
    assert told == MASKDM_RUNS[name] and (model.blocks, model.patch, diffusion.target) == (13, 4, "eps")
    assert (optim.betas, optim.weight_decay, optim.decay_all) == ((0.99, 0.99), 0.03, True)
    if name == "celebahq256-transfer":  # the shape of the run that it goes on from
        assert config.init == "runs/vggface2-256" and config.model == presets.get("vggface2-256").model


@pytest.mark.parametrize("rate", ["0.1", "0.5", "0.9"])
@pytest.mark.parametrize("kind", ["patch", "block2", "block4", "block8"])
def test_the_ablation_grid_of_celeba64(kind, rate):
    argv = ["--preset", "celeba64", "--data", "x", "--mask.kind", kind, "--mask.rate", rate]
    if (kind, rate) == ("block8", "0.1"):
        with pytest.raises(UserError, match="it hides nothing"):  # as in the authors' code
            parse(argv)
    else:
        assert parse(argv).config.stages[0].mask == f"{kind}:{rate}"
    side = {"0.1": 15, "0.5": 11, "0.9": 5}[rate]
    assert parse([*argv[:5], f"crop{side}"]).config.stages[0].mask == f"crop{side}"
