"""Tests of paired scores: superiority over domains, non-inferiority, and several of them at once. All are t-based.

The margin and the number of examples must be fixed before the scores are seen. Examples are the unit of analysis: seeds
are averaged first, so that copies of a seed add no evidence. Differences of scores in [0, 1] have a variance above 0
even if all are equal (`evals.statistics.crossed_effects.over_examples`).

Shape suffixes: `S` seeds, `N` examples.
"""

from collections.abc import Mapping

import numpy as np

from evals.statistics.crossed_effects import over_examples
from evals.statistics.intervals import differences


def mean_superiority(pairs: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> float:
    """One-sided p-value for the claim that the mean of `a` exceeds that of `b`, both unweighted means over domains.

    This is Welch's t on the strata. One test of all examples would weight a domain by its number of examples; a test
    for each domain would require more than a better mean. The bootstrap was left out because Holm needs p-values, and a
    percentile interval shows only whether a p-value lies below a level.

    Args:
        pairs: domain -> `[S, N]` scores of `a` and of `b`.

    Raises:
        ValueError: the scores are not paired, there are fewer than two examples, or there are no domains.
    """
    return over_examples({name: differences(a_SN, b_SN) for name, (a_SN, b_SN) in pairs.items()}).above(0.0)


def non_inferiority(a_SN: np.ndarray, b_SN: np.ndarray, margin: float) -> float:
    """One-sided p-value against the hypothesis that `a` is worse than `b` by the margin or more: paired t-test.

    Args:
        a_SN: Scores of the candidate.
        b_SN: Scores of the checkpoint it is compared with, on the same examples.
        margin: Allowed deficit of the mean, above 0.

    Raises:
        ValueError: the scores are not paired, there are fewer than two examples, or the margin is not above 0.
    """
    if margin <= 0:
        raise ValueError(f"the margin must be above 0: {margin}")
    return over_examples({"": differences(a_SN, b_SN)}).above(-margin)


def intersection_union(p_values: Mapping[str, float]) -> float:
    """P-value for the claim that all of several claims hold: the largest, without correction (Berger 1982,
    Technometrics 24:295).

    Raises:
        ValueError: there are no claims.
    """
    if not p_values:
        raise ValueError("no claims")
    return max(p_values.values())


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
