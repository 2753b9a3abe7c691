"""What a study claims: its intervals against scipy, its error rate by simulation, its outcomes on known truth."""

import random

import pytest
from scipy import stats

from maskdiff.study import verdict

RATES = ("patch 10%", "patch 50%", "patch 90%")


def drawn(generator: random.Random, mean: float, seeds: int = 3, spread: float = 2.0) -> list[float]:
    return [generator.gauss(mean, spread) for _ in range(seeds)]


def test_intervals_equal_scipys():
    one, other = [3.1, 2.7, 3.6, 2.2], [1.4, 2.9, 1.8]
    known = stats.ttest_ind(one, other, equal_var=False).confidence_interval(0.95)
    found = verdict.difference(one, other)
    assert (found.low, found.high) == pytest.approx((known.low, known.high), rel=1e-9)
    known = stats.ttest_1samp(one, 0).confidence_interval(0.9)
    found = verdict.mean_interval(one, 0.9)
    assert (found.low, found.high) == pytest.approx((known.low, known.high), rel=1e-9)
    family = verdict.compare(other, {name: one for name in RATES})  # three comparisons: each at 1 - 0.95^(1/3)
    known = stats.ttest_ind(one, other, equal_var=False).confidence_interval(0.95 ** (1 / 3))
    assert all(gap.low == pytest.approx(known.low, rel=1e-9) for gap in family.values())


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
        "a": [150.0, 152.0, 151.0],
        "b": [151.0, 153.0, 150.5],
        "c": [190.0, 191.0, 192.0],
        "d": [240.0, 241, 242],
    }
    found = verdict.decide([200.0, 201.0, 202.0], groups, "distance")
    assert (found.best, found.near, found.worse) == ("a", ["b"], ["d"])
    assert "cannot be told apart from b." in found.sentence and "Worse than dense training: d." in found.sentence
    assert set(verdict.near_best(groups)) == {"a", "b"}


def test_too_few_seeds_are_no_verdict():
    single = verdict.decide([200.0], {"a": [150.0], "b": [170.0]}, "distance")
    assert single.outcome == "open" and "a (150 against 200" in single.sentence and "--seeds 3" in single.sentence
    assert verdict.decide([], {"a": [1.0, 2.0]}, "distance").outcome == "open"
    assert verdict.decide([1.0, 2.0], {}, "distance").outcome == "open"
    mixed = verdict.decide([200.0, 201.0, 202.0], {"a": [100.0], "b": [150.0, 151.0, 152.0]}, "distance")
    assert mixed.outcome == "better" and mixed.best == "b" and mixed.near == ["a"]  # a is lower, by a single seed


def test_numbers_keep_three_digits():
    assert [verdict.number(value) for value in (171.04, 17.1, 1.71, 0.01714, 0.0, 1234.5)] == [
        *("171", "17.1", "1.71", "0.0171", "0", "1234"),
    ]
