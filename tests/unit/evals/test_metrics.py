"""Recovery and pass@k against hand-worked values."""

from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from evals.comparison.metrics import Triple, pass_at_k, recovery

pytestmark = pytest.mark.slow


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


def test_the_interval_of_recovery_is_fiellers():
    """The roots of the quadratic (gained - r possible)² = t² variance, with nothing made up but four examples."""
    triple = _drawn(np.random.default_rng(0), 1, 120)
    gained_N, possible_N = (triple.student_SN - triple.start_SN)[0], (triple.teacher_SN - triple.start_SN)[0]
    found = recovery({"a": triple})
    for ratio in (found.low, found.high):
        rest_N = gained_N - ratio * possible_N
        seen, made_up = rest_N.var(ddof=1) / 120, 4 * max(1, ratio) ** 2 / 120**2
        freedom = (seen + made_up) ** 2 / (seen**2 / 119 + made_up**2 / 119)
        assert abs(rest_N.mean()) / (seen + made_up) ** 0.5 == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-4)
    bootstrap = stats.bootstrap(
        (gained_N, possible_N),
        lambda gained, possible, axis: gained.mean(axis=axis) / possible.mean(axis=axis),
        paired=True,
        method="percentile",
        rng=1,
    ).confidence_interval
    # Away from the edges the bootstrap agrees.
    assert (found.low, found.high) == pytest.approx((bootstrap.low, bootstrap.high), abs=0.03)


def test_an_equal_student_is_not_certain_to_have_recovered_everything():
    start_1N, perfect_1N = _share(0.5), np.ones((1, 100))
    found = recovery({"a": Triple(start_1N, perfect_1N, perfect_1N)})
    assert found.mean == 1 and 0.9 < found.low < 0.97 and 1.03 < found.high < 1.1


@pytest.mark.parametrize("examples", [20, 50, 400])
@pytest.mark.parametrize(("teacher", "student"), [(1.0, 0.98), (0.99, 0.99), (0.9, 0.8)])
def test_recovery_covers_the_truth_at_the_ceiling(examples, teacher, student):
    """Of 300 draws, those in which the teachers' gain is shown."""
    rng, covered, told = np.random.default_rng(examples), 0, 0
    for _ in range(300):
        luck_N = rng.random(examples)
        own_N = np.where(rng.random(examples) < 0.7, luck_N, rng.random(examples))
        shares = rng.random(examples) < 0.4, luck_N < teacher, own_N < student
        found = recovery({"a": Triple(*(row_N[None].astype(float) for row_N in shares))})
        told += found is not None
        covered += found is not None and found.low <= (student - 0.4) / (teacher - 0.4) <= found.high
    assert covered / told >= 0.93


def test_recovery_for_new_seeds_by_hand():
    # No variance of examples: the seeds gain 0.2, 0.3 and 0.4 of a possible 0.5, so the ratio is a t interval over 0.5,
    # but for the made-up examples of a table of ten thousand.
    gained_S = np.array([0.2, 0.3, 0.4])
    flat_SN = np.zeros((3, 10_000))
    found = recovery({"a": Triple(flat_SN, flat_SN + 0.5, gained_S[:, None] + flat_SN)}, new_seeds=True)
    low, high = stats.t.interval(0.95, 2, 0.3, stats.sem(gained_S))
    assert (found.mean, found.low, found.high) == pytest.approx((0.6, low / 0.5, high / 0.5), abs=1e-4)


def test_recovery_for_new_seeds_covers_the_truth():
    rng = np.random.default_rng(0)
    found = [recovery({"a": _drawn(rng, 5, 60), "b": _drawn(rng, 5, 60)}, new_seeds=True) for _ in range(300)]
    assert 0.92 <= np.mean([one.low <= 0.75 <= one.high for one in found]) <= 0.995


def test_recovery_for_new_seeds_needs_a_gain_shown_over_seeds():
    flat_SN, teacher_S1 = np.zeros((3, 10)), np.array([[0.6], [0.05], [0.1]])
    assert recovery({"a": Triple(flat_SN, flat_SN + teacher_S1, flat_SN + 0.2)}, new_seeds=True) is None


def test_recovery_says_nothing_of_a_single_example():
    one = Triple(np.zeros((1, 1)), np.ones((1, 1)), np.ones((1, 1)))
    assert recovery({"a": one}) is None and recovery({"a": one}, new_seeds=True) is None


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


def test_recovery_of_a_gain_that_is_not_shown_is_left_out():
    start_N, teacher_N = np.tile([0.0, 1.0], 20), np.tile([0.0, 1.0], 20)
    teacher_N[:6] = [1, 0, 1, 1, 1, 1]
    # Up by 3 of 40 net, within chance.
    assert recovery({"a": Triple(start_N, teacher_N, start_N)}) is None
    assert recovery({"a": Triple(start_N, np.ones(40), np.ones(40))}).mean == 1.0
