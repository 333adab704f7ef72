"""Intervals by paired bootstrap: percentile, over examples.

Examples are resampled jointly for all seeds and all checkpoints. Seeds are kept fixed, because three of them are too
few to resample: an interval then speaks of new examples, not of new training runs. For those see `evals.crossed`.

`scipy.stats.bootstrap` is not used: it draws anew for every statistic, while here one set of resamples serves all
checkpoints of a domain (which is what pairs them), and importing scipy would slow a fully cached run.

Shape suffixes: `S` seeds, `N` examples, `R` resamples.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

RESAMPLES = 10_000
CHUNK = 1_000


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


def mean_interval(scores_SN: np.ndarray, confidence: float = 0.95, stratum: str = "") -> Interval:
    """Mean over seeds and examples.

    Args:
        scores_SN: Scores in [0, 1].
        confidence: Level of the interval.
        stratum: Names the examples; the same name gives the same resamples.
    """
    return percentile(float(np.mean(scores_SN)), resampled_means(scores_SN, stratum), confidence)


def paired_difference(a_SN: np.ndarray, b_SN: np.ndarray, confidence: float = 0.95, stratum: str = "") -> Interval:
    """Mean of `a - b` over the same examples; the numbers of seeds may differ.

    Raises:
        ValueError: the numbers of examples differ.
    """
    if a_SN.shape[-1] != b_SN.shape[-1]:
        raise ValueError(f"not paired: {a_SN.shape[-1]} and {b_SN.shape[-1]} examples")
    difference_1N = np.atleast_2d(a_SN).mean(axis=0, keepdims=True) - np.atleast_2d(b_SN).mean(axis=0, keepdims=True)
    return mean_interval(difference_1N, confidence, stratum)


def mean_over(strata: Mapping[str, np.ndarray], confidence: float = 0.95) -> Interval:
    """Unweighted mean over strata (domains) of the mean of each; examples of strata are resampled independently.

    Args:
        strata: stratum -> `[S, N]` scores or differences.
        confidence: Level of the interval.
    """
    means = [float(np.mean(scores_SN)) for scores_SN in strata.values()]
    draws_R = np.mean([resampled_means(scores_SN, name) for name, scores_SN in strata.items()], axis=0)
    return percentile(float(np.mean(means)), draws_R, confidence)


def percentile(estimate: float, draws_R: np.ndarray, confidence: float) -> Interval:
    """The percentile interval of resampled estimates around the estimate itself."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws_R, [tail, 1 - tail])
    return Interval(estimate, float(low), float(high))


def resampled_means(scores_SN: np.ndarray, stratum: str) -> np.ndarray:
    """The mean over seeds and examples in each of the resamples: `[R]`.

    Raises:
        ValueError: there are no examples.
    """
    means_N = np.atleast_2d(scores_SN).mean(axis=0)
    counts_RN = _counts(len(means_N), stratum)
    chunks = [counts_RN[start : start + CHUNK] @ means_N for start in range(0, RESAMPLES, CHUNK)]
    return np.concatenate(chunks) / len(means_N)


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
