"""Groups examples by unit, because those of one unit, such as the corruptions of one function, are not independent.

Their scores are correlated, and a new sample would draw new units. `by_unit` puts the units into groups of about equal
size, as many as their effective number if all examples of a unit agree (Kish 1965, Survey Sampling), and turns the
examples into one value per group. Their mean is the examples' mean and their variance the jackknife's over groups
(MacKinnon & White 1985, J. Econometrics 29:305): statistics of examples are computed from these values. Where every
example has a unit of its own, the values are the examples themselves.

Shape suffixes: `S` seeds, `N` examples, `G` groups.
"""

import heapq
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import numpy as np


def by_unit(scores_SN: np.ndarray, units: Sequence[str]) -> np.ndarray:
    """One value per group: the mean of all, plus G - 1 times its change if the group is left out.

    The values are linear in the scores, so the values of a difference are the difference of the values.

    Args:
        scores_SN: `[S, N]` or `[N]`.
        units: The unit of each example.

    Returns:
        `[S, G]` or `[G]`.
    """
    groups_N = _groups(tuple(units))
    count = int(groups_N.max(initial=-1)) + 1
    if count == len(units):
        return scores_SN
    means_S1 = scores_SN.mean(axis=-1, keepdims=True)
    if count == 1:
        return means_S1
    sizes_G = np.bincount(groups_N, minlength=count)
    rows = np.atleast_2d(scores_SN - means_S1)
    sums_SG = np.stack([np.bincount(groups_N, weights=row_N, minlength=count) for row_N in rows])
    moved_SG = (sums_SG * (count - 1) / (len(units) - sizes_G)).reshape(*scores_SN.shape[:-1], count)
    values_SG: np.ndarray = means_S1 + moved_SG - moved_SG.mean(axis=-1, keepdims=True)
    return values_SG


def independent(units: Sequence[str]) -> int:
    """The number of values that `by_unit` returns for examples of these units."""
    return int(_groups(tuple(units)).max(initial=-1)) + 1


@lru_cache(maxsize=64)
def _groups(units: tuple[str, ...]) -> np.ndarray:
    """The group of each example: units are placed from the largest on, each into the smallest group so far."""
    sizes = Counter(units)
    if len(sizes) == len(units):
        return np.arange(len(units))
    worth = len(units) ** 2 / sum(size**2 for size in sizes.values())
    smallest = [(0, group) for group in range(max(min(2, len(sizes)), int(worth)))]
    group_of: dict[str, int] = {}
    for unit, size in sizes.most_common():
        held, group = heapq.heappop(smallest)
        group_of[unit] = group
        heapq.heappush(smallest, (held + size, group))
    return np.array([group_of[unit] for unit in units])
