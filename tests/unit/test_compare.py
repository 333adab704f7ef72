"""The bootstrap: known widths, pairing, determinism."""

import numpy as np
import pytest

from evals.compare import mean_interval, mean_over, paired_difference


def test_interval_of_a_proportion_has_the_normal_width():
    scores_SN = np.array([[1.0] * 200 + [0.0] * 200])
    found = mean_interval(scores_SN)
    assert found.mean == 0.5
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * 0.5 / 20, rel=0.06)
    assert found == mean_interval(scores_SN)


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    intervals = [mean_interval(rng.random((1, 80)) < 0.6) for _ in range(200)]
    covered = np.mean([found.low <= 0.6 <= found.high for found in intervals])
    assert 0.89 <= covered <= 0.99


def test_equal_scores_differ_by_exactly_nothing():
    scores_SN = np.random.default_rng(1).random((3, 50))
    found = paired_difference(scores_SN, scores_SN)
    assert (found.mean, found.low, found.high) == (0, 0, 0)
    assert not found.shows_difference


def test_pairing_is_narrower_than_the_spread_of_either():
    base_SN = np.random.default_rng(2).random((1, 100))
    found = paired_difference(base_SN + 0.1, base_SN)
    assert found.low == pytest.approx(0.1) and found.high == pytest.approx(0.1)


def test_copied_seeds_do_not_narrow_the_interval():
    scores_SN = (np.arange(60) < 20).astype(float)[None]
    assert mean_interval(np.repeat(scores_SN, 3, axis=0)).low == pytest.approx(mean_interval(scores_SN).low)


def test_unequal_examples_are_refused():
    with pytest.raises(ValueError, match="not paired"):
        paired_difference(np.zeros((1, 3)), np.zeros((1, 4)))


def test_mean_over_strata_weighs_domains_equally():
    found = mean_over({"a": np.ones((1, 10)), "b": np.zeros((1, 90))})
    assert (found.mean, found.low, found.high) == (0.5, 0.5, 0.5)
