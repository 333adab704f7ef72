"""Recovery and pass@k against hand-worked values."""

from itertools import combinations

import numpy as np
import pytest

from evals.metrics import Triple, mean_length, pass_at_k, recovery, truncation_rate
from tests.scored import sheet


def _share(value: float) -> np.ndarray:
    return (np.arange(100) < value * 100).astype(float)[None]


def test_recovery_is_a_ratio_of_means_over_domains():
    domains = {"a": Triple(_share(0.5), _share(0.9), _share(0.7)), "b": Triple(_share(0.2), _share(0.4), _share(0.4))}
    found = recovery(domains)
    assert found is not None
    assert found.mean == pytest.approx((0.2 + 0.2) / (0.4 + 0.2))
    assert found.low < found.mean < found.high


def test_recovery_says_nothing_where_the_teacher_gained_nothing():
    assert recovery({"a": Triple(_share(0.5), _share(0.5), _share(0.7))}) is None
    assert recovery({"a": Triple(_share(0.50), _share(0.51), _share(0.7))}) is None
    assert recovery({}) is None


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_pass_at_k_equals_trying_all_subsets(k):
    samples_NK = np.array([[1, 0, 0, 1, 0], [0, 0, 0, 0, 0], [0.9, 1, 1, 1, 1]])
    tried = [[max(row[list(subset)]) >= 1 for subset in combinations(range(5), k)] for row in samples_NK]
    assert pass_at_k(samples_NK, k) == pytest.approx(np.mean(tried))


def test_pass_at_k_refuses_more_than_was_drawn():
    with pytest.raises(ValueError, match="at least 3 samples"):
        pass_at_k(np.zeros((2, 2)), 3)


def test_shape_of_completions():
    assert truncation_rate(sheet("a", 0.25)) == 0.75
    assert mean_length(sheet("a", 0.25)) == 3
