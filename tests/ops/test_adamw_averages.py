"""Averages by a power function: the published widths, what a width means, errors."""

import math

import pytest
import torch

import maskdiff_kernels as mk
from maskdiff_kernels.ops.adamw_ema import averages, cpp
from maskdiff_kernels.ops.adamw_ema.state import Update, flatten


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_widths_of_the_paper(sigma_rel, gamma):
    """arXiv 2312.02696, section 3.1, says them to two digits."""
    assert mk.PowerEma.of_width(sigma_rel).gamma == pytest.approx(gamma, abs=0.005)


@pytest.mark.parametrize("sigma_rel", [1e-4, 0.01, 0.05, 0.1, 0.2, 12**-0.5])
def test_a_width_is_found_again(sigma_rel):
    assert mk.PowerEma.of_width(sigma_rel).sigma_rel == pytest.approx(sigma_rel, rel=1e-9)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.25])
def test_a_width_is_the_spread_of_what_an_average_is_made_of(sigma_rel):
    """Of the shares that the weights of 4000 updates have in it, as their decays make them."""
    power, count = mk.PowerEma.of_width(sigma_rel), 4000
    seen = torch.arange(1, count + 1, dtype=torch.float64)
    decays = torch.stack([averages.decay(k, *averages.numbers(power)) for k in seen])
    shares = (1 - decays) * torch.cat([decays[1:].flip(0).cumprod(0).flip(0), torch.ones(1, dtype=torch.float64)])
    assert shares.sum() == pytest.approx(1, rel=1e-12)
    mean = (shares * seen).sum()
    spread = (shares * (seen - mean) ** 2).sum().sqrt() / count
    assert spread == pytest.approx(sigma_rel, rel=1e-3)  # steps of 1/4000


@pytest.mark.parametrize("gamma", [averages.NO_POWER, 0.0, 6.94])
@pytest.mark.parametrize("every", [1, 3, 10, 1000])
def test_the_decays_of_several_updates_are_multiplied(every, gamma):
    """Finite also at updates where it means nothing."""
    seen = torch.arange(2 * every + 1, dtype=torch.float64)
    single, found = ([averages.decay(k, 0.5, gamma, n) for k in seen] for n in (1, every))
    assert torch.stack(found).isfinite().all()
    for end in (every, 2 * every):
        product = torch.stack(single[end - every + 1 : end + 1]).prod()
        torch.testing.assert_close(found[end], product, rtol=1e-13, atol=0)


@pytest.mark.parametrize("gamma", [-0.1, math.inf, math.nan])
def test_gammas_that_are_none(gamma):
    with pytest.raises(ValueError, match=f"^gamma: got {gamma}, takes 0 or more"):
        mk.PowerEma(gamma)


@pytest.mark.parametrize("sigma_rel", [0.0, 0.289, -0.1, math.nan])
def test_widths_that_are_none(sigma_rel):
    with pytest.raises(ValueError, match=f"^sigma_rel: got {sigma_rel}, takes more than 0 and at most 0.2887"):
        mk.PowerEma.of_width(sigma_rel)


@pytest.mark.parametrize("name", ["ema_gamma", "ema2_gamma"])
@pytest.mark.parametrize("gamma", [-0.5, math.nan])
def test_the_op_refuses_numbers_that_no_power_average_has(name, gamma):
    flats, counts = [torch.zeros(3) for _ in range(4)], [torch.zeros(()), torch.zeros(())]
    state = mk.AdamState(*flats, *counts, offsets=[0], sizes=[3], decays=[True])
    update = Update(*flatten(state, [torch.zeros(3)], torch.zeros(2), (0.9, 0.99), 1e-8, 0.0, 0.9, 0.9))
    with pytest.raises(ValueError, match=f"^{name}: got {gamma}, takes 0 to inf"):
        update._replace(**{name: gamma}).check()


@pytest.mark.parametrize("every", [-1, 0])
def test_the_compiled_code_refuses_what_divides_no_updates(every):
    flats, counts = [torch.zeros(3) for _ in range(4)], [torch.zeros(()), torch.zeros(())]
    state = mk.AdamState(*flats, *counts, offsets=[0], sizes=[3], decays=[True])
    numbers = ((0.9, 0.99), 1e-8, 0.0, 0.9, 0.9, every)
    with pytest.raises(ValueError, match="^maskdiff_cpu_adamw_ema: got an option that the compiled library does not"):
        cpp.run(Update(*flatten(state, [torch.zeros(3)], torch.zeros(2), *numbers)))
