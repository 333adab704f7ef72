"""MOPD beside its baselines: the better one is named, whoever it is."""

import dataclasses

import pytest

from evals.comparison.merges import best, merges
from evals.comparison.results import Cost, Results
from evals.report.table import merges_grid, render_markdown, statements
from tests.support.scored import results, sheet


def with_baselines(ties: float, mix: float) -> Results:
    """The usual run with two more merges of the same experts, as good on both experts' domains."""
    whole = results()
    cells = dict(whole.cells)
    for name, score in (("baselines/ties", ties), ("baselines/mix_sft", mix)):
        for domain in whole.domains:
            cells[name, domain, "held_out"] = {0: sheet(domain, score)}
    names = (*whole.checkpoints, "baselines/ties", "baselines/mix_sft")
    costs = {"student": Cost(2e6, 90.0, 2**30), "baselines/ties": Cost(0.0, 3.0, 0.0)}
    return dataclasses.replace(whole, checkpoints=names, cells=cells, costs=costs)


def test_without_baselines_there_is_nothing_to_compare():
    assert merges(results()) == []
    assert merges_grid(results()) is None
    assert not any("merges of these experts" in line for line in statements(results()))


def test_the_better_merge_is_named_with_its_lead():
    found = with_baselines(ties=0.95, mix=0.3)
    student, ties, mix = merges(found)
    assert (student.name, student.over_student) == ("student", None)
    assert ties.score.mean == pytest.approx(0.95)
    assert ties.over_student.mean == pytest.approx(0.95 - student.score.mean)
    assert best([student, ties, mix]) is ties
    (line,) = [line for line in statements(found) if line.startswith("Best of 3 merges")]
    assert line.startswith("Best of 3 merges of these experts by mean score: ties, +")
    (line,) = [line for line in statements(with_baselines(0.1, 0.2)) if line.startswith("Best of")]
    assert line == "Best of 3 merges of these experts by mean score: MOPD."


def test_a_merge_that_was_not_scored_leaves_the_best_unnamed():
    found = with_baselines(ties=0.95, mix=0.3)
    cells = {key: cell for key, cell in found.cells.items() if key[0] != "baselines/mix_sft"}
    partial = dataclasses.replace(found, cells=cells)
    assert merges(partial)[2].score is None
    assert not any(line.startswith("Best of") for line in statements(partial))


def test_the_table_has_scores_forgetting_and_cost():
    grid = merges_grid(with_baselines(ties=0.95, mix=0.3))
    assert grid.head == ("merge", "a", "b", "mean", "over MOPD", "forgotten", "Mtokens", "seconds", "GiB")
    mopd, ties, mix = grid.rows
    assert [row[0] for row in grid.rows] == ["MOPD", "ties", "mix_sft"]
    assert (mopd[4], mopd[6:]) == ("–", ("2.00", "90", "1.0"))
    assert ties[6:] == ("0.00", "3", "–")
    assert mix[6:] == ("–", "–", "–")
    assert ties[1] == "95.0" and ties[3].startswith("95.0 [")
    assert "| ties | 95.0 |" in render_markdown(with_baselines(ties=0.95, mix=0.3))
