"""Tests of paired scores against scipy's own and hand-worked tables."""

import numpy as np
import pytest
from scipy import stats

from evals.statistics.intervals import paired_difference
from evals.statistics.tests_of_scores import holm, intersection_union, mean_superiority, non_inferiority

RNG = np.random.default_rng(0)
A_SN = (RNG.random((3, 120)) < 0.62).astype(float)
B_SN = (RNG.random((3, 120)) < 0.60).astype(float)


def tail(mean: float, variances: list[float], freedoms: list[int]) -> float:
    """P-value of a t statistic with Satterthwaite's degrees of freedom, from the parts of its variance."""
    whole = sum(variances)
    freedom = whole**2 / sum(part**2 / free for part, free in zip(variances, freedoms, strict=True))
    return float(stats.t.sf(mean / whole**0.5, freedom))


def test_superiority_and_non_inferiority_are_the_paired_t_with_four_made_up_examples():
    difference_N = A_SN.mean(axis=0) - B_SN.mean(axis=0)
    variances = [difference_N.var(ddof=1) / 120, 4 / 120**2]
    expected = tail(difference_N.mean(), variances, [119, 119])
    assert mean_superiority({"a": (A_SN, B_SN)}) == pytest.approx(expected)
    shifted = tail(difference_N.mean() + 0.08, variances, [119, 119])
    assert non_inferiority(A_SN, B_SN, 0.08) == pytest.approx(shifted)


def test_of_many_examples_they_are_scipys():
    a_N, b_N = np.tile(A_SN[0], 1000), np.tile(B_SN[0], 1000)
    expected = stats.ttest_rel(a_N + 0.025, b_N, alternative="greater").pvalue
    assert 0.01 < expected != non_inferiority(a_N, b_N, 0.025) == pytest.approx(expected, rel=0.01)


def test_a_better_mean_over_domains_is_welchs_t_of_the_strata_with_four_made_up_examples():
    c_SN, d_SN = RNG.random((3, 40)), RNG.random((3, 40)) - 0.1
    first_N, second_N = (A_SN - B_SN).mean(axis=0), (c_SN - d_SN).mean(axis=0)
    variances = [first_N.var(ddof=1) / 120 / 4, second_N.var(ddof=1) / 40 / 4, 4 / (2 * 40) ** 2]
    expected = tail((first_N.mean() + second_N.mean()) / 2, variances, [119, 39, 158])
    assert mean_superiority({"a": (A_SN, B_SN), "c": (c_SN, d_SN)}) == pytest.approx(expected)


def test_domains_count_alike_whatever_their_number_of_examples():
    # Up 0.1 on 4000 examples and down 0.2 on 100: the pooled mean rises, that of the domains falls.
    up_N, down_N = np.tile([0.0, 0.2], 2000), np.tile([-0.3, -0.1], 50)
    strata = {"a": (up_N, np.zeros(4000)), "b": (down_N, np.zeros(100))}
    pooled_N = np.concatenate([up_N, down_N])
    assert mean_superiority({"all": (pooled_N, np.zeros(4100))}) < 0.001 and mean_superiority(strata) > 0.98


def test_differences_without_spread_are_not_certain_and_no_domains_a_mistake():
    zero_N = np.zeros(30)
    assert mean_superiority({"a": (zero_N, zero_N)}) == 0.5
    # A tenth is a standard error and a half of what is made up; all of it is fifteen.
    assert 0.05 < mean_superiority({"a": (zero_N + 0.1, zero_N)}) < 0.1
    assert mean_superiority({"a": (zero_N + 1, zero_N)}) < 1e-9
    with pytest.raises(ValueError, match="no domains"):
        mean_superiority({})


@pytest.mark.parametrize("examples", [2, 10, 20, 40])
def test_a_few_examples_show_no_margin_of_eight_points_whatever_they_are(examples):
    ones_N = np.ones(examples)
    assert non_inferiority(ones_N, ones_N, 0.08) > 0.025


def test_a_student_at_the_margin_passes_about_as_often_as_the_level_says():
    """2.5 % are told; without made-up examples it was 85 % at two examples, 43 at ten, 19 at twenty, 9 at a hundred."""
    rng = np.random.default_rng(0)
    for examples in (2, 10, 20, 50, 100, 400):
        lost = (rng.random((2000, examples)) < 0.08).astype(float)
        passed = [non_inferiority(1 - row_N, np.ones(examples), 0.08) < 0.025 for row_N in lost]
        # 4 % and three standard errors of 2000 trials.
        assert np.mean(passed) <= 0.053


@pytest.mark.parametrize("margin", [0.02, 0.05, 0.08, 0.12, 0.3])
@pytest.mark.parametrize("alpha", [0.01, 0.025, 0.05])
def test_non_inferiority_agrees_with_the_intervals_lower_bound(margin, alpha):
    bounds = paired_difference(A_SN, B_SN, 1 - 2 * alpha)
    assert (non_inferiority(A_SN, B_SN, margin) < alpha) == (bounds.low > -margin)


def test_non_inferiority_by_hand():
    # mean 0.1, variance 0.04 / 3 / 4 and 4 / 16 made up, both of 3 degrees of freedom; the bound -0.2 is 0.3 away
    difference_N = np.array([0.0, 0.2, 0.0, 0.2])
    seen, made_up = 0.04 / 12, 0.25
    freedom = 3 * (seen + made_up) ** 2 / (seen**2 + made_up**2)
    expected = stats.t.sf(0.3 / np.sqrt(seen + made_up), freedom)
    assert non_inferiority(difference_N, np.zeros(4), 0.2) == pytest.approx(expected)


def test_copied_seeds_add_no_evidence():
    repeated = [np.repeat(scores_SN[:1], 5, axis=0) for scores_SN in (A_SN, B_SN)]
    assert non_inferiority(*repeated, 0.05) == pytest.approx(non_inferiority(A_SN[:1], B_SN[:1], 0.05))


def test_all_claims_must_hold_and_the_worst_decides():
    assert intersection_union({"a": 0.01, "b": 0.04}) == 0.04
    with pytest.raises(ValueError, match="no claims"):
        intersection_union({})


def test_holm_by_hand():
    # sorted 0.005 x4, 0.01 x3, 0.03 x2, 0.04 x1; the last is raised to the one before
    found = holm({"w": 0.01, "x": 0.04, "y": 0.03, "z": 0.005})
    assert found == pytest.approx({"w": 0.03, "x": 0.06, "y": 0.06, "z": 0.02})
    assert holm({"a": 0.7, "b": 0.6}) == {"a": 1.0, "b": 1.0} and holm({}) == {}


def test_what_cannot_be_tested_is_refused():
    with pytest.raises(ValueError, match="not paired"):
        non_inferiority(np.zeros(3), np.zeros(4), 0.1)
    with pytest.raises(ValueError, match="two examples"):
        non_inferiority(np.zeros(1), np.zeros(1), 0.1)
    with pytest.raises(ValueError, match="margin"):
        non_inferiority(A_SN, B_SN, 0)
