"""The baselines do what they claim: both forms of the plain model agree, and their steps train."""

import pytest
import torch

from maskdiff.baselines import PlainUViT, PublishedBaseline, StrongBaseline, explicit_attention, sdpa_attention
from maskdiff.model import ModelConfig, UViT, patchify

CONFIG = ModelConfig(image_size=16, width=64, blocks=3, heads=2)


@pytest.mark.parametrize("attend", [explicit_attention, sdpa_attention])
def test_gathering_before_and_dropping_after_embedding_agree(attend):
    torch.manual_seed(0)
    plain = PlainUViT(CONFIG, attend).double()
    image, t = torch.randn(3, 3, 16, 16, dtype=torch.float64), torch.tensor([0, 500, 999])
    ids = torch.rand(3, 16).argsort(1)[:, :6].sort(1).values
    hidden = torch.ones(3, 17, dtype=torch.bool).scatter(1, ids + 1, False)
    hidden[:, 0] = False
    gathered = patchify(image, 4).gather(1, ids[..., None].expand(-1, -1, 48))
    torch.testing.assert_close(plain.forward_image(image, t, hidden), plain.forward_visible(gathered, t, ids))
    torch.testing.assert_close(plain.forward_image(image, t, None), plain.forward_visible(patchify(image, 4), t, None))


def test_weights_load_by_name_both_ways():
    ours, plain = UViT(CONFIG), PlainUViT(CONFIG)
    plain.load_state_dict(ours.state_dict())
    ours.load_state_dict(plain.state_dict())


def few_images():
    torch.manual_seed(0)
    return torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8)


@pytest.mark.parametrize("rate", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["strong", "strong bf16", "published"])
def test_steps_train(kind, rate):
    images = few_images()
    if kind == "published":
        baseline = PublishedBaseline(CONFIG, images, rate, batch=8, lr=2e-3, ema=0.9, clip=1.0)
    else:
        precision = "bf16" if "bf16" in kind else "fp32"
        baseline = StrongBaseline(CONFIG, images, rate, batch=8, precision=precision, lr=2e-3, ema=0.9, clip=1.0)
        assert baseline.attention in ("sdpa", "explicit")
    losses = [float(baseline.step()) for _ in range(40)]
    assert sum(losses[-10:]) < 0.85 * sum(losses[:10])


def test_averages_follow_the_weights():
    strong = StrongBaseline(CONFIG, few_images(), 0.5, batch=4, ema=0.75)
    before = [p.detach().clone() for p in strong.parameters]
    strong.step()
    for average, old, new in zip(strong.averages, before, strong.parameters, strict=True):
        torch.testing.assert_close(average, 0.75 * old + 0.25 * new.detach())
    published = PublishedBaseline(CONFIG, few_images(), 0.5, batch=4, ema=0.75)
    before = [p.detach().clone() for p in published.model.parameters()]
    published.step()
    for average, old, new in zip(published.average.parameters(), before, published.model.parameters(), strict=True):
        torch.testing.assert_close(average.detach(), 0.75 * old + 0.25 * new.detach())


@pytest.mark.parametrize("rate, visible", [(0.0, 16), (0.5, 8), (0.9, 2)])
def test_as_many_patches_are_visible_as_the_rate_says(rate, visible, monkeypatch):
    seen = []
    original = PlainUViT.transform

    def transform(self, x):
        seen.append(x.shape[1] - 1)
        return original(self, x)

    monkeypatch.setattr(PlainUViT, "transform", transform)
    StrongBaseline(CONFIG, few_images(), rate, batch=2).step()
    PublishedBaseline(CONFIG, few_images(), rate, batch=2).step()
    assert seen == [visible, visible]
