"""Means with t intervals: for new examples, for new seeds, or for both at once.

Seeds and examples are crossed random effects: with `x_sn = mean + seed_s + example_n + rest_sn`, the mean of a table
`[S, N]` has the variance `(MS_seed + MS_example - MS_rest) / (S N)`, unbiased in the mean squares of the two-way
analysis of variance (Searle, Casella & McCulloch, Variance Components, 1992).

A few seeds tell little of their own variance `V_s`. Its fiducial distribution is `V_s f / χ²_f` with f = S - 1, and a
tail is the mean over it of the t tails with the variance `V_s f / χ²_f + V_n` (Fisher 1935, Ann. Eugenics 6:391;
generalized p-values, Tsui & Weerahandi 1989, JASA 84:602). With seeds alone this is the t-test of their means, with
examples alone that of the examples. Satterthwaite's degrees of freedom were left out: where seeds happen to agree
they take the variance for known. Of thirty tests at their limit, corrected by Holm at 2.5 %, they showed one in 8 % of
pages.
A bootstrap of seeds was left out too: of `S` seeds it sees (S - 1)/S of their variance and none of the doubt about it.

Shape suffixes: `S` seeds, `N` examples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from evals.statistics.interval import Interval
from evals.statistics.power import MADE_UP

# Means and standard errors below this are rounding: a t of two of them means nothing.
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
        examples: What the choice of examples adds to its variance.
        seeds: What the choice of seeds adds.
    """

    mean: float
    examples: Part = NOTHING
    seeds: Part = NOTHING

    @property
    def variance(self) -> float:
        """Of the mean."""
        return self.examples.variance + self.seeds.variance

    def interval(self, confidence: float) -> Interval:
        """The two-sided interval of the values that `above` does not refute; the mean alone where nothing varies."""
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
        """One-sided p-value that the mean exceeds a bound; where nothing varies 0 or 1."""
        if self.variance == 0:
            return 0.0 if self.mean > bound else 1.0
        return self._tail(self.mean - bound)

    def below(self, bound: float) -> float:
        """The same that the mean is less than a bound."""
        return Estimate(-self.mean, self.examples, self.seeds).above(-bound)

    @property
    def p(self) -> float:
        """Two-sided p-value against a mean of 0."""
        return min(1.0, 2 * Estimate(abs(self.mean), self.examples, self.seeds).above(0.0))

    def _tail(self, gap: float) -> float:
        """How often a mean lies that far above the truth, or farther."""
        from scipy.special import stdtr

        for whole, other in ((self.examples, self.seeds), (self.seeds, self.examples)):
            if other.variance == 0:
                return float(stdtr(whole.freedom, -gap / whole.variance**0.5))
        squares_K, weights_K = _chi_squares(self.seeds.freedom)
        seeds_K = self.seeds.variance * self.seeds.freedom / squares_K
        sums_K = seeds_K + self.examples.variance
        # Given the seeds' variance only the examples' is estimated: Satterthwaite's freedom of such a sum.
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
    """The mean of one value a seed: the t-test's.

    Raises:
        ValueError: there are fewer than two seeds.
    """
    row_S = np.asarray(values_S, dtype=float)
    if len(row_S) < 2:
        raise ValueError("one seed says nothing of others")
    return _estimate(float(row_S.mean()), [], Part(float(row_S.var(ddof=1)) / len(row_S), len(row_S) - 1))


def over_examples(strata: Mapping[str, np.ndarray], largest: float = 1.0) -> Estimate:
    """Unweighted mean over strata (domains) of the mean difference of each, for new examples: seeds are averaged.

    Of one stratum the paired t-test's, of several Welch's, with `MADE_UP` examples added to the variance, half of them
    won and half lost, as Agresti & Coull (1998, Am. Statistician 52:119) make up right and wrong answers for a
    proportion; the mean stays as it is. Differences that are all equal have no variance of their own, and those of a
    few examples too little. docs/evidence.md has the levels with and without.

    Args:
        strata: stratum -> `[S, N]` or `[N]` differences of scores in [0, 1], or other contrasts of them.
        largest: The contrast of an example that is won: 1 for a difference.

    Raises:
        ValueError: there are no strata, or fewer than two examples in one.
    """
    rows = [np.atleast_2d(part_SN).mean(axis=0) for part_SN in strata.values()]
    _require(rows)
    parts = [Part(float(row_N.var(ddof=1)) / len(row_N) / len(rows) ** 2, len(row_N) - 1) for row_N in rows]
    return _estimate(float(np.mean([row_N.mean() for row_N in rows])), [*parts, _made_up(rows, largest)])


def over_both(strata: Mapping[str, np.ndarray], largest: float = 0.0) -> Estimate:
    """The same for new seeds as well.

    One seed trains one model for all domains, and domains share no examples. So the variance of the seeds' means over
    strata, divided by S, holds all that seeds do, and each stratum adds `(MS_example - MS_rest) / (S N)` of its own,
    where that is above 0. With no variance of examples it is the t-test of the seeds' means, with equal seeds that of
    the examples.

    Args:
        strata: stratum -> `[S, N]` values, of the same seeds in the same order.
        largest: As for `over_examples`, with its made-up examples; 0 for values without bounds, which get none.

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
    """What the made-up examples add to the variance of the mean over tables, `[N]` or `[S, N]`."""
    heaviest = largest / (len(tables) * min(table.shape[-1] for table in tables))
    return Part(MADE_UP * heaviest**2, sum(table.shape[-1] - 1 for table in tables))


def _examples(table_SN: np.ndarray, weight: float) -> list[Part]:
    """What the examples of one stratum add to the variance; nothing where they vary less than the rest."""
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
    """The parts of the examples' variance as one, with Satterthwaite's degrees of freedom (1946, Biometrics 2:110)."""
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
