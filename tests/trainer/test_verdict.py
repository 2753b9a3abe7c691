"""What a study claims: its intervals against scipy, its error rate by simulation, its outcomes on known truth."""

import random

import numpy as np
import pytest
from scipy import stats

from maskdiff.study import verdict

RATES = ("patch 10%", "patch 50%", "patch 90%")


def drawn(generator: random.Random, mean: float, seeds: int = 3, spread: float = 2.0) -> dict[int, float]:
    """Values whose seeds differ by 20 and more, the same for all groups: what blocks take out."""
    return {seed: generator.gauss(mean, spread) + 20 * seed**2 for seed in range(seeds)}


def seeded(*values: float) -> dict[int, float]:
    return dict(enumerate(values))


def test_intervals_equal_scipys():
    one, other = [3.1, 2.7, 3.6, 2.2], [1.4, 2.9, 1.8, 1.1]
    known = stats.ttest_rel(one, other).confidence_interval(0.95)
    found = verdict.compare(seeded(*other), {"one": seeded(*one)})["one"]
    assert (found.low, found.high) == pytest.approx((known.low, known.high), rel=1e-9)
    known = stats.ttest_1samp(one, 0).confidence_interval(0.9)
    found = verdict.mean_interval(one, 0.9)
    assert (found.low, found.high) == pytest.approx((known.low, known.high), rel=1e-9)


def test_intervals_of_several_groups_are_those_of_a_linear_model():
    """Least squares on a column for each group and for each seed but the first; three comparisons."""
    values = np.random.default_rng(1).normal(size=(4, 3))
    design = np.zeros((12, 6))
    for number, (group, seed) in enumerate(np.ndindex(4, 3)):
        design[number, group] = 1
        if seed:
            design[number, 3 + seed] = 1
    solved, squares, _, _ = np.linalg.lstsq(design, values.ravel(), rcond=None)
    variance, freedom = squares[0] / (12 - 6), 12 - 6
    contrast = np.array([-1.0, 0, 1, 0, 0, 0])
    error = (variance * contrast @ np.linalg.inv(design.T @ design) @ contrast) ** 0.5
    half = error * stats.t.ppf((1 + 0.95 ** (1 / 3)) / 2, freedom)
    found = verdict.compare(seeded(*values[0]), {str(group): seeded(*values[group]) for group in (1, 2, 3)})["2"]
    mean = contrast @ solved
    assert (found.mean, found.low, found.high) == pytest.approx((mean, mean - half, mean + half), rel=1e-9)


def test_residuals_of_other_comparisons_are_pooled():
    """Three cases of two groups, of two, three and two seeds: four degrees of freedom."""
    generator = np.random.default_rng(2)
    cases = [generator.normal(size=(2, seeds)) + 10 * case for case, seeds in enumerate((2, 3, 2))]
    squares = sum(((one - other - (one - other).mean()) ** 2).sum() / 2 for one, other in cases)
    base, values = cases[0]
    mean = (values - base).mean()
    half = stats.t.ppf(0.975, 4) * (2 * squares / 4 / 2) ** 0.5
    layouts = [verdict.Layout.of({"": seeded(*one), "a": seeded(*other)}) for one, other in cases[1:]]
    found = verdict.compare(seeded(*base), {"a": seeded(*values)}, layouts)["a"]
    assert (found.mean, found.low, found.high) == pytest.approx((mean, mean - half, mean + half), rel=1e-9)
    told = verdict.decide(seeded(*base), {"a": seeded(*values)}, "distance", beside=layouts)
    assert told.differences["a"] == found and "4 degrees of freedom" in told.method


def test_seeds_that_one_group_lacks_are_left_out():
    groups = {"a": {0: 1.0, 1: 2.0, 2: 9.0}, "b": {0: 3.0, 2: 4.5}, "c": {7: 5.0}}
    found = verdict.compare({0: 0.0, 1: 100.0, 2: 0.5}, groups)
    assert found["a"].mean == pytest.approx((1 + 8.5) / 2) and found["a"].low is not None
    assert found["c"].low is None and found["c"].mean == pytest.approx(5 - 100.5 / 3)


@pytest.mark.parametrize("seeds", [3, 5])
def test_all_intervals_hold_together_as_often_as_promised(seeds):
    """With and without true differences; the bounds are 4.5 standard errors of a share in so many studies."""
    generator, studies = random.Random(seeds), 600
    truth = {"patch 10%": 0.0, "patch 50%": 0.0, "patch 90%": 4.0}
    held = 0
    for _ in range(studies):
        found = verdict.compare(
            drawn(generator, 0, seeds), {key: drawn(generator, at, seeds) for key, at in truth.items()}
        )
        held += all(gap.low <= truth[key] <= gap.high for key, gap in found.items())
    assert held / studies > 0.95 - 4.5 * (0.95 * 0.05 / studies) ** 0.5


def test_dense_that_is_no_worse_is_seldom_beaten():
    generator, studies = random.Random(5), 600
    won = 0
    for _ in range(studies):
        groups = {name: drawn(generator, 200, 3) for name in RATES}
        won += verdict.decide(drawn(generator, 200, 3), groups, "distance").outcome == "better"
    assert won / studies < 0.025 + 4.5 * (0.025 * 0.975 / studies) ** 0.5


@pytest.mark.parametrize(
    ("means", "outcome", "best", "says"),
    [
        ((203, 150, 190), "better", "patch 50%", "pre-train at patch 50%"),
        ((200.5, 200.2, 201), "none", None, "No rate can be told apart from dense training"),
        ((240, 260, 230), "dense", "patch 90%", "Masking does not pay here: dense training is better"),
    ],
)
def test_outcomes_on_known_truth(means, outcome, best, says):
    generator = random.Random(2)
    groups = {name: drawn(generator, mean, 4) for name, mean in zip(RATES, means, strict=True)}
    found = verdict.decide(drawn(generator, 200, 4), groups, "distance")
    assert found.outcome == outcome and says in found.sentence
    assert best is None or (found.best == best and best in found.sentence)
    assert "3 comparisons" in found.method and "Šidák" in found.method


def test_what_cannot_be_told_from_the_best_is_named():
    groups = {
        "a": seeded(150.0, 152.0, 151.0),
        "b": seeded(151.0, 153.0, 150.5),
        "c": seeded(190.0, 191.0, 192.0),
        "d": seeded(240.0, 241, 242),
    }
    found = verdict.decide(seeded(200.0, 201.0, 202.0), groups, "distance")
    assert (found.best, found.near, found.worse) == ("a", ["b"], ["d"])
    assert "cannot be told apart from b." in found.sentence and "Worse than dense training: d." in found.sentence
    assert set(verdict.near_best(groups)) == {"a", "b"}


def test_too_few_seeds_are_no_verdict():
    single = verdict.decide(seeded(200.0), {"a": seeded(150.0), "b": seeded(170.0)}, "distance")
    assert single.outcome == "open" and "a (150 against 200" in single.sentence and "--seeds 3" in single.sentence
    assert verdict.decide(seeded(), {"a": seeded(1.0, 2.0)}, "distance").outcome == "open"
    assert verdict.decide(seeded(1.0, 2.0), {}, "distance").outcome == "open"
    groups = {"a": seeded(100.0), "b": seeded(150.0, 151.0, 152.0)}
    mixed = verdict.decide(seeded(200.0, 201.0, 202.0), groups, "distance")
    assert mixed.outcome == "better" and mixed.best == "b" and mixed.near == ["a"]  # a is lower, by a single seed


def test_numbers_keep_three_digits():
    assert [verdict.number(value) for value in (171.04, 17.1, 1.71, 0.01714, 0.0, 1234.5, 999999.4, 12331321801.0)] == [
        *("171", "17.1", "1.71", "0.0171", "0", "1234", "999999", "1.23e+10"),
    ]
