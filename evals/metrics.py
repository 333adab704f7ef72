"""Recovery, pass@k and the shape of completions. `S` seeds, `N` examples, `K` samples, `R` resamples."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import comb

import numpy as np

from evals.compare import mean_over, percentile, resampled_means
from evals.crossed import over_both
from evals.interval import Interval
from evals.scores import Scores


@dataclass(frozen=True)
class Triple:
    """Scores `[S, N]` of start, teacher and student on the same examples of one domain."""

    start_SN: np.ndarray
    teacher_SN: np.ndarray
    student_SN: np.ndarray


def recovery(domains: Mapping[str, Triple], confidence: float = 0.95) -> Interval | None:
    """Share of the teachers' gain that the student has: mean(student - start) / mean(teacher - start).

    A ratio of means over domains, seeds pooled; the bootstrap takes the ratio in every resample of examples.

    Returns:
        None where the ratio says nothing: the teachers' gain is not positive, or it may be 0 within the interval's
        level (the ratio's denominator would cross 0).
    """
    if not domains:
        return None
    gained, possible = 0.0, 0.0
    gained_R, possible_R = np.zeros(1), np.zeros(1)
    to_gain: dict[str, np.ndarray] = {}
    for name, triple in domains.items():
        start_N, teacher_N, student_N = (
            np.atleast_2d(scores_SN).mean(axis=0)
            for scores_SN in (triple.start_SN, triple.teacher_SN, triple.student_SN)
        )
        gained += float(np.mean(student_N - start_N))
        possible += float(np.mean(teacher_N - start_N))
        to_gain[name] = teacher_N - start_N
        gained_R = gained_R + resampled_means(student_N - start_N, name)
        possible_R = possible_R + resampled_means(teacher_N - start_N, name)
    if mean_over(to_gain, confidence).low <= 0:
        return None
    # Where a resample beyond the level has no gain its ratio counts as unbounded, on the side of the numerator.
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio_R = np.where(possible_R > 0, gained_R / possible_R, np.sign(gained_R) * np.finfo(float).max)
    return percentile(gained / possible, ratio_R, confidence)


def recovery_over_seeds(domains: Mapping[str, Triple], confidence: float = 0.95) -> Interval | None:
    """The same ratio with an interval for new seeds and examples.

    By the delta method: with the ratio r = gained / possible, its variance is that of the mean of
    (gained - r possible) / mean(possible), by `evals.crossed.over_both`.

    Returns:
        None as for `recovery`.

    Raises:
        ValueError: as for `over_both`.
    """
    possible = {name: triple.teacher_SN - triple.start_SN for name, triple in domains.items()}
    gained = {name: triple.student_SN - triple.start_SN for name, triple in domains.items()}
    whole = over_both(possible)
    if whole.interval(confidence).low <= 0:
        return None
    ratio = over_both(gained).mean / whole.mean
    around = over_both({name: (gained[name] - ratio * possible[name]) / whole.mean for name in domains})
    return replace(around, mean=ratio).interval(confidence)


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


def truncation_rate(scores: Scores) -> float:
    """Share of greedy completions cut at the longest length."""
    return float(np.mean([row["greedy"]["truncated"] for row in scores.rows]))


def mean_length(scores: Scores) -> float:
    """Mean tokens of the greedy completions."""
    return float(np.mean([row["greedy"]["tokens"] for row in scores.rows]))
