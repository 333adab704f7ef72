"""The calibration's fast part: few trials of every case, whose bounds allow for their number."""

import pytest

from studies.calibration import Case, main

pytestmark = pytest.mark.slow


def test_every_case_is_inside_its_bounds(capsys):
    assert main(["--trials", "100"]) == 0
    assert "204 cases, 0 outside their bounds" in capsys.readouterr().out


def test_a_case_outside_its_bounds_is_seen():
    assert not Case("passes at the margin", "", 0.08, 0.0, 0.04, 2000).holds
    assert not Case("score covered", "", 0.89, 0.92, 1.0, 2000).holds
    assert Case("passes at the margin", "", 0.05, 0.0, 0.04, 500).holds
