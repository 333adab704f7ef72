"""How much rows and domains weigh: by hand."""

from types import SimpleNamespace

import pytest
import torch

from stages.config.distill import DistillConfig
from stages.on_policy.balance import loss_weights
from stages.on_policy.shares import capped_shares

DOMAINS, LENGTHS = ["long", "long", "short"], [6, 3, 1]
ALONE = SimpleNamespace(global_sum=lambda value: value)


def weights(**options: object) -> tuple[list[list[float]], dict[str, float]]:
    found, shares = loss_weights(DOMAINS, LENGTHS, DistillConfig(**options), ALONE, ["long", "other", "short"])
    assert [len(row_N) for row_N in found] == LENGTHS
    assert float(torch.cat(found).sum()) == pytest.approx(1.0)
    return [sorted(set(row_N.tolist())) for row_N in found], shares


def test_every_token_or_row_counts_the_same():
    rows, shares = weights()
    assert rows == [[pytest.approx(0.1)]] * 3
    assert shares == {"long": pytest.approx(0.9), "short": pytest.approx(0.1)}
    rows, shares = weights(loss_normalisation="sequence")
    assert rows == [[pytest.approx(1 / 18)], [pytest.approx(1 / 9)], [pytest.approx(1 / 3)]]
    assert shares["long"] == pytest.approx(2 / 3)


def test_domains_count_the_same():
    rows, shares = weights(loss_normalisation="domain")
    assert rows == [[pytest.approx(0.5 / 9)], [pytest.approx(0.5 / 9)], [pytest.approx(0.5)]]
    assert shares == {"long": 0.5, "short": 0.5}


def test_a_budget_holds_a_long_domain_down():
    rows, shares = weights(max_domain_share=0.6)
    assert shares == {"long": pytest.approx(0.6), "short": pytest.approx(0.4)}
    assert rows == [[pytest.approx(0.6 / 9)], [pytest.approx(0.6 / 9)], [pytest.approx(0.4)]]


def test_what_is_over_the_cap_goes_to_the_others_in_proportion():
    shares = capped_shares({"a": 70.0, "b": 20.0, "c": 10.0}, 0.5)
    assert shares == {"a": 0.5, "b": pytest.approx(1 / 3), "c": pytest.approx(1 / 6)}
    # Lifting b pushes it over the cap as well.
    shares = capped_shares({"a": 60.0, "b": 39.0, "c": 1.0}, 0.45)
    assert shares == {"a": 0.45, "b": 0.45, "c": pytest.approx(0.1)}
    assert capped_shares({"a": 3.0, "b": 1.0}, 0.5) == {"a": 0.5, "b": 0.5}
    assert capped_shares({"a": 3.0, "b": 1.0}, 0.2) == {"a": 0.5, "b": 0.5}
    assert capped_shares({}, 1.0) == {}
