"""The summary of a run and the reading of sheets."""

import dataclasses
import json

import pytest

from evals.results import metrics
from evals.scores import read_scores
from experts.errors import UserError
from tests.scored import results, row, sheet


def test_metrics_hold_the_table():
    found = metrics(results())
    assert found["eval/a/teacher"] == pytest.approx(0.9)
    assert found["eval/b/cold_start"] == pytest.approx(0.5)
    assert found["eval/recovery"] == pytest.approx(0.75)
    assert found["eval/a/recovery_low"] < 0.75 < found["eval/a/recovery_high"]
    assert found["eval/mean/student"] == pytest.approx(0.8)
    assert found["eval/forgetting/g"] == 0
    assert "eval/g/teacher" not in found


def test_what_is_missing_has_no_key():
    found = metrics(results({("student", "b"): -1}))
    assert "eval/b/student" not in found and "eval/mean/student" not in found and "eval/recovery" not in found
    assert found["eval/a/student"] == pytest.approx(0.8)


def test_other_examples_are_refused():
    whole = results()
    cells = dict(whole.cells) | {("base", "a", "held_out"): {0: sheet("a", 0.5, 7)}}
    with pytest.raises(UserError, match="other examples of a/held_out"):
        dataclasses.replace(whole, cells=cells)


def test_a_seed_that_only_one_side_has_is_left_out():
    whole = results()
    cells = dict(whole.cells) | {("student", "a", "held_out"): {1: sheet("a", 0.6)}}
    partial = dataclasses.replace(whole, cells=cells)
    pair = partial.aligned(["cold_start", "student"], "a")
    assert pair is not None and pair[0].shape == (1, 100)


def test_sheet_is_read_and_checked(tmp_path):
    path = tmp_path / "scores.jsonl"
    path.write_text("".join(json.dumps(row(i, 1.0, (1.0, 0.0))) + "\n" for i in range(4)))
    scores = read_scores(tmp_path, "a", "held_out")
    assert list(scores.sampled_N) == [0.5] * 4 and scores.contaminated == 0.25
    path.write_text(json.dumps({"id": "x"}) + "\n")
    with pytest.raises(UserError, match=r"scores\.jsonl:1: a row lacks"):
        read_scores(tmp_path, "a", "held_out")
