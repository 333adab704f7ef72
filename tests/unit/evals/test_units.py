"""Examples of one unit are no independent evidence: values by unit, and what intervals, gate and plan make of them."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from base.store.checkpoint import Store
from evals.comparison.results import Results, metrics
from evals.comparison.scores import Scores
from evals.promotion.gate import judge
from evals.report.table import render_markdown
from evals.statistics.crossed_effects import over_both, over_examples
from evals.statistics.units import by_unit, independent
from experts.loading import load_domain
from flows.check.check import deep_check
from flows.plan.graph import build_graph
from flows.run_file.load import load_run_file
from tests.support.scored import results, row


def test_examples_of_their_own_units_stay_as_they_are():
    scores_SN = np.random.default_rng(0).random((2, 5))
    assert by_unit(scores_SN, list("abcde")) is scores_SN


def test_the_values_have_the_mean_and_the_jackknifes_variance():
    """Seven examples of units of 3, 2, 1 and 1 are worth 49 / 15 = 3.3: the two small ones are one group."""
    scores_N = np.array([1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0])
    values_G = by_unit(scores_N, list("aabcccd"))
    assert values_G.shape == (3,) and values_G.mean() == pytest.approx(scores_N.mean())
    left_out = [np.delete(scores_N, own).mean() for own in ([3, 4, 5], [0, 1], [2, 6])]
    expected = 2 / 3 * np.sum((np.array(left_out) - np.mean(left_out)) ** 2)
    assert values_G.var(ddof=1) / 3 == pytest.approx(expected)


def test_copies_of_an_example_count_once():
    """Each answer four times over: the interval is that of the answers themselves."""
    scores_SN = np.random.default_rng(1).integers(0, 2, (3, 30)).astype(float)
    fourfold_SN, units = np.repeat(scores_SN, 4, axis=1), [str(n) for n in range(30) for _ in range(4)]
    values_SG = by_unit(fourfold_SN, units)
    assert values_SG == pytest.approx(scores_SN)
    assert over_examples({"": values_SG}).variance == pytest.approx(over_examples({"": scores_SN}).variance)
    assert over_both({"": values_SG}).variance == pytest.approx(over_both({"": scores_SN}).variance)


def test_a_single_unit_is_a_single_value():
    assert by_unit(np.array([[1.0, 0.0], [1.0, 1.0]]), ["a", "a"]) == pytest.approx(np.array([[0.5], [1.0]]))


def test_it_is_linear():
    rng = np.random.default_rng(2)
    a_SN, b_SN, units = rng.random((2, 50)), rng.random((2, 50)), [str(n % 7) for n in range(50)]
    assert by_unit(a_SN - b_SN, units) == pytest.approx(by_unit(a_SN, units) - by_unit(b_SN, units))


@pytest.mark.parametrize("agreement", [0.0, 0.5, 1.0])
def test_a_student_at_the_margin_passes_no_more_often_than_told(agreement):
    """Four hundred examples of thirty units: taken as independent, those that agree let 35 of 100 pass."""
    rng = np.random.default_rng(3)
    places = np.sort(rng.zipf(1.5, 400) % 30)
    units = [str(place) for place in places]
    passed = 0
    for _ in range(400):
        own, shared = rng.random(400), rng.random(30)[places]
        lost_N = np.where(rng.random(400) < agreement, shared, own) < 0.08
        passed += over_examples({"": by_unit(-lost_N.astype(float), units)}).above(-0.08) < 0.025
    assert passed / 400 <= 0.045


def grouped(whole: Results, size: int) -> Results:
    """The same scores, `size` examples of a unit each."""
    cells = {
        key: {
            seed: Scores(
                sheet.domain, sheet.split, [{**r, "source": f"u{n // size}"} for n, r in enumerate(sheet.rows)]
            )
            for seed, sheet in cell.items()
        }
        for key, cell in whole.cells.items()
    }
    return dataclasses.replace(whole, cells=cells)


def test_tables_and_gate_count_units():
    whole = results({("student", "a"): 0.9, ("student", "b"): 0.9})
    same = grouped(whole, 1)
    assert same.score("student", "a") == whole.score("student", "a")
    four = grouped(whole, 4)
    alone, together = whole.score("student", "a"), four.score("student", "a")
    assert together.mean == pytest.approx(alone.mean)
    assert together.high - together.low > 1.7 * (alone.high - alone.low)
    met = {one.name: one for one in judge(whole, 0.08, 0.05).criteria}["non-inferior to experts/a on a"]
    few = {one.name: one for one in judge(four, 0.08, 0.05).criteria}["non-inferior to experts/a on a"]
    assert met.passed and not few.passed
    unjudged = "cannot be judged: with fewer than 51 independent examples, here 25, even equal answers do not show it"
    assert unjudged in few.text
    difference = four.difference("student", "cold_start", "a")
    assert difference.high - difference.low > 1.7 * np.ptp(
        [whole.difference("student", "cold_start", "a").low, whole.difference("student", "cold_start", "a").high]
    )


@pytest.mark.parametrize("size", [100, 1000])
def test_a_domain_of_one_unit_has_tables_and_fails_the_gate(size):
    single = grouped(results(), size)
    assert "| a |" in render_markdown(single) and single.recovery() is None
    assert isinstance(metrics(single), dict)
    assert not judge(single, 0.08, 0.05).promoted


def test_the_answers_of_a_chat_are_one_unit(tmp_path: Path):
    turns = [{"role": role, "content": f"{role} {n}"} for n in range(4) for role in ("user", "assistant")]
    chats = [
        {"messages": [{"role": turn["role"], "content": f"chat {chat}: {turn['content']}"} for turn in turns]}
        for chat in range(20)
    ]
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    options = {"path": str(file), "messages_field": "messages", "assistant_turns": "all", "held_out_share": 0.5}
    drawn = load_domain("chats", "hub", options).draw_up_to(1000, "held_out", 0)
    units = [example.source for example in drawn]
    assert len(drawn) == 4 * len(set(units)) == 4 * independent(units)
    assert len({example.id for example in drawn}) == len(drawn)


def test_an_interval_knows_units_of_unequal_size():
    """Half of the examples are of one unit: no number of others makes up for it."""
    rows = [{**row(n, float(n >= 50)), "source": "big" if n < 50 else f"u{n}"} for n in range(100)]
    whole = results()
    cells = {key: cell for key, cell in whole.cells.items() if key[1] != "a"}
    cells["student", "a", "held_out"] = {0: Scores("a", "held_out", rows)}
    found = dataclasses.replace(whole, cells=cells).score("student", "a")
    assert found.mean == pytest.approx(0.5) and found.high - found.low > 0.6


def test_the_plan_warns_of_too_few_units(tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "name: few\n"
        "base: {pretrain: {max_steps: 1, examples: 20, domains: [edit], model: {hidden_size: 32, layers: 1, heads: 2, "
        "intermediate_size: 32, max_length: 4096}}}\n"
        "domains: {edit: {kind: code_edit, options: {source: humaneval, held_out_share: 0.1}}}\n"
        "experts: {edit: {domain: edit, train: {sft: {max_steps: 1, examples: 20}}}}\n"
        "merge: {max_steps: 1, examples: 20}\n"
        "evaluate: {examples: 60, samples: 0}\n"
    )
    warnings = deep_check(build_graph(load_run_file(file, []), tmp_path), Store(tmp_path))
    (told,) = [line for line in warnings if "units" in line]
    assert told.startswith("domains.edit: the 60 held_out examples are of ") and "needs 51" in told
