"""Each criterion fails alone; what cannot be compared is said."""

import dataclasses

import pytest

from evals.gate import judge
from tests.scored import results, sheet

GOOD = {("student", "a"): 0.9, ("student", "b"): 0.9}


def _failed(scores, **options):
    verdict = judge(results(GOOD | scores), 0.08, 0.05, **options)
    assert verdict.promoted == (not [c for c in verdict.criteria if c.passed is False])
    return [criterion.name for criterion in verdict.criteria if criterion.passed is False]


@pytest.mark.parametrize(
    ("scores", "name"),
    [
        ({("student", "a"): 0.75}, "non-inferior to experts/a on a"),
        ({("student", "b"): 0.75}, "non-inferior to experts/b on b"),
        ({("student", "b"): -1}, "non-inferior to experts/b on b"),
        ({("student", "g"): 0.4}, "forgetting"),
    ],
)
def test_one_criterion_fails_alone(scores, name):
    assert _failed(scores) == [name]


def test_a_better_champion_stays():
    champion = {"a": sheet("a", 1.0), "b": sheet("b", 1.0)}
    assert _failed({}, champion=champion) == ["not worse than the previous champion"]


def test_the_champion_is_compared_with_the_first_seeds_student():
    whole = results(GOOD)
    cells = {key: dict(cell) for key, cell in whole.cells.items()}
    for domain in ("a", "b"):
        cells["student", domain, "held_out"][1] = sheet(domain, 0.5)
    champion = {domain: cells["student", domain, "held_out"][0] for domain in ("a", "b")}
    line = judge(dataclasses.replace(whole, cells=cells), 0.5, 0.05, champion).criteria[-1]
    assert line.passed
    assert "difference +0.0 [+0.0, +0.0]" in line.text


def test_all_met_promotes_and_a_missing_champion_is_said():
    verdict = judge(results(GOOD), 0.08, 0.05)
    assert verdict.promoted
    assert verdict.criteria[-1].passed is None and "no scores of a previous champion" in verdict.criteria[-1].text
    assert "+0.0" in verdict.criteria[0].text


def test_a_champion_on_other_examples_is_not_compared():
    verdict = judge(results(GOOD), 0.08, 0.05, {"a": sheet("a", 1.0, 30)})
    assert verdict.promoted and "not scored on these examples" in verdict.criteria[-1].text


def test_the_text_says_that_every_teacher_must_pass():
    lines = judge(results(GOOD), 0.08, 0.05).criteria[:2]
    assert all("every teacher must pass, so no correction" in line.text for line in lines)
