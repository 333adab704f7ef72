"""Intervals by paired bootstrap: percentile, over examples.

Examples are resampled jointly for all seeds and all checkpoints. By default seeds are kept fixed, because three of them
are too few to resample: an interval then speaks of new examples, not of new training runs. The level `seeds` resamples
seeds as well, apart from examples and crossed with them: the pigeonhole bootstrap (Owen 2007, Ann. Appl. Stat. 1:386).
One seed trains one student for all domains, so all strata share a resample's seeds. Of `S` seeds it sees (S - 1)/S of
their variance: with three, such an interval is still too narrow where seeds differ more than examples.

`scipy.stats.bootstrap` is not used: it draws anew for every statistic, while here one set of resamples serves all
checkpoints of a domain (which is what pairs them), and importing scipy would slow a fully cached run.

Shape suffixes: `S` seeds, `N` examples, `R` resamples.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

RESAMPLES = 10_000
CHUNK = 1_000
MIN_SEEDS = 3

Levels = Literal["examples", "seeds"]


@dataclass(frozen=True)
class Interval:
    """An estimate with its bounds."""

    mean: float
    low: float
    high: float

    @property
    def shows_difference(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


def mean_interval(
    scores_SN: np.ndarray, confidence: float = 0.95, stratum: str = "", levels: Levels = "examples"
) -> Interval:
    """Mean over seeds and examples.

    Args:
        scores_SN: Scores in [0, 1].
        confidence: Level of the interval.
        stratum: Names the examples; the same name gives the same resamples.
        levels: What is resampled: examples alone, or seeds and examples.
    """
    return percentile(float(np.mean(scores_SN)), resampled_means(scores_SN, stratum, levels), confidence)


def paired_difference(
    a_SN: np.ndarray, b_SN: np.ndarray, confidence: float = 0.95, stratum: str = "", levels: Levels = "examples"
) -> Interval:
    """Mean of `a - b` over the same examples; where seeds are kept fixed their numbers may differ.

    Raises:
        ValueError: the numbers of examples differ, or those of seeds that are to be resampled.
    """
    if a_SN.shape[-1] != b_SN.shape[-1]:
        raise ValueError(f"not paired: {a_SN.shape[-1]} and {b_SN.shape[-1]} examples")
    if levels == "seeds":
        if a_SN.shape != b_SN.shape:
            raise ValueError(f"seeds not paired: {a_SN.shape} and {b_SN.shape}")
        return mean_interval(a_SN - b_SN, confidence, stratum, levels)
    difference_1N = np.atleast_2d(a_SN).mean(axis=0, keepdims=True) - np.atleast_2d(b_SN).mean(axis=0, keepdims=True)
    return mean_interval(difference_1N, confidence, stratum)


def mean_over(strata: Mapping[str, np.ndarray], confidence: float = 0.95, levels: Levels = "examples") -> Interval:
    """Unweighted mean over strata (domains) of the mean of each; examples of strata are resampled independently.

    Args:
        strata: stratum -> `[S, N]` scores or differences; for the level `seeds` of the same seeds in the same order.
        confidence: Level of the interval.
        levels: As for `mean_interval`.
    """
    means = [float(np.mean(scores_SN)) for scores_SN in strata.values()]
    draws_R = np.mean([resampled_means(scores_SN, name, levels) for name, scores_SN in strata.items()], axis=0)
    return percentile(float(np.mean(means)), draws_R, confidence)


def percentile(estimate: float, draws_R: np.ndarray, confidence: float) -> Interval:
    """The percentile interval of resampled estimates around the estimate itself."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws_R, [tail, 1 - tail])
    return Interval(estimate, float(low), float(high))


def resampled_means(scores_SN: np.ndarray, stratum: str, levels: Levels = "examples") -> np.ndarray:
    """The mean over seeds and examples in each of the resamples: `[R]`.

    Raises:
        ValueError: one seed cannot be resampled; or there are no examples.
    """
    if levels == "seeds":
        return _resampled_seeds(np.atleast_2d(scores_SN), stratum)
    means_N = np.atleast_2d(scores_SN).mean(axis=0)
    counts_RN = _counts(len(means_N), stratum)
    chunks = [counts_RN[start : start + CHUNK] @ means_N for start in range(0, RESAMPLES, CHUNK)]
    return np.concatenate(chunks) / len(means_N)


def _resampled_seeds(scores_SN: np.ndarray, stratum: str) -> np.ndarray:
    seeds, examples = scores_SN.shape
    if seeds < 2:
        raise ValueError("one seed cannot be resampled")
    counts_RN = _counts(examples, stratum)
    chunks = [counts_RN[start : start + CHUNK] @ scores_SN.T for start in range(0, RESAMPLES, CHUNK)]
    means_RS = np.concatenate(chunks) / examples
    # Not named by the stratum: all domains of a resample have the same seeds.
    drawn_RS = np.random.default_rng(seeds).integers(seeds, size=(RESAMPLES, seeds))
    means_R: np.ndarray = np.take_along_axis(means_RS, drawn_RS, axis=1).mean(axis=1)
    return means_R


@lru_cache(maxsize=16)
def _counts(examples: int, stratum: str) -> np.ndarray:
    """How often each example is drawn in each resample."""
    if not examples:
        raise ValueError("no examples to resample")
    rng = np.random.default_rng(zlib.crc32(stratum.encode()))
    counts_RN = np.empty((RESAMPLES, examples), dtype=np.uint16)
    offsets_C1 = np.arange(CHUNK)[:, None] * examples
    for start in range(0, RESAMPLES, CHUNK):
        drawn_CN = rng.integers(examples, size=(CHUNK, examples)) + offsets_C1
        counts_RN[start : start + CHUNK] = np.bincount(drawn_CN.ravel(), minlength=CHUNK * examples).reshape(CHUNK, -1)
    return counts_RN
