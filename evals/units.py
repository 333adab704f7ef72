"""Examples of one unit, such as the corruptions of one function, tell less than as many of their own.

Their scores move together, so the unit is what a new sample would draw anew. `by_unit` turns examples into one value a
unit whose mean is the examples' mean and whose variance is the cluster-robust one (Liang & Zeger 1986, Biometrika
73:13, with the factor G / (G - 1)): what is computed of examples is computed of these values. Where every example has a
unit of its own they are the examples themselves.

Shape suffixes: `S` seeds, `N` examples, `G` units.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np


def by_unit(scores_SN: np.ndarray, units: Sequence[str]) -> np.ndarray:
    """One value a unit: the mean of all, plus G / N times the sum of the unit's distances from it.

    It is linear in the scores, so the values of a difference are the difference of the values.

    Args:
        scores_SN: `[S, N]` or `[N]`.
        units: Of each example.

    Returns:
        `[S, G]` or `[G]`, units in the order in which they come first.
    """
    order = {unit: place for place, unit in enumerate(dict.fromkeys(units))}
    if len(order) == len(units):
        return scores_SN
    is_of_NG = np.array([order[unit] for unit in units])[:, None] == np.arange(len(order))
    means_S1 = scores_SN.mean(axis=-1, keepdims=True)
    values_SG: np.ndarray = means_S1 + len(order) / len(units) * ((scores_SN - means_S1) @ is_of_NG)
    return values_SG


def effective_units(units: Sequence[str]) -> float:
    """How many units of one size tell as much, if all examples of a unit agree (Kish 1965, Survey Sampling)."""
    sizes = Counter(units).values()
    return len(units) ** 2 / sum(size**2 for size in sizes)
