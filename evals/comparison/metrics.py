"""Recovery, pass@k and the shape of completions. `S` seeds, `N` examples, `K` samples."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import comb

import numpy as np

from evals.statistics.crossed_effects import Estimate, over_both, over_examples
from evals.statistics.interval import Interval

# Beyond this distance from the estimate the ratio counts as unbounded.
LARGEST_STEP = 1e6


@dataclass(frozen=True)
class Triple:
    """Scores `[S, N]` of start, teacher and student on the same examples of one domain."""

    start_SN: np.ndarray
    teacher_SN: np.ndarray
    student_SN: np.ndarray


def recovery(domains: Mapping[str, Triple], confidence: float = 0.95, *, new_seeds: bool = False) -> Interval | None:
    """Share of the teachers' gain that the student has: mean(student - start) / mean(teacher - start).

    A ratio of means over domains. Its interval holds the ratios r at which the mean of student - start -
    r (teacher - start) is not shown to differ from 0 (Fieller 1954, J. R. Statist. Soc. B 16:175), so it keeps a width
    where the student equals its teacher on every example. A percentile bootstrap was left out: with a perfect teacher
    and a student at 98 % it covered 64 % for 95 % with 50 examples, and 34 % with 20.

    Args:
        domains: domain -> scores.
        confidence: Level of the interval.
        new_seeds: For new seeds as well as new examples; seeds are averaged otherwise.

    Returns:
        None where the ratio is meaningless: the teachers' gain is not shown to be above 0 at the interval's level, or a
        domain has a single example.

    Raises:
        ValueError: with `new_seeds`, as `evals.statistics.crossed_effects.over_both`.
    """
    over, tail = over_both if new_seeds else over_examples, (1 - confidence) / 2
    possible = {name: triple.teacher_SN - triple.start_SN for name, triple in domains.items()}
    gained = {name: triple.student_SN - triple.start_SN for name, triple in domains.items()}
    if not domains or any(gain_SN.shape[-1] < 2 for gain_SN in possible.values()):
        return None
    if over(possible, 1.0).above(0.0) >= tail:
        return None

    def short_of(ratio: float) -> Estimate:
        # Student - ratio teacher - (1 - ratio) start: an example that is won counts for the weights above 0.
        largest = (1 + abs(ratio) + abs(1 - ratio)) / 2
        return over({name: gained[name] - ratio * possible[name] for name in domains}, largest)

    estimate = over(gained, 1.0).mean / over(possible, 1.0).mean
    low = _crossing(lambda step: short_of(estimate - step).above(0.0) - tail)
    high = _crossing(lambda step: short_of(estimate + step).below(0.0) - tail)
    return Interval(estimate, estimate - low, estimate + high)


def _crossing(distance: Callable[[float], float]) -> float:
    """The smallest step from 0 upwards at which a falling function crosses 0."""
    from scipy.optimize import brentq

    step = 0.125
    while distance(step) > 0:
        step *= 2
        if step > LARGEST_STEP:
            return float("inf")
    return float(brentq(distance, 0.0, step, xtol=1e-6))


def pass_at_k(samples_NK: np.ndarray, k: int) -> np.ndarray:
    """Unbiased pass@k of each example: 1 - C(n - c, k) / C(n, k) (Chen et al. 2021, arXiv:2107.03374).

    Args:
        samples_NK: Scores of n = K samples of each example; a score of 1 is a pass.
        k: Samples one may try, at most K.

    Returns:
        `[N]`, whose mean is the pass@k of the examples.

    Raises:
        ValueError: `k` is not in 1..K.
    """
    drawn = samples_NK.shape[1]
    if not 1 <= k <= drawn:
        raise ValueError(f"pass@{k} needs at least {k} samples and k of at least 1; there are {drawn}")
    passed_N = (samples_NK >= 1).sum(axis=1)
    return np.array([1 - comb(drawn - int(passed), k) / comb(drawn, k) for passed in passed_N])
