"""Tests of paired scores against scipy's own and hand-worked tables."""

import numpy as np
import pytest
from scipy import stats

from evals.hypotheses import holm, intersection_union, mean_superiority, non_inferiority

RNG = np.random.default_rng(0)
A_SN = (RNG.random((3, 120)) < 0.62).astype(float)
B_SN = (RNG.random((3, 120)) < 0.60).astype(float)


def test_superiority_and_non_inferiority_are_scipys_paired_t():
    a_N, b_N = A_SN.mean(axis=0), B_SN.mean(axis=0)
    expected = stats.ttest_rel(a_N, b_N, alternative="greater").pvalue
    assert mean_superiority({"a": (A_SN, B_SN)}) == pytest.approx(expected)
    shifted = stats.ttest_rel(a_N + 0.08, b_N, alternative="greater").pvalue
    assert non_inferiority(A_SN, B_SN, 0.08) == pytest.approx(shifted)


def test_a_better_mean_over_domains_is_welchs_t_of_the_strata():
    c_SN, d_SN = RNG.random((3, 40)), RNG.random((3, 40)) - 0.1
    # m_a + m_c > 0 is m_a > m_(-c): of two strata the test is that of two samples.
    first_N, second_N = (A_SN - B_SN).mean(axis=0), (c_SN - d_SN).mean(axis=0)
    welch = stats.ttest_ind(first_N, -second_N, equal_var=False, alternative="greater").pvalue
    assert mean_superiority({"a": (A_SN, B_SN), "c": (c_SN, d_SN)}) == pytest.approx(welch)


def test_domains_count_alike_whatever_their_number_of_examples():
    # Up 0.1 on 400 examples and down 0.2 on 20: the pooled mean rises, that of the domains falls.
    up_N, down_N = np.tile([0.0, 0.2], 200), np.tile([-0.3, -0.1], 10)
    strata = {"a": (up_N, np.zeros(400)), "b": (down_N, np.zeros(20))}
    pooled_N = np.concatenate([up_N, down_N])
    assert mean_superiority({"all": (pooled_N, np.zeros(420))}) < 0.001 and mean_superiority(strata) > 0.99


def test_differences_without_spread_are_certain_and_no_domains_a_mistake():
    tenth_N, zero_N = np.full(30, 0.1), np.zeros(30)
    assert mean_superiority({"a": (tenth_N + zero_N, zero_N), "b": (zero_N, zero_N)}) == 0.0
    assert mean_superiority({"a": (zero_N, zero_N)}) == mean_superiority({"a": (zero_N, tenth_N)}) == 1.0
    with pytest.raises(ValueError, match="no domains"):
        mean_superiority({})


@pytest.mark.parametrize("margin", [0.02, 0.05, 0.08, 0.12, 0.3])
@pytest.mark.parametrize("alpha", [0.01, 0.025, 0.05])
def test_non_inferiority_agrees_with_the_intervals_lower_bound(margin, alpha):
    bounds = stats.ttest_rel(A_SN.mean(axis=0), B_SN.mean(axis=0)).confidence_interval(1 - 2 * alpha)
    assert (non_inferiority(A_SN, B_SN, margin) < alpha) == (bounds.low > -margin)


def test_non_inferiority_by_hand():
    # mean 0.1, sd 0.1 sqrt(4/3), n 4: standard error 0.05774; the bound -0.2 is t = 5.1962 away, df 3
    difference_N = np.array([0.0, 0.2, 0.0, 0.2])
    assert non_inferiority(difference_N, np.zeros(4), 0.2) == pytest.approx(stats.t.sf(3 * np.sqrt(3), 3))


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


def test_differences_without_spread_are_decided_by_the_bound():
    ones_N = np.ones(10)
    assert non_inferiority(ones_N, ones_N, 0.1) == 0
    assert non_inferiority(np.zeros(10), ones_N, 0.5) == 1


def test_what_cannot_be_tested_is_refused():
    with pytest.raises(ValueError, match="not paired"):
        non_inferiority(np.zeros(3), np.zeros(4), 0.1)
    with pytest.raises(ValueError, match="two examples"):
        non_inferiority(np.zeros(1), np.zeros(1), 0.1)
    with pytest.raises(ValueError, match="margin"):
        non_inferiority(A_SN, B_SN, 0)
