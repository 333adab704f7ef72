"""Intervals of scores and differences: hand-worked, at the edges, and as often right as they say."""

import numpy as np
import pytest
from scipy import stats

from evals.statistics.intervals import mean_interval, mean_over, mean_over_domains, paired_difference


def test_the_interval_of_right_and_wrong_answers_by_hand():
    # Agresti & Coull: 200 + z²/2 of 400 + z².
    found = mean_interval(np.repeat([[0.0, 1.0]], 200, axis=0).reshape(1, -1))
    z_squared = stats.norm.ppf(0.975) ** 2
    half = (z_squared * 0.25 / (400 + z_squared)) ** 0.5
    assert (found.low, found.mean, found.high) == pytest.approx((0.5 - half, 0.5, 0.5 + half))


@pytest.mark.parametrize(("score", "low", "high"), [(1.0, 0.9885, 1.0), (0.0, 0.0, 0.0115)])
def test_scores_that_are_all_alike_have_an_interval(score, low, high):
    found = mean_interval(np.full((3, 400), score))
    assert (found.low, found.mean, found.high) == pytest.approx((low, score, high), abs=1e-4)


def test_scores_between_right_and_wrong_vary_less_than_a_proportion():
    scores_1N = np.random.default_rng(0).uniform(0.4, 0.6, (1, 1000))
    found, spread = mean_interval(scores_1N), scores_1N.std(ddof=1) / 1000**0.5
    assert found.high - found.low == pytest.approx(2 * 1.96 * spread, rel=0.15)


@pytest.mark.parametrize("share", [0.5, 0.8, 0.95, 0.99])
@pytest.mark.parametrize(("seeds", "examples"), [(1, 50), (1, 400), (3, 100)])
def test_it_covers_the_truth_at_least_as_often_as_it_says(share, seeds, examples):
    rng = np.random.default_rng(0)
    found = [mean_interval(rng.random((seeds, examples)) < share) for _ in range(400)]
    # Three standard errors of 400 trials below 95 %; near 1 there is no width at which it would be 95.
    assert np.mean([each.low <= share <= each.high for each in found]) >= 0.917


def test_equal_scores_differ_by_nothing_with_a_width():
    scores_SN = np.random.default_rng(1).random((3, 400))
    found = paired_difference(scores_SN, scores_SN)
    # Four made-up examples: a standard error of 2 / 400.
    half = stats.t.ppf(0.975, 399) * 2 / 400
    assert (found.low, found.mean, found.high) == pytest.approx((-half, 0.0, half))
    assert not found.shows_difference


def test_pairing_is_narrower_than_the_spread_of_either():
    base_SN = np.random.default_rng(2).random((1, 400))
    found = paired_difference(base_SN + 0.1, base_SN)
    assert found.high - found.low < 0.02 and mean_interval(base_SN).high - mean_interval(base_SN).low > 0.05


def test_copied_seeds_do_not_narrow_the_interval():
    scores_SN = (np.arange(60) < 20).astype(float)[None]
    assert mean_interval(np.repeat(scores_SN, 3, axis=0)) == mean_interval(scores_SN)


@pytest.mark.parametrize(("won", "lost"), [(0.0, 0.03), (0.02, 0.05), (0.0, 0.08), (0.3, 0.1)])
@pytest.mark.parametrize(("domains", "examples"), [(1, 100), (1, 400), (4, 50)])
def test_a_difference_is_covered_and_seldom_missed_on_one_side(won, lost, domains, examples):
    rng = np.random.default_rng(0)

    def drawn():
        u_N = rng.random(examples)
        return (u_N < won).astype(float) - ((u_N >= won) & (u_N < won + lost))

    found = [mean_over({str(n): drawn() for n in range(domains)}) for _ in range(600)]
    assert np.mean([each.low <= won - lost <= each.high for each in found]) >= 0.92
    # 4 % and two standard errors of 600 trials.
    assert np.mean([each.low > won - lost for each in found]) <= 0.056


def test_unequal_examples_are_refused():
    with pytest.raises(ValueError, match="not paired"):
        paired_difference(np.zeros((1, 3)), np.zeros((1, 4)))


def test_of_a_single_example_nothing_is_known():
    found = paired_difference(np.ones((1, 1)), np.zeros((1, 1)))
    assert (found.low, found.mean, found.high) == (-1.0, 1.0, 1.0)
    assert mean_interval(np.ones((1, 1))).low < 0.25


def test_a_mean_over_domains_weighs_them_equally():
    scores = {"a": np.ones((1, 10)), "b": np.zeros((1, 90))}
    assert mean_over_domains(scores).mean == mean_over(scores).mean == 0.5
    with pytest.raises(ValueError, match="no examples"):
        mean_over_domains({"a": np.zeros((1, 0))})
