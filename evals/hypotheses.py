"""Tests of paired scores: non-inferiority, equivalence, and several of them at once. All are t-based.

The margin and the number of examples must be fixed before the scores are seen. Examples are the unit: seeds are
averaged first, so that copies of a seed add no evidence. Differences that are all equal have no spread for a t-test to
judge by; their p-value is then 0 or 1.

Shape suffixes: `S` seeds, `N` examples.
"""

from collections.abc import Mapping
from typing import Literal

import numpy as np

Side = Literal["greater", "less"]


def superiority(a_SN: np.ndarray, b_SN: np.ndarray) -> float:
    """One-sided p-value of the paired t-test that the mean of `a` exceeds that of `b`.

    Raises:
        ValueError: the scores are not paired, or there are fewer than two examples.
    """
    return _beyond(_differences(a_SN, b_SN), 0.0, "greater")


def mean_superiority(pairs: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> float:
    """One-sided p-value that the mean of `a` exceeds that of `b`, each the unweighted mean over domains of its means.

    Welch's t on the strata: with mean m_d, variance v_d of the n_d paired differences of domain d,
    t = sum m_d / sqrt(sum v_d / n_d), and by Satterthwaite (1946, Biometrics Bull. 2:110)
    (sum v_d / n_d)^2 / sum ((v_d / n_d)^2 / (n_d - 1)) degrees of freedom. One test of all examples would weigh a
    domain by its number of examples; a test for each domain would ask for more than a better mean. The bootstrap was
    left out because Holm needs p-values, and a percentile interval gives only whether one lies below a level.

    Args:
        pairs: domain -> `[S, N]` scores of `a` and of `b`.

    Raises:
        ValueError: as for `superiority`, or there are no domains.
    """
    from scipy.special import stdtr

    if not pairs:
        raise ValueError("no domains")
    differences = [_differences(a_SN, b_SN) for a_SN, b_SN in pairs.values()]
    gain = sum(float(difference_N.mean()) for difference_N in differences)
    # Rounding leaves equal differences a spread of 1e-17, and a t that means nothing.
    spreads = [float(d_N.var(ddof=1)) / len(d_N) if np.ptp(d_N) else 0.0 for d_N in differences]
    variance = sum(spreads)
    if variance == 0:
        return 0.0 if gain > 0 else 1.0
    freedom = variance**2 / sum(s**2 / (len(d_N) - 1) for s, d_N in zip(spreads, differences, strict=True))
    return float(stdtr(freedom, -gain / variance**0.5))


def non_inferiority(a_SN: np.ndarray, b_SN: np.ndarray, margin: float) -> float:
    """One-sided p-value against the hypothesis that `a` is worse than `b` by the margin or more: paired t-test.

    Args:
        a_SN: Scores of the candidate.
        b_SN: Scores of what it is compared with, on the same examples.
        margin: Allowed deficit of the mean, above 0.

    Raises:
        ValueError: as for `superiority`, or the margin is not above 0.
    """
    return _beyond(_differences(a_SN, b_SN), -_positive(margin), "greater")


def equivalence(a_SN: np.ndarray, b_SN: np.ndarray, margin: float) -> float:
    """P-value that the means differ by less than the margin either way: two one-sided paired t-tests (TOST).

    The larger of the two p-values (Schuirmann 1987, J. Pharmacokinet. Biopharm. 15:657). Below alpha exactly where the
    two-sided 1 - 2 alpha interval lies inside the margins.

    Raises:
        ValueError: as for `non_inferiority`.
    """
    difference_N, bound = _differences(a_SN, b_SN), _positive(margin)
    return max(_beyond(difference_N, -bound, "greater"), _beyond(difference_N, bound, "less"))


def intersection_union(p_values: Mapping[str, float]) -> float:
    """P-value that all of several claims hold: the largest, no correction (Berger 1982, Technometrics 24:295).

    Raises:
        ValueError: there are no claims.
    """
    if not p_values:
        raise ValueError("no claims")
    return max(p_values.values())


def non_inferior_to_all(pairs: Mapping[str, tuple[np.ndarray, np.ndarray]], margin: float) -> float:
    """P-value that the student is non-inferior to every teacher: the intersection-union test.

    Args:
        pairs: domain -> `[S, N]` scores of the student and of the domain's teacher.
        margin: Allowed deficit in each domain.

    Raises:
        ValueError: as for `non_inferiority`, or there are no domains.
    """
    return intersection_union({name: non_inferiority(a_SN, b_SN, margin) for name, (a_SN, b_SN) in pairs.items()})


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """P-values of several claims, adjusted so that any false claim has at most probability alpha.

    The step-down of Holm 1979 (Scand. J. Statist. 6:65): in rising order the i-th of m, counted from 0, is multiplied
    by m - i, cut at 1 and kept no smaller than the one before.
    """
    adjusted, highest = {}, 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = highest
    return {name: adjusted[name] for name in p_values}


def _differences(a_SN: np.ndarray, b_SN: np.ndarray) -> np.ndarray:
    a_N, b_N = (np.atleast_2d(scores_SN).mean(axis=0) for scores_SN in (a_SN, b_SN))
    if a_N.shape != b_N.shape:
        raise ValueError(f"not paired: {len(a_N)} and {len(b_N)} examples")
    if len(a_N) < 2:
        raise ValueError("a test needs at least two examples")
    difference_N: np.ndarray = a_N - b_N
    return difference_N


def _beyond(difference_N: np.ndarray, bound: float, side: Side) -> float:
    from scipy.stats import ttest_1samp

    if np.ptp(difference_N) == 0:
        beyond = difference_N[0] > bound if side == "greater" else difference_N[0] < bound
        return 0.0 if beyond else 1.0
    return float(ttest_1samp(difference_N, bound, alternative=side).pvalue)


def _positive(margin: float) -> float:
    if margin <= 0:
        raise ValueError(f"the margin must be above 0: {margin}")
    return margin
