"""Crossed random effects: scipy's t-tests as their limits, a table worked by hand, and how often intervals cover."""

import numpy as np
import pytest
from scipy import stats

from evals.statistics.crossed_effects import over_both, over_examples, over_seeds

pytestmark = pytest.mark.slow

SEEDS_S1 = np.array([0.1, 0.25, 0.2, -0.05, 0.15])[:, None]
EXAMPLES_1N = np.random.default_rng(0).normal(0.1, 0.4, (1, 80))


def bounds(estimate, confidence=0.95):
    interval = estimate.interval(confidence)
    return interval.low, interval.high


@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_without_variance_of_examples_it_is_the_t_test_of_the_seeds_means(confidence):
    found, means_S = over_both({"a": np.repeat(SEEDS_S1, 60, axis=1)}), SEEDS_S1[:, 0]
    expected = stats.ttest_1samp(means_S, 0)
    assert bounds(found, confidence) == pytest.approx(tuple(expected.confidence_interval(confidence)))
    assert (found.p, found.seeds.freedom, found.examples.variance) == (pytest.approx(expected.pvalue), 4, 0)
    assert bounds(over_seeds(means_S), confidence) == pytest.approx(bounds(found, confidence))


def test_equal_seeds_are_the_paired_t_test_of_the_examples():
    a_1N, b_1N = EXAMPLES_1N, np.random.default_rng(1).normal(0, 0.4, (1, 80))
    expected = stats.ttest_rel(a_1N[0], b_1N[0])
    found = over_both({"a": np.repeat(a_1N - b_1N, 5, axis=0)})
    assert bounds(found) == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert (found.p, found.examples.freedom) == (pytest.approx(expected.pvalue), pytest.approx(79))


def test_seeds_that_differ_by_noise_alone_are_nearly_that():
    noise_SN = np.random.default_rng(2).normal(0, 0.05, (5, 80))
    table_SN = EXAMPLES_1N + noise_SN - noise_SN.mean(axis=0)
    low, high = stats.ttest_1samp(EXAMPLES_1N[0], 0).confidence_interval(0.95)
    assert bounds(over_both({"a": table_SN})) == pytest.approx((low, high), abs=0.04 * (high - low))


def test_a_table_of_two_seeds_and_three_examples_by_hand():
    # Rows 0 1 5 and 1 4 7: seeds' means 2 and 4, examples' 0.5, 2.5 and 6, all 3; rests +-(0.5, -0.5, 0).
    # MS_seed 6 / 1, MS_example 2 (6.25 + 0.25 + 9) / 2 = 15.5, MS_rest 4 * 0.25 / 2 = 0.5.
    found = over_both({"a": np.array([[0.0, 1.0, 5.0], [1.0, 4.0, 7.0]])})
    assert (found.mean, found.variance) == (3, pytest.approx((6 + 15.5 - 0.5) / 6))
    assert (found.seeds.variance, found.seeds.freedom) == (pytest.approx(1), 1)
    assert found.examples.freedom == pytest.approx(15**2 / (15.5**2 / 2 + 0.5**2 / 2))
    # The same tail by drawing the seeds' variance from its fiducial distribution.
    sums = 1 / np.random.default_rng(0).chisquare(1, 1_000_000) + 2.5
    drawn = stats.t.sf(3 / sums**0.5, found.examples.freedom * (sums / 2.5) ** 2).mean()
    assert found.p == pytest.approx(2 * drawn, rel=0.01)
    low, high = bounds(found)
    assert (found.above(low), found.below(high)) == (pytest.approx(0.025), pytest.approx(0.025))
    assert (low + high) / 2 == pytest.approx(3)


def test_examples_that_vary_less_than_the_rest_take_nothing_off():
    # Examples' means are all 1, so MS_example is 0 and MS_rest is not.
    table_SN = np.array([[0.0, 2.0, 2.5], [2.0, 0.0, -0.5]])
    found = over_both({"a": table_SN})
    assert found.variance == pytest.approx(np.var(table_SN.mean(axis=1), ddof=1) / 2) and found.seeds.freedom == 1


def test_domains_share_seeds_and_not_examples():
    opposed = over_both({"a": np.repeat(SEEDS_S1, 20, axis=1), "b": np.repeat(-SEEDS_S1, 30, axis=1)})
    assert (opposed.mean, opposed.variance) == (0, 0) and opposed.p == 1
    same = over_both({"a": np.repeat(SEEDS_S1, 20, axis=1), "b": np.repeat(SEEDS_S1, 30, axis=1)})
    assert bounds(same) == pytest.approx(bounds(over_seeds(SEEDS_S1[:, 0])))
    b_1N = np.random.default_rng(3).normal(0, 0.2, (1, 30))
    split = over_both({"a": np.repeat(EXAMPLES_1N, 4, axis=0), "b": np.repeat(b_1N, 4, axis=0)})
    # The mean of two domains: half of a sum of two independent samples, which is Welch's test.
    welch = stats.ttest_ind(EXAMPLES_1N[0], -b_1N[0], equal_var=False)
    assert split.p == pytest.approx(welch.pvalue)
    assert bounds(split) == pytest.approx(tuple(bound / 2 for bound in welch.confidence_interval(0.95)))
    made_up = 4 / (2 * min(EXAMPLES_1N.shape[1], 30)) ** 2
    assert over_examples({"a": EXAMPLES_1N, "b": b_1N}).variance == pytest.approx(split.variance + made_up)


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize(
    ("of_seeds", "of_examples", "of_rest"),
    [(0.1, 0.05, 0.1), (0.0, 0.4, 0.2), (0.05, 0.3, 0.2), (0.02, 0.3, 0.4)],
    ids=["seeds", "examples", "mixed", "rest"],
)
def test_it_covers_the_truth_as_often_as_it_says(seeds, of_seeds, of_examples, of_rest):
    rng, covered = np.random.default_rng(0), 0
    for _ in range(2000):
        table_SN = rng.normal(0, of_seeds, (seeds, 1)) + rng.normal(0, of_examples, (1, 60))
        table_SN = table_SN + rng.normal(0, of_rest, (seeds, 60))
        low, high = bounds(over_both({"a": table_SN}))
        covered += low <= 0 <= high
    assert 0.94 <= covered / 2000 <= 0.99


@pytest.mark.parametrize("of_seeds", [0.0, 0.02, 0.1])
def test_far_tails_are_no_heavier_than_told(of_seeds):
    """As Holm's correction needs them: of 5,000 tests at 0.1 % no more than 11 err, four standard errors above 5.

    With Satterthwaite's degrees of freedom seeds that happen to agree make it 20 and more.
    """
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(5000):
        table_SN = rng.normal(0, of_seeds, (5, 1)) + rng.normal(0, 0.3, (1, 60)) + rng.normal(0, 0.2, (5, 60))
        wrong += over_both({"a": table_SN}).above(0.0) < 0.001
    assert wrong <= 11


def test_equal_answers_of_all_seeds_are_not_certain():
    same = {"a": np.zeros((3, 20))}
    assert over_both(same).variance == 0
    assert over_both(same, 1.0) == over_examples(same)
    assert over_both(same, 1.0).above(-0.08) > 0.025
    assert over_both(same, 3.0).variance == pytest.approx(9 * over_both(same, 1.0).variance)


def test_two_domains_are_covered_as_well():
    rng, covered = np.random.default_rng(0), 0
    for _ in range(2000):
        skill_S1 = rng.normal(0, 0.05, (5, 1))
        tables = {
            name: skill_S1 + rng.normal(0, 0.05, (5, 1)) + rng.normal(0, 0.3, (1, n)) + rng.normal(0, 0.2, (5, n))
            for name, n in (("a", 40), ("b", 90))
        }
        low, high = bounds(over_both(tables))
        covered += low <= 0 <= high
    assert 0.94 <= covered / 2000 <= 0.98


def test_what_nothing_can_be_said_of_is_refused():
    with pytest.raises(ValueError, match="a single seed"):
        over_both({"a": np.zeros((1, 5))})
    with pytest.raises(ValueError, match="seeds not paired: 2, 3"):
        over_both({"a": np.zeros((2, 5)), "b": np.zeros((3, 5))})
    with pytest.raises(ValueError, match="two examples"):
        over_both({"a": np.zeros((3, 1))})
    with pytest.raises(ValueError, match="no domains"):
        over_examples({})
