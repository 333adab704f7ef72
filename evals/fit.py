"""A quadratic fit of one measure on another over checkpoints, and how sure its R squared is."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evals.interval import Interval

MIN_POINTS = 5
RESAMPLES = 2_000


@dataclass(frozen=True)
class Fit:
    """A parabola by least squares.

    Attributes:
        coefficients: Of x², x and 1.
        r_squared: 1 - residual sum of squares / total sum of squares, with its interval.
    """

    coefficients: tuple[float, float, float]
    r_squared: Interval


def quadratic_fit(x: Sequence[float], y: Sequence[float], confidence: float = 0.95) -> Fit | None:
    """Fit y on x and x² (the form in which arXiv:2509.04259 relates forgetting to KL).

    The interval is the percentile bootstrap over points; a resample with fewer than four different x, or without spread
    in y, has no fit worth the name and is drawn again. R squared of a resample is that of its own fit, so with few
    points the interval leans upwards: three coefficients always explain something.

    Returns:
        None with fewer than five points, or where y or x has no spread.

    Raises:
        ValueError: x and y are not of one length.
    """
    if len(x) != len(y):
        raise ValueError(f"not paired: {len(x)} and {len(y)} points")
    x_P, y_P = np.asarray(x, float), np.asarray(y, float)
    if len(x_P) < MIN_POINTS or len(np.unique(x_P)) < 4 or np.ptp(y_P) == 0:
        return None
    coefficients, estimate = _fitted(x_P, y_P)
    rng = np.random.default_rng(len(x_P))
    draws: list[float] = []
    while len(draws) < RESAMPLES:
        drawn_P = rng.integers(len(x_P), size=len(x_P))
        if len(np.unique(x_P[drawn_P])) >= 4 and np.ptp(y_P[drawn_P]) > 0:
            draws.append(_fitted(x_P[drawn_P], y_P[drawn_P])[1])
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Fit(coefficients, Interval(estimate, float(low), float(high)))


def _fitted(x_P: np.ndarray, y_P: np.ndarray) -> tuple[tuple[float, float, float], float]:
    squared, linear, constant = (float(c) for c in np.polyfit(x_P, y_P, 2))
    residual_P = y_P - np.polyval([squared, linear, constant], x_P)
    return (squared, linear, constant), 1 - float(np.sum(residual_P**2) / np.sum((y_P - y_P.mean()) ** 2))
