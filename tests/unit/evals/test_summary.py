"""The first screen of a run: one sentence, a short table, what failed, and advice that follows from the numbers."""

import dataclasses
import io

import pytest
from rich.console import Console

from evals.comparison.results import Expert, Results
from evals.promotion.advice import Settings, advice
from evals.promotion.gate import GateVerdict, judge
from evals.report.summary import NAME_CHARACTERS, Summary, render, summarise, table
from tests.support.scored import results, sheet

GOOD = {("student", "a"): 0.9, ("student", "b"): 0.9}
STEPS = {
    "experts/a": ("experts.a.train.rl.max_steps", 200),
    "experts/b": ("experts.b.train.sft.max_steps", 120),
    "student": ("merge.max_steps", 300),
}
SETTINGS = Settings(command="mopd run lab.yaml", margin=0.08, examples=100, max_new_tokens=20, steps=STEPS)


def judged(whole: Results, **verdict: str) -> GateVerdict:
    return dataclasses.replace(judge(whole, 0.08, 0.05), **verdict)


def screen(whole: Results, settings: Settings = SETTINGS, **verdict: str) -> Summary:
    return summarise(whole, judged(whole, **verdict), settings)


def advised(scores: dict[tuple[str, str], float], settings: Settings = SETTINGS) -> tuple[str, ...]:
    whole = results(scores)
    return advice(whole, judged(whole), settings)


def cut_nowhere(whole: Results) -> Results:
    """The same scores, with completions that end by themselves."""

    def ended(row: dict) -> dict:
        return row | {"greedy": row["greedy"] | {"truncated": False}}

    cells = {
        key: {seed: dataclasses.replace(one, rows=[ended(row) for row in one.rows]) for seed, one in cell.items()}
        for key, cell in whole.cells.items()
    }
    return dataclasses.replace(whole, cells=cells)


def wide(domains: int) -> Results:
    """As many domains, each with an expert at 90 % and a student that is worse from domain to domain."""
    names = [f"skill{number:02d}" for number in range(domains)]
    cells = {}
    for number, name in enumerate(names):
        shares = {"base": 0.2, "cold_start": 0.3, f"experts/{name}": 0.9, "student": 0.9 - number / 100}
        cells |= {(who, name, "held_out"): {0: sheet(name, share)} for who, share in shares.items()}
    experts = {f"experts/{name}": Expert(name, "rl") for name in names}
    teachers = {name: {f"experts/{name}": 1.0} for name in names}
    checkpoints = ("base", "cold_start", *experts, "student")
    return Results(
        "wide", (0,), checkpoints, tuple(names), cells, teachers, experts, (), "cold_start", 0.95, provenance={}
    )


@pytest.mark.parametrize(
    ("scores", "verdict", "said"),
    [
        (
            GOOD,
            {},
            "Promoted to champion: student has 90.0 % on the mean of the experts' 2 domains, from 50.0 % at the ",
        ),
        ({}, {}, "Not promoted, 2 of 6 criteria failed: student has 80.0 % on the mean"),
        (GOOD, {"reigns": "2026-11-29 07:01 UTC, by the gate"}, "Already champion, since 2026-11-29 07:01 UTC, by"),
        (GOOD, {"unfinished": "3 of 40 parts are not made"}, "Not judged yet, 3 of 40 parts are not made: student has"),
        (GOOD, {"withheld": "a person chose another"}, "Not promoted, a person chose another: student has 90.0 %"),
    ],
)
def test_one_sentence_says_what_became_of_it_and_how_good_it_is(scores, verdict, said):
    assert screen(results(scores), **verdict).sentence.startswith(said)


def test_nothing_learnt_is_said_by_name():
    scores = {(name, d): 0.0 for name in ("base", "cold_start", "experts/a", "experts/b", "student") for d in "abg"}
    found = screen(results(scores))
    assert found.sentence.startswith("Not promoted, nothing was learnt, 2 of 6 criteria failed: student has 0.0 %")
    assert found.failed[0].startswith("the teachers at 0.0 %, cold_start at 0.0 %")
    assert found.next[0].startswith("experts/a found no reward on a (0.0 → 0.0 %)")


def test_the_table_has_a_line_a_domain_and_marks_the_weakest():
    found = screen(results({("student", "a"): 0.87, ("student", "b"): 0.7, ("student", "g"): 0.45}))
    assert found.weakest == "b" and found.weakest_text == "b, 70.0 % against its teacher's 90.0 %"
    lines = table(found)
    assert lines[1].split() == ["domain", "start", "teacher", "student", "gap"]
    assert lines[3].split() == ["b", "50.0", "90.0", "70.0", "-20.0", "±8.9", "weakest"]
    assert lines[4].split()[:5] == ["g", "50.0", "–", "45.0", "-5.0"]
    assert lines[-1].split()[:5] == ["mean", "50.0", "90.0", "78.5", "-11.5"]
    assert sum("weakest" in line for line in lines) == 1


def test_of_many_domains_the_worst_are_shown_in_twelve_lines():
    found = screen(wide(20))
    lines = table(found)
    assert len(lines) == 12 and lines[2].startswith("skill19") and lines[9].startswith("skill12")
    assert lines[10] == "and 12 more, gaps from -11.0 to +0.0"
    # Of what failed the worst few, so that what to do next is on the screen; programs get all.
    assert len(found.failed) == 17 and found.failed[0].startswith("skill19: -19.0 [")
    assert len(found.failures) == 4 and found.failures[-1] == "14 criteria more"
    assert len(render(found)) <= 30
    assert len(table(screen(wide(8)))) == 11 and screen(wide(8)).more == ""


def test_the_screen_fits_eighty_columns_and_breaks_no_word():
    plain = wide(10)
    long = {name: f"{name}_of_a_domain_with_quite_a_long_name" for name in plain.domains}

    def renamed(text: str) -> str:
        return long.get(text, f"experts/{long[text[8:]]}" if text[8:] in long else text)

    whole = dataclasses.replace(
        plain,
        domains=tuple(long.values()),
        checkpoints=tuple(renamed(name) for name in plain.checkpoints),
        cells={(renamed(who), long[d], split): cell for (who, d, split), cell in plain.cells.items()},
        teachers={long[d]: {f"experts/{long[d]}": 1.0} for d in plain.domains},
        experts={f"experts/{long[d]}": Expert(long[d], "rl") for d in plain.domains},
    )
    found = screen(whole)
    console = Console(width=80, record=True, file=io.StringIO())
    for text in render(found):
        console.print(text)
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    words = set(" ".join(lines).split())
    assert set(found.sentence.split()) <= words and all(set(text.split()) <= words for text in found.next)
    assert "…" in table(found)[2] and len(table(found)[2].split()[0]) == NAME_CHARACTERS


def test_failed_criteria_stand_before_the_rest():
    both = screen(results({("student", "g"): 0.3, ("student", "a"): 0.5, ("student", "b"): 0.9}))
    assert [line.partition(":")[0] for line in both.failed] == ["forgetting", "a"]
    text = "\n".join(line.plain for line in render(screen(results({("student", "g"): 0.3} | GOOD))))
    assert text.index("Failed: forgetting: a drop of +20.0 [") < text.index("Gate: 6 criteria, 1 failed, 4 met")
    assert "of 6 criteria failed" in text and "experts/a on a" not in text


def test_without_a_merge_the_experts_are_compared_with_the_start():
    found = summarise(dataclasses.replace(results(), teachers={}), None, SETTINGS)
    assert found.sentence.startswith("No merge in this run: ")
    assert table(found)[2].split()[:5] == ["a", "50.0", "90.0", "–", "+40.0"]


def test_a_partial_run_has_a_first_screen():
    whole = dataclasses.replace(results(), cells={("base", "a", "held_out"): {0: sheet("a", 0.2)}})
    found = screen(whole, unfinished="9 of 12 parts are not made")
    assert found.sentence.startswith("Not judged yet, 9 of 12 parts are not made: student is not scored")
    assert found.next == ("`mopd run lab.yaml` makes the missing parts",) and found.weakest == ""


def test_an_expert_barely_above_the_start_is_to_be_trained_longer():
    assert advised({("experts/a", "a"): 0.5, ("student", "a"): 0.5, ("student", "b"): 0.9})[0] == (
        "experts/a itself is barely above the start on a (50.0 → 50.0 %): train it longer, "
        "experts.a.train.rl.max_steps=400"
    )


def test_a_gap_asks_for_a_longer_merge_and_with_a_collapse_of_entropy_for_a_lower_rate():
    whole = cut_nowhere(results({("student", "a"): 0.6, ("student", "b"): 0.9}))
    calm = advice(whole, judged(whole), SETTINGS)
    assert calm[0] == (
        "student is 30.0 points below experts/a on a: merge longer, merge.max_steps=600, or give it more prompts, "
        "merge.domain_weights.a=2"
    )
    collapsed = dataclasses.replace(SETTINGS, entropy={("student", "a"): (1.2, 0.1), ("student", "b"): (1.2, 0.1)})
    assert advice(whole, judged(whole), collapsed)[0] == (
        "the student's entropy on a fell from 1.20 to 0.10 nats while it is 30.0 points below experts/a: lower "
        "merge.optimizer.learning_rate"
    )


def test_what_the_start_never_gets_right_is_taught_by_the_teachers_own_completions():
    whole = cut_nowhere(results({("cold_start", "a"): 0.0, ("student", "a"): 0.02, ("student", "b"): 0.9}))
    assert advice(whole, judged(whole), SETTINGS)[0] == (
        "the start has 0.0 % on a, so nearly all of the student's own completions are wrong and teach it "
        "little: merge.on_policy_fraction=0.5 merge.objective=forward_kl merge.domain_weights.a=6; or demonstrations "
        "in the cold start"
    )
    # What settles on answers from nothing loses entropy by learning.
    settled = dataclasses.replace(SETTINGS, entropy={("student", "a"): (1.4, 0.2)})
    assert advice(whole, judged(whole), settled)[0].startswith("the start has 0.0 % on a")


def test_a_merge_that_starts_from_the_champion_is_not_told_to():
    whole = results({("student", "a"): 0.6, ("student", "b"): 0.6})
    verdict = judge(whole, 0.08, 0.05, champion={name: sheet(name, 0.9) for name in ("a", "b")})
    assert any(one.kind == "champion" and one.passed is False for one in verdict.criteria)
    suggestion = "merge.start_from=champion starts from the champion's weights"
    assert suggestion in advice(whole, verdict, SETTINGS)
    assert suggestion not in advice(whole, verdict, dataclasses.replace(SETTINGS, from_champion=True))


def test_answers_that_are_cut_off_ask_for_room():
    assert advised({("student", "a"): 0.6, ("student", "b"): 0.9})[0].startswith(
        "40 % of student's answers on a are cut off at 20 tokens"
    )


def test_forgetting_over_the_limit_asks_for_an_anchor():
    whole = dataclasses.replace(cut_nowhere(results(GOOD | {("student", "g"): 0.3})), anchored=())
    assert advice(whole, judged(whole), SETTINGS)[0] == (
        "g fell by 20.0 points and is not trained on: merge.anchor.domains=[g]"
    )
    anchored = dataclasses.replace(whole, anchored=("g",))
    assert advice(anchored, judged(anchored), SETTINGS)[0].endswith("although it is anchored: merge.anchor.weight=2")


def test_too_few_examples_for_the_margin_name_the_number_that_would_do():
    cells = {
        (who, d, "held_out"): {0: sheet(d, share, 30)}
        for d in ("a", "b", "g")
        for who, share in {"cold_start": 0.3, "experts/a": 0.9, "experts/b": 0.9, "student": 0.87}.items()
    }
    whole = cut_nowhere(dataclasses.replace(results(seeds=(0,)), cells=cells))
    said = advice(whole, judged(whole), dataclasses.replace(SETTINGS, examples=30))
    # sd 0.18, 0.08 - 0.033 of room: ((1.96 + 0.84) 0.1826 / 0.0467)^2.
    assert said[0] == (
        "30 examples are too few to show a within 8 points: evaluate.examples=195 would suffice with a "
        "power of 80 % (also b)"
    )
    assert said[-1] == "`mopd run lab.yaml seeds=[0,1,2]` shows how much the results differ by seed"


def test_a_student_as_good_as_its_teachers_is_told_which_teacher_limits_it():
    low = {("experts/b", "b"): 0.6, ("student", "b"): 0.6, ("student", "a"): 0.9}
    whole = cut_nowhere(results(low))
    assert advice(whole, judged(whole), SETTINGS) == (
        "a better teacher is worth most on b, where experts/b itself has 60.0 %: experts.b.train.sft.max_steps=240",
    )


def test_an_expert_made_elsewhere_is_not_asked_to_train_longer():
    whole = results({("experts/a", "a"): 0.5, ("student", "a"): 0.5, ("student", "b"): 0.9})
    given = dataclasses.replace(whole, experts={**whole.experts, "experts/a": Expert("a", "given")})
    assert any("experts/a itself" in line for line in advice(whole, judged(whole), SETTINGS))
    assert not any("experts/a itself" in line for line in advice(given, judged(given), SETTINGS))


def test_what_failed_is_helped_first_and_at_most_three_are_given():
    scores = {("experts/a", "a"): 0.5, ("student", "a"): 0.5, ("student", "b"): 0.7, ("student", "g"): 0.2}
    said = advised(scores)
    assert len(said) <= 3 and any("anchored" in line for line in said)
