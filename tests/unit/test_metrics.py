"""Recovery and pass@k against hand-worked values."""

from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from evals.metrics import Triple, mean_length, pass_at_k, recovery, recovery_over_seeds, truncation_rate
from tests.scored import sheet


def _share(value: float) -> np.ndarray:
    return (np.arange(100) < value * 100).astype(float)[None]


def test_recovery_is_a_ratio_of_means_over_domains():
    domains = {"a": Triple(_share(0.5), _share(0.9), _share(0.7)), "b": Triple(_share(0.2), _share(0.4), _share(0.4))}
    found = recovery(domains)
    assert found is not None
    assert found.mean == pytest.approx((0.2 + 0.2) / (0.4 + 0.2))
    assert found.low < found.mean < found.high


def _drawn(rng, seeds: int, examples: int) -> Triple:
    """A start, and a teacher and a student that gain 0.4 and 0.3 on it; seeds, examples and both together vary."""
    start_SN = np.repeat(rng.normal(0.3, 0.2, (1, examples)), seeds, axis=0)
    teacher_SN, student_SN = (
        start_SN
        + gain
        + rng.normal(0, 0.03, (seeds, 1))
        + rng.normal(0, 0.3, (1, examples))
        + rng.normal(0, 0.2, (seeds, examples))
        for gain in (0.4, 0.3)
    )
    return Triple(start_SN, teacher_SN, student_SN)


def test_the_interval_of_recovery_is_scipys_bootstrap_of_the_ratio():
    triple = _drawn(np.random.default_rng(0), 1, 120)
    gained_N, possible_N = (triple.student_SN - triple.start_SN)[0], (triple.teacher_SN - triple.start_SN)[0]
    expected = stats.bootstrap(
        (gained_N, possible_N),
        lambda gained, possible, axis: gained.mean(axis=axis) / possible.mean(axis=axis),
        paired=True,
        method="percentile",
        rng=1,
    ).confidence_interval
    found = recovery({"a": triple})
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.01)


def test_recovery_over_seeds_by_hand():
    # No variance of examples: the seeds gain 0.2, 0.3 and 0.4 of a possible 0.5, so the ratio is a t interval over 0.5.
    gained_S = np.array([0.2, 0.3, 0.4])
    flat_SN = np.zeros((3, 10))
    found = recovery_over_seeds({"a": Triple(flat_SN, flat_SN + 0.5, gained_S[:, None] + flat_SN)})
    low, high = stats.t.interval(0.95, 2, 0.3, stats.sem(gained_S))
    assert (found.mean, found.low, found.high) == pytest.approx((0.6, low / 0.5, high / 0.5))


def test_recovery_over_seeds_covers_the_truth():
    rng = np.random.default_rng(0)
    found = [recovery_over_seeds({"a": _drawn(rng, 5, 60), "b": _drawn(rng, 5, 60)}) for _ in range(1000)]
    assert 0.92 <= np.mean([one.low <= 0.75 <= one.high for one in found]) <= 0.98


def test_recovery_over_seeds_needs_a_gain_shown_over_seeds():
    flat_SN, teacher_S1 = np.zeros((3, 10)), np.array([[0.6], [0.05], [0.1]])
    assert recovery_over_seeds({"a": Triple(flat_SN, flat_SN + teacher_S1, flat_SN + 0.2)}) is None


def test_recovery_says_nothing_where_the_teacher_gained_nothing():
    assert recovery({"a": Triple(_share(0.5), _share(0.5), _share(0.7))}) is None
    assert recovery({"a": Triple(_share(0.50), _share(0.51), _share(0.7))}) is None
    assert recovery({}) is None


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_pass_at_k_equals_trying_all_subsets(k):
    samples_NK = np.array([[1, 0, 0, 1, 0], [0, 0, 0, 0, 0], [0.9, 1, 1, 1, 1]])
    tried = [[max(row[list(subset)]) >= 1 for subset in combinations(range(5), k)] for row in samples_NK]
    assert pass_at_k(samples_NK, k) == pytest.approx(np.mean(tried, axis=1))


def test_pass_at_k_refuses_more_than_was_drawn():
    with pytest.raises(ValueError, match="at least 3 samples"):
        pass_at_k(np.zeros((2, 2)), 3)


def test_shape_of_completions():
    assert truncation_rate(sheet("a", 0.25)) == 0.75
    assert mean_length(sheet("a", 0.25)) == 3


def test_recovery_of_a_gain_that_is_not_shown_is_left_out():
    start_N, teacher_N = np.tile([0.0, 1.0], 20), np.tile([0.0, 1.0], 20)
    teacher_N[:6] = [1, 0, 1, 1, 1, 1]
    # Up by 3 of 40 net, within chance.
    assert recovery({"a": Triple(start_N, teacher_N, start_N)}) is None
    assert recovery({"a": Triple(start_N, np.ones(40), np.ones(40))}).mean == 1.0
