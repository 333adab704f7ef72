"""Sample sizes against hand-worked values and a simulation."""

import numpy as np
import pytest

from evals.config.claims import HypothesisConfig
from evals.statistics.power import (
    BINARY_SD,
    equivalence_needed,
    examples_needed,
    fewest_examples,
    margin_notes,
    power_of,
    precision_notes,
    resolved,
)
from evals.statistics.tests_of_scores import non_inferiority


def test_hand_worked_sizes():
    # With q = (1.95996 + 0.84162) / 0.08: the root of n² = q² (n / 2 + 4). 1.95996 sqrt(0.5 / 400 + 4 / 400²) = 0.0700
    assert examples_needed(0.08) == 622
    assert resolved(400) == pytest.approx(0.0700, abs=1e-4)
    assert examples_needed(0.1, 0.90, 0.9, 0.5) == 230
    # No spread at all: 2 (1.95996 + 0.84162) / 0.08.
    assert examples_needed(0.08, sd=0) == 71


@pytest.mark.parametrize(("margin", "confidence"), [(0.08, 0.95), (0.03, 0.95), (0.3, 0.95), (0.08, 0.99)])
def test_the_fewest_examples_are_those_of_equal_answers(margin, confidence):
    n = fewest_examples(margin, confidence)
    p_values = [non_inferiority(np.ones(examples), np.ones(examples), margin) for examples in (n - 2, n)]
    assert p_values[0] > (1 - confidence) / 2 > p_values[1]


def test_all_domains_must_pass_so_more_of_them_need_more_examples():
    assert power_of(examples_needed(0.08), 0.08) == pytest.approx(0.8, abs=0.001)
    assert power_of(examples_needed(0.08), 0.08, domains=4) == pytest.approx(0.8**4, abs=0.003)
    assert power_of(examples_needed(0.08, domains=20), 0.08, domains=20) == pytest.approx(0.8, abs=0.002)
    assert examples_needed(0.08) < examples_needed(0.08, domains=4) < examples_needed(0.08, domains=20) < 2000


def test_power_of_one_half_needs_the_half_width():
    assert resolved(examples_needed(0.05, power=0.5)) <= 0.05 < resolved(examples_needed(0.05, power=0.5) - 1)


def test_the_size_has_the_power_it_names():
    n = examples_needed(0.08)
    rng = np.random.default_rng(0)
    difference_RN = (rng.random((2000, n)) < 0.5).astype(float) - (rng.random((2000, n)) < 0.5)
    shown = np.mean(difference_RN.mean(axis=1) - resolved(n, sd=BINARY_SD) > -0.08)
    assert 0.77 < shown < 0.83


def test_equivalence_has_the_power_it_names():
    # With q = (1.64485 + 1.28155) / 0.08: the root of n² = q² (n / 2 + 4).
    n = equivalence_needed(0.08)
    assert n == 677
    rng = np.random.default_rng(0)
    difference_RN = (rng.random((2000, n)) < 0.5).astype(float) - (rng.random((2000, n)) < 0.5)
    half = resolved(n, 0.90)
    means_R = difference_RN.mean(axis=1)
    assert 0.77 < np.mean((means_R - half > -0.08) & (means_R + half < 0.08)) < 0.83


def test_margins_of_hypotheses_are_told_together():
    within = {"compare": ["student", "base"], "expect": "within", "margin": 0.05}
    tests = {"a": within, "b": within, "c": {**within, "expect": "not_below"}, "d": {**within, "measure": "seconds"}}
    lines = margin_notes({"H": HypothesisConfig.model_validate({"claim": "So.", "tests": tests})}, 0.95)
    assert [line.partition(":")[0] for line in lines] == ["hypotheses H.a, H.b", "hypotheses H.c"]
    assert f"n ≥ {equivalence_needed(0.05)}" in lines[0] and f"n ≥ {examples_needed(0.05)}" in lines[1]


def test_the_note_names_both_keys_and_its_assumptions():
    (note,) = precision_notes(400, 0.08, 0.95)
    for words in ("evaluate.examples 400", "±7.0 points", "n ≥ 622", "in 61 if they are independent", "binary scores"):
        assert words in note
    (several,) = precision_notes(400, 0.08, 0.95, 4)
    assert "passes on all 4 domains in 99 of 100 runs if their answers agree on nine of ten" in several
    assert "in 14 if they are independent, for which n ≥ 1001 would" in several


def test_a_margin_that_equal_scores_seldom_meet_is_warned_of():
    assert len(precision_notes(100, 0.08, 0.95)) == 1
    assert precision_notes(70, 0.08, 0.95)[-1].startswith("warning: evaluate.examples is too small")
    # The same examples for several domains together.
    assert precision_notes(100, 0.08, 0.95, 6)[-1].startswith("warning: evaluate.examples is too small")


def test_examples_that_can_show_nothing_are_warned_of():
    assert precision_notes(20, 0.08, 0.95)[-1] == (
        "warning: evaluate.examples 20 can show nothing within gate.non_inferiority_margin 0.08: that needs 51 "
        "examples, even with equal answers"
    )


@pytest.mark.parametrize("bad", [{"margin": 0}, {"margin": 0.1, "confidence": 1}, {"margin": 0.1, "power": 1}])
def test_arguments_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match="must be"):
        examples_needed(**bad)
