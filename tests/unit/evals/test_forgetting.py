"""Drops from the start, by checkpoint and by method."""

import pytest

from evals.comparison.forgetting import by_method, drop, mean_drop
from stages.config.kinds import EXPERT_METHODS
from tests.support.scored import results


def test_drop_is_positive_where_something_was_lost():
    found = drop(results({("student", "g"): 0.3}), "student", "g")
    assert found is not None and found.mean == pytest.approx(0.2) and found.low > 0


def test_mean_drop_covers_only_domains_without_expert():
    found = mean_drop(results(), "experts/a")
    assert found is not None and found.mean == pytest.approx(-0.4)
    assert mean_drop(results({("student", "g"): -1}), "student") is None


def test_methods_are_compared_outside_their_own_domain():
    found = {each.method: each for each in by_method(results({("experts/a", "g"): 0.5}))}
    assert tuple(found) == EXPERT_METHODS
    sft, rl, rft = (found[method] for method in ("sft", "rl", "rft"))
    assert sft.method == "sft" and sft.drop is not None and sft.drop.mean == pytest.approx(0.1)
    assert rl.method == "rl" and rl.drop is not None and rl.drop.mean == pytest.approx(0.1)
    assert (sft.experts, rl.experts, rft.experts, rft.drop) == (1, 1, 0, None)
