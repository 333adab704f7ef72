"""Sample sizes against hand-worked values and a simulation."""

import numpy as np
import pytest

from evals.claim_config import HypothesisConfig
from evals.power import BINARY_SD, equivalence_needed, examples_needed, margin_notes, precision_notes, resolved


def test_hand_worked_sizes():
    # ((1.95996 + 0.84162) * 0.70711 / 0.08)^2 = 613.2; 1.95996 * 0.70711 / 20 = 0.0693
    assert examples_needed(0.08) == 614
    assert resolved(400) == pytest.approx(0.0693, abs=1e-4)
    assert examples_needed(0.1, 0.90, 0.9, 0.5) == 215  # ((1.64485 + 1.28155) * 5)^2 = 214.1


def test_power_of_one_half_needs_the_half_width():
    assert resolved(examples_needed(0.05, power=0.5)) <= 0.05 < resolved(examples_needed(0.05, power=0.5) - 1)


def test_the_size_has_the_power_it_names():
    n = examples_needed(0.08)
    rng = np.random.default_rng(0)
    difference_RN = (rng.random((2000, n)) < 0.5).astype(float) - (rng.random((2000, n)) < 0.5)
    shown = np.mean(difference_RN.mean(axis=1) - resolved(n, sd=BINARY_SD) > -0.08)
    assert 0.77 < shown < 0.83


def test_equivalence_has_the_power_it_names():
    # ((1.64485 + 1.28155) * 0.70711 / 0.08)^2 = 669.1
    n = equivalence_needed(0.08)
    assert n == 670
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


def test_the_note_names_both_keys_and_its_assumption():
    (note,) = precision_notes(400, 0.08, 0.95)
    for words in ("evaluate.examples 400", "±6.9 points", "n ≥ 614", "binary scores"):
        assert words in note


def test_a_margin_that_cannot_be_resolved_is_warned_of():
    assert len(precision_notes(301, 0.08, 0.95)) == 1
    assert precision_notes(300, 0.08, 0.95)[-1].startswith("warning: evaluate.examples is too small")


@pytest.mark.parametrize("bad", [{"margin": 0}, {"margin": 0.1, "confidence": 1}, {"margin": 0.1, "power": 1}])
def test_arguments_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match="must be"):
        examples_needed(**bad)
