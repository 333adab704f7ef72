"""The quadratic fit against hand-worked cases and scipy."""

import numpy as np
import pytest
from scipy.stats import bootstrap, linregress

from evals.fit import quadratic_fit


def test_points_on_a_parabola_are_fitted_exactly():
    x = [0.0, 0.5, 1.0, 2.0, 3.0, 4.0]
    found = quadratic_fit(x, [2 * v * v - v + 0.5 for v in x])
    assert found.coefficients == pytest.approx((2, -1, 0.5))
    assert (found.r_squared.mean, found.r_squared.low) == pytest.approx((1, 1))


def test_r_squared_by_hand():
    """x is symmetric and y alternates about 0, so the best parabola is the line through the mean: y = 0.2 or so."""
    x, y = [-2.0, -1.0, 0.0, 1.0, 2.0], [1.0, -1.0, 1.0, -1.0, 1.0]
    found = quadratic_fit(x, y)
    # Normal equations for a x² + c: a = cov(x², y) / var(x²) with x² = 4, 1, 0, 1, 4 and y's mean 0.2.
    squares = np.array([4, 1, 0, 1, 4])
    line = linregress(squares, y)
    assert found.coefficients == pytest.approx((line.slope, 0, line.intercept), abs=1e-9)
    assert found.r_squared.mean == pytest.approx(line.rvalue**2)


def test_the_interval_of_r_squared_is_scipys_bootstrap_over_points():
    rng = np.random.default_rng(1)
    x = rng.random(40)
    y = x**2 + rng.normal(0, 0.15, 40)

    def r_squared(x_P, y_P):
        # Of a least-squares fit with a constant: the squared correlation of fitted and observed.
        return np.corrcoef(np.polyval(np.polyfit(x_P, y_P, 2), x_P), y_P)[0, 1] ** 2

    expected = bootstrap(
        (x, y), r_squared, paired=True, vectorized=False, n_resamples=2000, method="percentile", rng=2
    ).confidence_interval
    found = quadratic_fit(x, y).r_squared
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.02)
    assert found.high - found.low > 0.1


def test_noise_is_not_predicted():
    rng = np.random.default_rng(0)
    found = quadratic_fit(rng.normal(size=60), rng.normal(size=60))
    assert found.r_squared.mean < 0.2


@pytest.mark.parametrize(("x", "y"), [([1, 2, 3, 4], [1, 2, 3, 4]), ([1] * 6, range(6)), (range(6), [1] * 6)])
def test_too_little_to_fit(x, y):
    assert quadratic_fit(x, y) is None


def test_unpaired_points_are_refused():
    with pytest.raises(ValueError, match="not paired"):
        quadratic_fit([1, 2, 3, 4, 5], [1, 2, 3])
