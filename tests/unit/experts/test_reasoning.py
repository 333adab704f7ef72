"""reasoning-gym tasks as a domain."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from base.errors import UserError
from experts.domain import HELD_OUT, TRAIN
from experts.isolation.gym import PYCOSAT_TASKS
from experts.kinds.reasoning import SPLIT_BY_ANSWER, extract_answer
from experts.loading import load_domain

pytestmark = pytest.mark.slow

ARITHMETIC = {"basic_arithmetic": {"min_terms": 2, "max_terms": 2}}
MIXED = {**ARITHMETIC, "countdown": {}}


def reasoning(tasks, **options):
    return load_domain("logic", "reasoning", {"tasks": tasks, **options})


def test_a_mixture_is_even_repeatable_and_split_by_prompt():
    domain = reasoning(MIXED)
    train = domain.draw(TRAIN, 100, seed=1)
    assert train == domain.draw(TRAIN, 100, seed=1)
    assert train != domain.draw(TRAIN, 100, seed=2)
    assert [example.meta["task"] for example in train[:4]] == ["basic_arithmetic", "countdown"] * 2
    held_out = domain.draw(HELD_OUT, 60, seed=1)
    assert {example.source for example in train}.isdisjoint(example.source for example in held_out)
    assert len({example.prompt for example in train}) == 100


@pytest.mark.parametrize("task", sorted(SPLIT_BY_ANSWER))
def test_texts_of_a_short_list_are_split_by_the_answer(task):
    domain = reasoning({task: {}}, answer_format="tags")
    train, held_out = domain.draw(TRAIN, 150, seed=0), domain.draw(HELD_OUT, 50, seed=0)
    assert {example.meta["answer"] for example in train}.isdisjoint(example.meta["answer"] for example in held_out)
    assert len({example.prompt for example in (*train, *held_out)}) == 200
    assert all(domain.score(example, example.answer) == 1.0 for example in held_out[:5])


def test_too_few_answers_to_split_are_named():
    few = {"sentence_reordering": {"min_words_in_sentence": 20, "max_words_in_sentence": 20}}
    with pytest.raises(
        UserError, match=r"split 'held_out' are needed, but of \d+ of task 'sentence_reordering' .* only 0 are in it"
    ):
        reasoning(few).draw(HELD_OUT, 10, seed=0)


def test_a_change_of_the_split_changes_the_fingerprints_of_its_tasks_alone(monkeypatch):
    tasks = ({"caesar_cipher": {}}, MIXED)
    split, other = (reasoning(each).fingerprint() for each in tasks)
    monkeypatch.setattr("experts.kinds.reasoning.SPLIT_BY_ANSWER", frozenset())
    assert reasoning(tasks[0]).fingerprint() != split and reasoning(tasks[1]).fingerprint() == other


@pytest.mark.parametrize("answer_format", ["plain", "tags"])
def test_gold_scores_one_after_a_round_trip_through_json(answer_format):
    domain = reasoning(MIXED, answer_format=answer_format)
    for example in domain.draw(TRAIN, 20, seed=0):
        stored = replace(example, meta=json.loads(json.dumps(example.meta)))
        assert domain.score(stored, stored.answer) == 1.0
        assert domain.score(stored, f"<answer>0</answer> or rather <answer>{stored.meta['answer']}</answer>") == 1.0
        assert domain.score(stored, "no idea") < 0.1
        assert ("</answer>" in stored.prompt) == (answer_format == "tags")


def test_an_equivalent_answer_is_accepted_by_the_task_s_own_verifier():
    domain = reasoning({"countdown": {}})
    example = domain.draw(TRAIN, 1, seed=0)[0]
    assert domain.score(example, f"({example.answer})") == 1.0


@pytest.mark.parametrize("task", ["countdown", "string_insertion"])
def test_code_in_an_answer_is_never_evaluated(task, tmp_path):
    domain = reasoning({task: {}})
    example = domain.draw(TRAIN, 1, seed=0)[0]
    trace = tmp_path / "trace"
    for answer in (f"open('{trace}', 'w')", f"[open('{trace}', 'w')]", "9**9**9**9", "(9**9)**(9**9)", "[" * 300):
        assert domain.score(example, answer) < 0.1
    assert not trace.exists()


@pytest.mark.parametrize("answer", ["", "\x00", "[[[", "<answer></answer>", "9" * 50_000, "é" * 10])
def test_hostile_text_scores_nothing_and_never_raises(answer):
    domain = reasoning({"prime_factorization": {}, "game_of_life": {}, "pool_matrix": {}})
    for example in domain.draw(TRAIN, 3, seed=0):
        assert 0.0 <= domain.score(example, answer) <= 0.1


def test_extract_answer_takes_the_last_tag_or_everything():
    assert extract_answer("so <answer>1</answer> no, <answer>\n2 </answer>.") == "2"
    assert extract_answer("  3\n") == "3"


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({"basic_arithmetics": {}}, "no task 'basic_arithmetics' — did you mean 'basic_arithmetic'"),
        (
            {"basic_arithmetic": {"min_term": 2}},
            r"tasks\.basic_arithmetic\.min_term: unknown parameter — did you mean 'min_terms'",
        ),
        ({"basic_arithmetic": {"min_terms": 5, "max_terms": 2}}, r"domains\.logic\.options\.tasks\.basic_arithmetic"),
        ({"propositional_logic": {}}, "no gold answer"),
        ({"arc_agi": {}}, "gives its own answer 0.00"),
    ],
)
def test_unusable_tasks_are_explained(tasks, message):
    with pytest.raises(UserError, match=message):
        reasoning(tasks).draw(TRAIN, 1, seed=0)


def test_seed_and_size_belong_to_the_draw():
    with pytest.raises(UserError, match="seed is set by the draw"):
        reasoning({"basic_arithmetic": {"seed": 1}})


def test_tasks_that_differ_between_processes_are_refused():
    with pytest.raises(UserError, match=r"domains\.logic\.options\.tasks: .*'word_ladder' draws different examples"):
        reasoning({"word_ladder": {}})


# Set-up leaves pycosat out; a machine on which somebody installed it must give the same answer here.
WITHOUT_PYCOSAT = """
import sys
sys.modules["pycosat"] = None
from experts.loading import load_domain
from base.errors import UserError
from experts.isolation.gym import import_reasoning_gym
gym = import_reasoning_gym()
from reasoning_gym.factory import DATASETS
refused = []
for task in DATASETS:
    if "/logic/" in sys.modules[DATASETS[task][0].__module__].__file__:
        try:
            gym.create_dataset(task, seed=0, size=1)[0]
        except ImportError as error:
            assert "pycosat" in str(error)
            refused.append(task)
print(*refused)
try:
    load_domain("logic", "reasoning", {"tasks": {"zebra_puzzles": {}}})
except UserError as error:
    print(error)
"""


def test_without_pycosat_all_tasks_work_but_those_named():
    run = subprocess.run([sys.executable, "-c", WITHOUT_PYCOSAT], capture_output=True, text=True, check=True)
    refused, message = run.stdout.splitlines()
    assert set(refused.split()) == PYCOSAT_TASKS
    assert "domains.logic.options.tasks" in message
    assert "'zebra_puzzles' needs the package pycosat" in message
    assert "pip install pycosat" in message


@pytest.mark.parametrize("task", ["countdown", "puzzle24", "simple_integration", "n_queens", "binary_matrix"])
def test_gold_answers_pass_the_guard_of_evaluating_verifiers(task):
    domain = reasoning({task: {}})
    assert {domain.score(example, example.answer) for example in domain.draw(TRAIN, 10, seed=0)} == {1.0}


def test_too_many_examples_name_the_task_and_what_exists():
    digits = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1, "operators": ["+"]}
    plain = {"allow_parentheses": False, "allow_negation": False, "whitespace": "single", "format_style": "simple"}
    few = {"basic_arithmetic": digits | plain}
    domain = reasoning(few)
    with pytest.raises(UserError, match=r"domains\.logic: 500 .*'basic_arithmetic' has only \d+ distinct"):
        domain.draw(TRAIN, 500, seed=0)


def test_options_and_fingerprint_do_not_import_reasoning_gym():
    program = (
        "import sys; from experts.loading import load_domain;"
        f"a = load_domain('x', 'reasoning', {{'tasks': {ARITHMETIC!r}}}).fingerprint();"
        "b = load_domain('x', 'reasoning', {'tasks': {'countdown': {}}}).fingerprint();"
        "print(a != b, 'reasoning_gym' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["True", "False"]
