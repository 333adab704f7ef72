"""The quadratic fit against hand-worked cases and scipy."""

import numpy as np
import pytest
from scipy.stats import f, linregress, ncf

from evals.statistics.fit import quadratic_fit


def test_points_on_a_parabola_are_fitted_exactly():
    x = [0.0, 0.5, 1.0, 2.0, 3.0, 4.0]
    found = quadratic_fit(x, [2 * v * v - v + 0.5 for v in x])
    assert found.coefficients == pytest.approx((2, -1, 0.5))
    assert found.r_squared == 1 and found.above(0.9) == 0


def test_r_squared_by_hand():
    """x is symmetric and y alternates about 0, so the best parabola is the line through the mean: y = 0.2 or so."""
    x, y = [-2.0, -1.0, 0.0, 1.0, 2.0], [1.0, -1.0, 1.0, -1.0, 1.0]
    found = quadratic_fit(x, y)
    # Normal equations for a x² + c: a = cov(x², y) / var(x²) with x² = 4, 1, 0, 1, 4 and y's mean 0.2.
    squares = np.array([4, 1, 0, 1, 4])
    line = linregress(squares, y)
    assert found.coefficients == pytest.approx((line.slope, 0, line.intercept), abs=1e-9)
    assert found.r_squared == pytest.approx(line.rvalue**2)


def test_with_no_relation_the_p_value_is_the_f_tests():
    rng = np.random.default_rng(1)
    x = rng.random(12)
    y = x**2 + rng.normal(0, 0.3, 12)
    found = quadratic_fit(x, y)
    ratio = found.r_squared / 2 / ((1 - found.r_squared) / 9)
    assert found.above(0.0) == pytest.approx(f.sf(ratio, 2, 9))
    assert found.above(0.5) == pytest.approx(ncf.sf(ratio, 2, 9, 12))


def test_the_interval_holds_the_shares_that_the_test_does_not_refute():
    rng = np.random.default_rng(1)
    x = rng.random(40)
    found = quadratic_fit(x, x**2 + rng.normal(0, 0.15, 40))
    interval = found.interval(0.95)
    assert interval.low < found.r_squared < interval.high
    assert found.above(interval.low) == pytest.approx(0.025)
    assert found.above(interval.high) == pytest.approx(0.975)


@pytest.mark.parametrize(("points", "share"), [(7, 0.0), (7, 0.5), (20, 0.5)])
def test_the_level_and_the_coverage_are_as_told(points, share):
    """2,000 draws: a test at 2.5 % errs in 1.5 to 3.5 %, an interval of 95 % covers in 93 to 97 or, at 0, in more."""
    rng = np.random.default_rng(points)
    x = rng.random(points)
    signal = np.polyval([3, -1, 0], x)
    noise = signal.std() * ((1 - share) / share) ** 0.5 if share else 1.0
    wrong = covered = 0
    for _ in range(2000):
        found = quadratic_fit(x, signal * (share > 0) + rng.normal(0, noise, points))
        wrong += found.above(share) < 0.025
        interval = found.interval(0.95)
        covered += interval.low <= share <= interval.high
    assert 30 <= wrong <= 70
    assert 1860 <= covered <= (2000 if share == 0 else 1940)


def test_what_explains_nothing_or_nearly_all_has_an_interval():
    """An R² that rounding makes negative, and one whose rest is as small as rounding."""
    x = np.arange(7) - 3.0
    cubic = x**3 - 7 * x
    found = quadratic_fit(x, cubic)
    assert found.r_squared == pytest.approx(0, abs=1e-9) and found.r_squared >= 0
    assert found.interval(0.95).low == 0 and found.above(0.0) > 0.9
    for rest in (1e-3, 1e-5, 1e-7):
        near = quadratic_fit(x, x**2 + rest * cubic)
        assert 0.9 < near.interval(0.95).low <= near.r_squared <= 1


def test_six_points_say_nothing():
    found = quadratic_fit(range(6), [0, 1, 4, 9, 16, 24])
    interval = found.interval(0.95)
    assert found.r_squared > 0.99 and (interval.low, interval.high) == (0, 1)


def test_noise_is_not_predicted():
    rng = np.random.default_rng(0)
    found = quadratic_fit(rng.normal(size=60), rng.normal(size=60))
    assert found.r_squared < 0.2 and found.above(0.0) > 0.025


@pytest.mark.parametrize(("x", "y"), [([1, 2, 3], [1, 2, 4]), ([1] * 6, range(6)), (range(6), [1] * 6)])
def test_too_little_to_fit(x, y):
    assert quadratic_fit(x, y) is None


def test_unpaired_points_are_refused():
    with pytest.raises(ValueError, match="not paired"):
        quadratic_fit([1, 2, 3, 4, 5], [1, 2, 3])
