"""Means with t intervals: for new examples, for new seeds, or for both at once.

Seeds and examples are crossed random effects: with `x_sn = mean + seed_s + example_n + rest_sn`, the mean of a table
`[S, N]` has the variance `(MS_seed + MS_example - MS_rest) / (S N)`, unbiased in the mean squares of the two-way
analysis of variance (Searle, Casella & McCulloch, Variance Components, 1992).

A few seeds determine their variance `V_s` poorly. Its fiducial distribution is `V_s f / χ²_f` with f = S - 1, and a
tail is the mean over it of the t tails with the variance `V_s f / χ²_f + V_n` (Fisher 1935, Ann. Eugenics 6:391;
generalized p-values, Tsui & Weerahandi 1989, JASA 84:602). With seeds alone this is the t-test of their means, with
examples alone that of the examples. Satterthwaite's degrees of freedom were left out: where seeds happen to agree, they
treat the variance as known. On pages of thirty tests at their limit, corrected by Holm at 2.5 %, a test was falsely
shown in 8 % of pages. A bootstrap of seeds was left out too: with `S` seeds it has (S - 1)/S of their variance and
ignores its uncertainty.

Shape suffixes: `S` seeds, `N` examples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from evals.statistics.interval import Interval
from evals.statistics.power import MADE_UP

# Means and standard errors below this are rounding errors, and their quotient is not a meaningful t.
ROUNDING = 1e-12
# Nodes of the quadrature over a chi distribution, and how many of its standard deviations it spans.
NODES, SPAN = 160, 10.0


@dataclass(frozen=True)
class Part:
    """A share of a mean's variance, and the degrees of freedom of its estimate."""

    variance: float
    freedom: float


NOTHING = Part(0.0, 1.0)


@dataclass(frozen=True)
class Estimate:
    """A mean with its variance.

    Attributes:
        mean: The estimate.
        examples: The part of its variance that the choice of examples adds.
        seeds: The part that the choice of seeds adds.
    """

    mean: float
    examples: Part = NOTHING
    seeds: Part = NOTHING

    @property
    def variance(self) -> float:
        """The variance of the mean."""
        return self.examples.variance + self.seeds.variance

    def interval(self, confidence: float) -> Interval:
        """The two-sided interval of the values that the tests do not reject; the mean alone where nothing varies."""
        half = 0.0
        if self.variance > 0:
            from scipy.optimize import brentq

            tail, error = (1 - confidence) / 2, self.variance**0.5
            high = 2.0
            while self._tail(high * error) > tail:
                high *= 2
            half = error * float(brentq(lambda steps: self._tail(steps * error) - tail, 0.0, high))
        return Interval(self.mean, self.mean - half, self.mean + half)

    def above(self, bound: float) -> float:
        """One-sided p-value for the claim that the mean exceeds a bound; 0 or 1 where nothing varies."""
        if self.variance == 0:
            return 0.0 if self.mean > bound else 1.0
        return self._tail(self.mean - bound)

    def below(self, bound: float) -> float:
        """One-sided p-value for the claim that the mean is below a bound; 0 or 1 where nothing varies."""
        return Estimate(-self.mean, self.examples, self.seeds).above(-bound)

    @property
    def p(self) -> float:
        """Two-sided p-value against a mean of 0."""
        return min(1.0, 2 * Estimate(abs(self.mean), self.examples, self.seeds).above(0.0))

    def _tail(self, gap: float) -> float:
        """The probability that a mean lies at least this far above the true value."""
        from scipy.special import stdtr

        for whole, other in ((self.examples, self.seeds), (self.seeds, self.examples)):
            if other.variance == 0:
                return float(stdtr(whole.freedom, -gap / whole.variance**0.5))
        squares_K, weights_K = _chi_squares(self.seeds.freedom)
        seeds_K = self.seeds.variance * self.seeds.freedom / squares_K
        sums_K = seeds_K + self.examples.variance
        # Given the seeds' variance only the examples' is estimated; this is Satterthwaite's freedom of such a sum.
        freedom_K = self.examples.freedom * (sums_K / self.examples.variance) ** 2
        return float(weights_K @ stdtr(freedom_K, -gap / sums_K**0.5))


@lru_cache(maxsize=64)
def _chi_squares(freedom: float) -> tuple[np.ndarray, np.ndarray]:
    """Squares of a chi variable and their weights, by Gauss-Legendre quadrature."""
    from scipy.stats import chi

    low, high = max(0.0, freedom**0.5 - SPAN), freedom**0.5 + SPAN
    nodes_K, weights_K = np.polynomial.legendre.leggauss(NODES)
    roots_K = low + (nodes_K + 1) * (high - low) / 2
    density_K = weights_K * chi.pdf(roots_K, freedom)
    return roots_K**2, density_K / density_K.sum()


def over_seeds(values_S: Sequence[float] | np.ndarray) -> Estimate:
    """The mean of one value per seed, with the t-test's variance.

    Raises:
        ValueError: there are fewer than two seeds.
    """
    row_S = np.asarray(values_S, dtype=float)
    if len(row_S) < 2:
        raise ValueError("a single seed has no variance between seeds")
    return _estimate(float(row_S.mean()), [], Part(float(row_S.var(ddof=1)) / len(row_S), len(row_S) - 1))


def over_examples(strata: Mapping[str, np.ndarray], largest: float = 1.0) -> Estimate:
    """Unweighted mean over strata (domains) of the mean difference of each, for new examples: seeds are averaged.

    With one stratum it is the paired t-test's estimate, with several Welch's. `MADE_UP` examples are added to the
    variance, half of them won and half lost, as Agresti & Coull (1998, Am. Statistician 52:119) add right and wrong
    answers for a proportion; the mean is unchanged. Without them, differences that are all equal would have no
    variance, and those of a few examples too little. docs/evidence.md lists the levels with and without them.

    Args:
        strata: stratum -> `[S, N]` or `[N]` differences of scores in [0, 1], or other contrasts of them.
        largest: The largest contrast that an example can have: 1 for a difference.

    Raises:
        ValueError: there are no strata, or fewer than two examples in one.
    """
    rows = [np.atleast_2d(part_SN).mean(axis=0) for part_SN in strata.values()]
    _require(rows)
    parts = [Part(float(row_N.var(ddof=1)) / len(row_N) / len(rows) ** 2, len(row_N) - 1) for row_N in rows]
    return _estimate(float(np.mean([row_N.mean() for row_N in rows])), [*parts, _made_up(rows, largest)])


def over_both(strata: Mapping[str, np.ndarray], largest: float = 0.0) -> Estimate:
    """Unweighted mean over strata of the mean difference of each, for new seeds and new examples.

    One seed trains one model for all domains, and domains share no examples. So the variance of the seeds' means over
    strata, divided by S, includes all effects of seeds, and each stratum adds `(MS_example - MS_rest) / (S N)` of its
    own, if that is above 0. Without variance of examples this is the t-test of the seeds' means, with equal seeds that
    of the examples.

    Args:
        strata: stratum -> `[S, N]` values, of the same seeds in the same order.
        largest: As for `over_examples`, with its added examples; 0 for unbounded values, to which none are added.

    Raises:
        ValueError: there are no strata, fewer than two examples in one, or fewer than two or unequal seeds.
    """
    tables = list(strata.values())
    _require(tables)
    if len({len(table_SN) for table_SN in tables}) > 1:
        raise ValueError(f"seeds not paired: {', '.join(str(len(table_SN)) for table_SN in tables)}")
    seeds = over_seeds(np.mean([table_SN.mean(axis=1) for table_SN in tables], axis=0))
    parts = [part for table_SN in tables for part in _examples(table_SN, 1 / len(tables))]
    return _estimate(seeds.mean, [*parts, _made_up(tables, largest)], seeds.seeds)


def _made_up(tables: Sequence[np.ndarray], largest: float) -> Part:
    """The part that the added examples contribute to the variance of the mean over tables, `[N]` or `[S, N]`."""
    heaviest = largest / (len(tables) * min(table.shape[-1] for table in tables))
    return Part(MADE_UP * heaviest**2, sum(table.shape[-1] - 1 for table in tables))


def _examples(table_SN: np.ndarray, weight: float) -> list[Part]:
    """The part that the examples of one stratum contribute to the variance; none where they vary less than the rest."""
    seeds, examples = table_SN.shape
    own_N = table_SN.mean(axis=0) - table_SN.mean()
    rest_SN = table_SN - table_SN.mean(axis=1, keepdims=True) - own_N
    free = examples - 1, (seeds - 1) * (examples - 1)
    of_examples, of_rest = seeds * float(np.sum(own_N**2)) / free[0], float(np.sum(rest_SN**2)) / free[1]
    if of_examples <= of_rest:
        return []
    scale = weight**2 / (seeds * examples)
    return [Part(scale * of_examples, free[0]), Part(-scale * of_rest, free[1])]


def _estimate(mean: float, examples: Sequence[Part], seeds: Part = NOTHING) -> Estimate:
    """The estimate with the examples' parts combined by Satterthwaite's degrees of freedom (1946, Biometrics 2:110)."""
    mean = 0.0 if abs(mean) < ROUNDING else mean
    variance = sum(part.variance for part in examples)
    whole = NOTHING
    if variance >= ROUNDING**2:
        free = variance**2 / sum(part.variance**2 / part.freedom for part in examples)
        whole = Part(variance, max(1.0, free))
    return Estimate(mean, whole, seeds if seeds.variance >= ROUNDING**2 else NOTHING)


def _require(tables: Sequence[np.ndarray]) -> None:
    if not tables:
        raise ValueError("no domains")
    if any(table.shape[-1] < 2 for table in tables):
        raise ValueError("a test needs at least two examples")
