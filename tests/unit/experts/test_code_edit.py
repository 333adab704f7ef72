"""The repair domain: splits, scores, demonstrations, out-of-distribution families and HumanEval."""

import random
import time

import pytest

from base.errors import UserError
from experts.code.functions import Function
from experts.code.humaneval import human_eval_functions, without_docstrings
from experts.code.mutations import FAMILIES, corruptions
from experts.code.rewrites import code_tokens, edit_distance
from experts.domain import HELD_OUT, OUT_OF_DISTRIBUTION, TRAIN, Example, in_train
from experts.kinds.code_edit import CodeEditDomain, excess_edit, extract_code
from experts.loading import load_domain


def make(**options) -> CodeEditDomain:
    domain = load_domain("edit", "code_edit", options)
    assert isinstance(domain, CodeEditDomain)
    return domain


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return make().draw(TRAIN, 150, seed=0)


@pytest.fixture(scope="module")
def human_eval() -> list[Example]:
    return make(source="humaneval", prompt_style="instruct").draw(TRAIN, 12, seed=0)


@pytest.fixture
def subtraction() -> Example:
    """A repair whose smallest edit is one token, with tests that any equivalent function passes."""
    function = Function("id", "f", "def f(a,b):\n return a+b*2", [[1, 2], [5, 3]], [5, 11])
    return make()._example(function, "def f(a,b):\n return a-b*2", ["operator"])


def test_gold_scores_one_and_the_corrupted_text_zero(examples):
    domain = make()
    assert {domain.score(example, example.answer) for example in examples} == {1.0}
    assert {domain.score(example, example.meta["corrupted"]) for example in examples} == {0.0}


def test_prompts_are_distinct_short_printable_and_show_the_corrupted_code(examples):
    assert len({example.prompt for example in examples}) == len(examples)
    assert len({example.source for example in examples}) > 100
    for example in examples:
        assert example.prompt == "fix:\n" + example.meta["corrupted"]
        assert example.meta["corrupted"] != example.answer
        assert all(" " <= character <= "~" or character == "\n" for character in example.prompt + example.answer)
        assert len(example.prompt) <= 70
    assert sum(len(example.prompt) for example in examples) / len(examples) < 60


def test_drawing_is_deterministic_and_depends_on_the_seed(examples):
    assert make().draw(TRAIN, 150, seed=0) == examples
    assert make().draw(TRAIN, 150, seed=1) != examples


def test_splits_are_disjoint_by_source_function():
    domain = make(held_out_families=["comparison"])
    sources = {split: {example.source for example in domain.draw(split, 60, 0)} for split in domain.splits}
    assert not sources[TRAIN] & (sources[HELD_OUT] | sources[OUT_OF_DISTRIBUTION])
    assert all(in_train(source, 0.2) for source in sources[TRAIN])
    assert not any(in_train(source, 0.2) for source in sources[HELD_OUT] | sources[OUT_OF_DISTRIBUTION])


def test_held_out_families_are_only_in_the_out_of_distribution_split():
    held_out = ["swapped_operands", "comparison"]
    domain = make(held_out_families=held_out)
    for split in domain.splits:
        families = {family for example in domain.draw(split, 60, 0) for family in example.meta["families"]}
        assert families
        assert families <= set(held_out) if split == OUT_OF_DISTRIBUTION else not families & set(held_out)


def test_without_held_out_families_there_is_no_such_split():
    assert make().splits == (TRAIN, HELD_OUT)
    with pytest.raises(UserError, match="no split 'out_of_distribution'"):
        make().draw(OUT_OF_DISTRIBUTION, 1, 0)


def test_each_generated_corruption_is_one_splice_of_its_family(examples):
    for example in examples:
        (family,) = example.meta["families"]
        assert example.meta["corrupted"] in {
            splice.apply(example.answer) for splice in corruptions(example.answer, family)
        }


def test_most_families_occur_in_generated_functions():
    found = {family for example in make().draw(TRAIN, 400, 0) for family in example.meta["families"]}
    assert found == set(FAMILIES)


def test_chosen_families_and_several_mutations():
    drawn = make(families=["operator", "constant"], mutations=2).draw(TRAIN, 20, 0)
    assert all(len(example.meta["families"]) == 2 for example in drawn)
    assert {family for example in drawn for family in example.meta["families"]} == {"operator", "constant"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"families": ["operater"]}, "families: .*unknown family 'operater' — did you mean 'operator'"),
        (
            {"held_out_families": ["compare"]},
            "held_out_families: .*unknown family 'compare' — did you mean 'comparison'",
        ),
        ({"families": ["call"], "held_out_families": ["call"]}, "held_out_families: .*no family is left to train on"),
        ({"families": []}, "families.*at least 1"),
        ({"mutation": 2}, "mutation: unknown key — did you mean 'mutations'"),
        ({"source": "mbpp"}, "source"),
    ],
)
def test_mistakes_in_the_options_are_told(options, message):
    with pytest.raises(UserError, match=message):
        make(**options)


def test_asking_for_too_many_examples_is_told():
    with pytest.raises(UserError, match="500 examples of split 'held_out' are needed, but only"):
        make(families=["range_bound"], held_out_share=0.001).draw(HELD_OUT, 500, 0)


@pytest.mark.parametrize(
    ("completion", "score", "excess"),
    [
        ("def f(a,b):\n return a+b*2", 1.0, 0),
        ("def f(a, b):\n    # fixed\n    return a + b*2", 1.0, 0),
        ("def f(a,b):\n return b*2+a", 0.3, 3),
        ("def f(a,b):\n return a+2*b", 1 - 0.7 * 2 / 3, 2),
        ("def f(a,b):\n r=a+b*2\n return r", 0.3, 5),
        ("```python\ndef f(a,b):\n return a+b*2\n```", 1.0, 0),
        ("Here it is:\n```\ndef f(a,b):\n return a+b*2\n```\nDone.", 1.0, 0),
    ],
)
def test_score_falls_with_each_needless_token(subtraction, completion, score, excess):
    assert excess_edit(subtraction, completion) == excess
    assert make().score(subtraction, completion) == pytest.approx(score)


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "def f(a,b:\n return",
        "def f(a,b):\n return a-b*2",
        "def g(a,b):\n return a+b*2",
        "def f(a,b):\n return float(a+b*2)",
        "class A:\n def __eq__(s,o): return True\ndef f(a,b): return A()",
        "def f(a,b):\n while True: pass",
        "\x00\ud800",
        "a" * 1_000_000,
    ],
)
def test_wrong_or_hostile_completions_score_zero(subtraction, completion):
    started = time.monotonic()
    assert make(timeout_seconds=0.2).score(subtraction, completion) == 0.0
    assert time.monotonic() - started < 60


def test_rough_demonstrations_work_but_rewrite(examples):
    domain = make(rough_share=1.0)
    rng = random.Random(0)
    scores = [domain.score(example, domain.demonstration(example, rng, rough=True)) for example in examples]
    assert min(scores) >= 0.3 - 1e-9
    assert sum(score < 1 for score in scores) > 0.9 * len(scores)


def test_rough_share_and_plain_demonstrations(examples):
    rng = random.Random(0)
    half = [make(rough_share=0.5).demonstration(example, rng, rough=True) != example.answer for example in examples]
    assert 0.3 < sum(half) / len(half) < 0.7
    assert all(make().demonstration(example, rng) == example.answer for example in examples)


def test_fingerprint_follows_the_options():
    assert make().fingerprint() == make().fingerprint()
    assert len({make(**options).fingerprint() for options in ({}, {"mutations": 2}, {"source": "humaneval"})}) == 3


def test_human_eval_is_nearly_whole():
    functions = human_eval_functions(True)
    assert len(functions) == 159
    assert len(human_eval_functions(False)) == 159
    assert len({function.id for function in functions}) == 159


def test_human_eval_end_to_end(human_eval):
    domain = make(source="humaneval", prompt_style="instruct")
    rng = random.Random(0)
    for example in human_eval:
        assert example.source.startswith("HumanEval/")
        assert example.answer.startswith("```python\n")
        assert example.meta["corrupted"] in example.prompt
        assert domain.score(example, example.answer) == 1.0
        assert domain.score(example, f"```python\n{example.meta['corrupted']}\n```") == 0.0
        assert domain.score(example, domain.demonstration(example, rng, rough=True)) >= 0.3 - 1e-9


def test_docstrings_can_be_left_out():
    text = 'def f(a):\n    """Keep\n    out."""\n    # stays\n    return a'
    assert without_docstrings(text) == "def f(a):\n    # stays\n    return a"
    assert without_docstrings('def f(a):\n    """All."""') == 'def f(a):\n    """All."""'
    assert not any('"""' in function.code.split("return")[0] for function in human_eval_functions(False)[:3])


def test_edit_distance_and_tokens():
    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance("", "abc") == 3
    assert edit_distance("abc", "abc") == 0
    assert code_tokens("a=1") == code_tokens("a  =  1  # one\n\n")
    assert code_tokens("if a:\n b") == code_tokens("if a:\n        b")
    assert code_tokens("if a:\n b\nc") != code_tokens("if a:\n b\n c")
    with pytest.raises(SyntaxError):
        code_tokens("f((")


def test_extract_code_takes_the_first_fence():
    assert extract_code("x\n```py\na\n```\n```\nb\n```") == "a"
    assert extract_code("\n\n a\n") == " a"
    assert extract_code("```python\ncut off") == "cut off"


def test_a_sandbox_whose_process_ends_is_counted_and_a_wrong_repair_is_not(subtraction):
    domain = make(timeout_seconds=0.2)
    assert domain.score(subtraction, subtraction.meta["corrupted"]) == 0.0
    assert (domain.facts(), domain.news()) == ({}, [])
    endless = f"def {subtraction.meta['entry']}(a,b):\n x = 3\n while True: x = x * x"
    assert domain.score(subtraction, endless) == 0.0
    assert domain.facts() == {"verifier_lost": 1.0}
    (line,) = domain.news()
    assert "1 completion(s) scored 0 because the verifier was lost; the last time: MontyCrashedError" in line
    assert domain.score(subtraction, subtraction.answer) == 1.0
