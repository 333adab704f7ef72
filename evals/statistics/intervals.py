"""Intervals of scores and of paired differences, for new examples.

Seeds are kept fixed, because three of them are too few to estimate how others would differ. An interval is therefore
for new examples, not for new training runs; for those see `evals.statistics.crossed_effects`.

An interval keeps a width where all examples agree: after 400 right answers out of 400 the next one may be wrong.

Shape suffixes: `S` seeds, `N` examples.
"""

from collections.abc import Mapping
from statistics import NormalDist

import numpy as np

from evals.statistics.crossed_effects import over_examples
from evals.statistics.interval import Interval


def mean_interval(scores_SN: np.ndarray, confidence: float = 0.95) -> Interval:
    """Mean over seeds and examples of scores in [0, 1]; see `mean_over_domains`."""
    return mean_over_domains({"": scores_SN}, confidence)


def mean_over_domains(strata: Mapping[str, np.ndarray], confidence: float = 0.95) -> Interval:
    """Unweighted mean over domains of the mean score of each, with the interval of Agresti & Coull for a proportion.

    The interval is Wilson's (1927, JASA 22:209), except that its width is sufficient near 0 and 1: z² / 2 right answers
    and as many wrong ones are added (1998, Am. Statistician 52:119). The number of examples is the one that gives the
    observed variance. For right and wrong answers and one seed that is the number of examples itself; several seeds,
    scores between 0 and 1 and domains of different levels have less variance than a proportion, so they count for more.

    Args:
        strata: domain -> `[S, N]` or `[N]` scores in [0, 1]; seeds are averaged first.
        confidence: Level of the interval.

    Raises:
        ValueError: there are no domains, or no examples in one.
    """
    rows = [np.atleast_2d(part_SN).mean(axis=0) for part_SN in strata.values()]
    if not rows or not all(len(row_N) for row_N in rows):
        raise ValueError("no examples")
    mean = float(np.mean([row_N.mean() for row_N in rows]))
    fewest = len(rows) * min(len(row_N) for row_N in rows)
    seen = sum(float(row_N.var()) / len(row_N) for row_N in rows) / len(rows) ** 2
    # One added right example and one added wrong one keep the variance above 0 where all scores are alike.
    variance = seen + (mean**2 + (1 - mean) ** 2) / fewest**2
    examples = max(fewest, mean * (1 - mean) / variance)
    z_squared = NormalDist().inv_cdf((1 + confidence) / 2) ** 2
    centre = (mean + z_squared / (2 * examples)) / (1 + z_squared / examples)
    half = (z_squared * centre * (1 - centre) / (examples + z_squared)) ** 0.5
    return Interval(mean, max(0.0, centre - half), min(1.0, centre + half))


def paired_difference(a_SN: np.ndarray, b_SN: np.ndarray, confidence: float = 0.95) -> Interval:
    """Mean of `a - b` over the same examples; the numbers of seeds may differ. See `mean_over`.

    Raises:
        ValueError: the numbers of examples differ.
    """
    return mean_over({"": differences(a_SN, b_SN)}, confidence)


def differences(a_SN: np.ndarray, b_SN: np.ndarray) -> np.ndarray:
    """The paired differences [N] of `a` and `b`, a mean over the seeds of each.

    Raises:
        ValueError: they have different numbers of examples.
    """
    a_N, b_N = (np.atleast_2d(scores_SN).mean(axis=0) for scores_SN in (a_SN, b_SN))
    if a_N.shape != b_N.shape:
        raise ValueError(f"not paired: {len(a_N)} and {len(b_N)} examples")
    difference_N: np.ndarray = a_N - b_N
    return difference_N


def mean_over(strata: Mapping[str, np.ndarray], confidence: float = 0.95) -> Interval:
    """Unweighted mean over domains of their mean differences, with the t interval of
    `evals.statistics.crossed_effects`.

    Args:
        strata: domain -> `[S, N]` or `[N]` differences of scores in [0, 1].
        confidence: Level of the interval.

    Returns:
        The interval; its bounds are -1 and 1 where a domain has a single example, whose variance is unknown.
    """
    if any(np.shape(part_SN)[-1] < 2 for part_SN in strata.values()):
        return Interval(float(np.mean([np.mean(part_SN) for part_SN in strata.values()])), -1.0, 1.0)
    return over_examples(strata).interval(confidence)
