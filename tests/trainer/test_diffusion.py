"""Schedules against published figures and closed forms; min-SNR weights; conversions between eps, x0 and v."""

import math

import pytest
import torch

from maskdiff.diffusion import TARGETS, Diffusion, DiffusionConfig
from maskdiff.errors import UserError


def kept(config: DiffusionConfig):
    """alpha-bar in float64."""
    return torch.cumprod(1 - Diffusion(config).betas, 0)


def test_linear_is_that_of_ddpm():
    diffusion = Diffusion(DiffusionConfig("linear"))
    assert diffusion.betas.dtype == torch.float64 and diffusion.betas.shape == (1000,)
    assert diffusion.betas[[0, -1]].tolist() == pytest.approx([1e-4, 0.02], rel=1e-12)
    expected = math.prod(1 - (1e-4 + i * (0.02 - 1e-4) / 999) for i in range(1000))  # 4.04e-5, as known of DDPM
    assert diffusion.alpha_sigma[-1, 0].item() == pytest.approx(math.sqrt(expected), rel=1e-6)
    assert expected == pytest.approx(4.04e-5, abs=5e-8)


def test_linear_with_other_step_counts_ends_as_noisy():
    short, long = (kept(DiffusionConfig("linear", timesteps=steps))[-1].log() for steps in (250, 1000))
    assert short.item() == pytest.approx(long.item(), rel=0.03)


def test_cosine_is_the_closed_form_until_betas_are_clipped():
    def f(t):
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    diffusion = Diffusion(DiffusionConfig("cosine"))
    expected = torch.tensor([f(t + 1) / f(0) for t in range(999)], dtype=torch.float64)
    torch.testing.assert_close(torch.cumprod(1 - diffusion.betas, 0)[:999], expected, rtol=1e-9, atol=0)
    assert diffusion.betas[-1] == 0.999 and diffusion.betas[:-1].max() < 0.999


@pytest.mark.parametrize("shift", [0.5, 2.0, 4.0])
def test_shift_lowers_the_log_snr(shift):
    start = math.cos(0.008 / 1.008 * math.pi / 2) ** 2  # alpha-bar before the first step, divided out of the schedule
    ratio = 1 / shift**2
    shifted_start = ratio * start / (1 - start + ratio * start)

    def logit(x):
        return torch.log(x) - torch.log1p(-x)

    plain = kept(DiffusionConfig("cosine"))[:990] * start
    shifted = kept(DiffusionConfig("shifted-cosine", shift))[:990] * shifted_start
    difference = logit(shifted) - logit(plain)
    torch.testing.assert_close(difference, torch.full_like(difference, -2 * math.log(shift)), rtol=1e-6, atol=1e-9)


def test_shift_of_one_is_the_cosine():
    torch.testing.assert_close(
        Diffusion(DiffusionConfig("shifted-cosine")).betas,
        Diffusion(DiffusionConfig("cosine")).betas,
        rtol=1e-9,
        atol=0,
    )


@pytest.mark.parametrize("schedule", ["linear", "cosine", "shifted-cosine"])
def test_alpha_and_sigma_keep_the_variance(schedule):
    table = Diffusion(DiffusionConfig(schedule)).alpha_sigma
    assert table.dtype == torch.float32 and table.shape == (1000, 2)
    torch.testing.assert_close(table.square().sum(1), torch.ones(1000))
    assert (table[1:, 0] < table[:-1, 0]).all() and (table[1:, 1] >= table[:-1, 1]).all()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("option, plus", [("min_snr", 0), ("v_loss", 1)])
def test_weights_are_on_the_error_of_x0_whatever_the_target(target, option, plus):
    """With an estimate of x0 off by d, each target's squared error times its weight is min(SNR (+ 1), 5) d^2."""
    diffusion = Diffusion(DiffusionConfig("cosine", target=target, **{option: 5.0}))
    t = torch.arange(10, 990)
    alpha, sigma = diffusion.alpha_sigma[t].double().unbind(1)
    x0, eps, off = torch.tensor(0.3), torch.tensor(-0.8), torch.tensor(0.01)
    x_t = alpha * x0 + sigma * eps
    estimate = x0 + off
    implied_eps = (x_t - alpha * estimate) / sigma
    made = {"x0": estimate.expand(len(t)), "eps": implied_eps, "v": alpha * implied_eps - sigma * estimate}[target]
    true = {"x0": x0, "eps": eps, "v": alpha * eps - sigma * x0}[target]
    got = diffusion.weight[t] * (made - true) ** 2
    snr = (alpha / sigma) ** 2
    torch.testing.assert_close(got, (snr + plus).clamp(max=5.0) * off**2, rtol=1e-3, atol=0, check_dtype=False)
    assert (snr > 5).any() and (snr < 5).any()


def test_no_weights_unless_asked():
    assert Diffusion(DiffusionConfig()).weight is None


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_conversions_invert(schedule, target):
    diffusion = Diffusion(DiffusionConfig(schedule, target=target))
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 5, 3, 4, 4, generator=generator)
    t = torch.tensor([0, 1, 300, 700, 900])
    alpha, sigma = diffusion.alpha_sigma[t].view(5, 2, 1, 1, 1).unbind(1)
    x_t = alpha * x0 + sigma * eps
    prediction = diffusion.to_target(x0, eps, t)
    torch.testing.assert_close(diffusion.to_x0(prediction, x_t, t), x0, rtol=1e-3, atol=2e-4)
    torch.testing.assert_close(diffusion.to_eps(prediction, x_t, t), eps, rtol=1e-3, atol=2e-4)
    assert diffusion.to_x0(prediction.bfloat16(), x_t, t).dtype == torch.float32


def test_targets_differ():
    x0, eps, t = torch.ones(1, 2), torch.zeros(1, 2), torch.tensor([500])
    made = {target: Diffusion(DiffusionConfig(target=target)).to_target(x0, eps, t)[0, 0].item() for target in TARGETS}
    sigma = Diffusion(DiffusionConfig()).alpha_sigma[500, 1].item()
    assert made == {"eps": 0.0, "x0": 1.0, "v": pytest.approx(-sigma)}


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"schedule": "sigmoid"}, "linear, cosine, shifted-cosine"),
        ({"target": "score"}, "eps, x0, v"),
        ({"schedule": "shifted-cosine", "shift": 0.0}, "positive"),
        ({"schedule": "cosine", "shift": 2.0}, "choose shifted-cosine"),
        ({"timesteps": 10}, "at least 21"),
        ({"min_snr": 0.0}, "positive"),
        ({"v_loss": -1.0}, "positive"),
        ({"v_loss": 5.0, "min_snr": 5.0}, "set one"),
    ],
)
def test_settings_that_do_not_exist(settings, words):
    with pytest.raises(UserError, match=words):
        DiffusionConfig(**settings)
