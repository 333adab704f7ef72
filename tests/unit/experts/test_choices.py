"""The letter that a completion settles on, and the letters of a gold answer."""

import pytest

from base.errors import UserError
from experts.domain import TRAIN
from experts.loading import load_domain
from experts.scoring.choices import chosen_letter, gold_letters
from tests.unit.experts.test_hub import write

ANIMALS = ["ant", "cow", "dog"]
TEN = [f"word {number}" for number in range(10)]

READ_AS_B = [
    "B", "(b)", "B.", "B. cow", "B: cow", "B) because it moos. Not A) ant", "[B]", '"B"', "`B`", "**B**", "(B)",
    "**(B)**", "**B.** cow", "**B. cow**", "B\nBecause cows moo. A is small.", "cow", "Cow.", "**cow**",
    "Option B", "Choice (B)", "The best option is B.", "Option A is wrong. Option B is right.", "It's B",
    "I think it is B.", "B is correct", "I choose B", "the answer is b", "Answer: b", "Answer:\nB", "Answer:\n\n**B**",
    "**Answer:** B", "**Answer: B**", "Final Answer: $B$", "Answer is: Option B", "The answer is option (B).",
    "The correct answer is (B) cow.", "The correct answer is cow.", "The answer is a cow.", "Answer: \\text{B}",
    "So the answer is $\\text{(B)}$", "It moos, so the answer is **B**.", "Answer: I think it is B",
    "Answer: A cow moos, so B", "The answer is not A but B", "The answer is B, not A", "Answer: E. Answer: B",
    "<answer>B</answer>", "<answer> B </answer>", "<answer>B. cow</answer>", "<answer>A</answer> <answer>B</answer>",
    "\\boxed{B}", "\\boxed{\\text{B}}", "\\boxed{(B)}", "\\boxed{cow}", "Answer: $\\boxed{B}$", '{"answer": "B"}',
    "答案：B", "答案是B", "答案为 B。", "答案：Ｂ", "选B", "正确答案是：B",
    "<think>A? maybe the answer is A</think>B",
    "A. ant\nB. cow\nC. dog\nAnswer: B", "A. ant\nB. cow\nC. dog\n\nB",
]  # fmt: skip
READ_AS_NONE = [
    "", "D", "The answer is D", "Both", "A and B", "The answer is A or B", "The answer is not A", "What a cow!",
    "A cow, an ant and a dog", "I think so", "A) ant B) cow C) dog", "A) ant, B) cow, C) dog", "A. ant\nB. cow\nC. dog",
    "A. ant\nB. cow", "**A.** ant\n**B.** cow\n**C.** dog", "A) … B) … C) …", "A\nB\nC", "<answer></answer>",
]  # fmt: skip


@pytest.mark.parametrize("text", READ_AS_B)
def test_a_letter_is_read_in_each_of_its_forms(text):
    assert chosen_letter(text, ANIMALS) == "B"


@pytest.mark.parametrize("text", READ_AS_NONE)
def test_a_text_that_settles_on_nothing_has_no_letter(text):
    assert chosen_letter(text, ANIMALS) is None


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("Answer: I think it is B", "B"),
        ("Answer: I", "I"),
        ("The answer is I.", "I"),
        ("I", "I"),
        ("Answer: I would say J", "J"),
        ("The answer is A because it is", "A"),
    ],
)
def test_words_of_one_capital_are_no_letters(text, letter):
    assert chosen_letter(text, TEN) == letter


def test_only_letters_on_offer_count():
    assert chosen_letter("The answer is C", ["yes", "no"]) is None
    assert chosen_letter("The answer is B, or else E", ["yes", "no"]) == "B"
    assert chosen_letter("Yes", ["yes", "no"]) == "A"


@pytest.mark.parametrize(
    ("gold", "is_index", "letters"),
    [
        ("0", True, ["A"]), ("2", True, ["C"]), ("3", True, []), ("b", False, ["B"]), ("cow", False, ["B"]),
        ("2", False, ["C"]), ("cat", False, []), ("true", False, []), ("-1", True, []), ("1.0", True, []),
    ],
)  # fmt: skip
def test_gold_answers_come_as_index_letter_or_text(gold, is_index, letters):
    assert gold_letters(gold, is_index, ANIMALS) == letters


def test_a_number_is_an_index_and_the_same_text_a_choice():
    assert gold_letters("1", True, ["1", "2"]) == ["B"]
    assert gold_letters("1", False, ["1", "2"]) == ["A"]
    assert gold_letters("x", False, ["x", "y", "x"]) == ["A", "C"]


def quiz(tmp_path, *rows, **options):
    named = {"prompt_field": "q", "answer_field": "a", "choices_field": "c", "scorer": "multiple_choice"}
    path = write(tmp_path / "quiz.jsonl", rows)
    return load_domain("quiz", "hub", {"path": path, "held_out_share": 0.001} | named | options)


def test_each_of_several_right_choices_scores(tmp_path):
    domain = quiz(tmp_path, {"q": "Legs?", "c": ANIMALS, "a": ["cow", "dog"]}, {"q": "Fur?", "c": ANIMALS, "a": [1, 2]})
    for example in domain.draw(TRAIN, 2, seed=0):
        assert [domain.score(example, letter) for letter in "ABC"] == [0.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"q": "?", "c": ANIMALS, "a": "cat"}, r"row 1 .*'a': 'cat' is neither an index from 0, a letter nor one of"),
        ({"q": "?", "c": ["ant", None], "a": "A"}, r"row 1 .*'c': choice 2 is missing or null"),
        ({"q": "?", "c": "ant, cow", "a": "A"}, r"row 1 .*'c': choices must be a list of 2 to 26 texts"),
        ({"q": "?", "c": ANIMALS, "a": []}, r"row 1 .*'a' is an empty list"),
    ],
)
def test_choices_that_cannot_be_used_are_refused_by_row_and_field(tmp_path, row, message):
    with pytest.raises(UserError, match=message):
        quiz(tmp_path, row).draw(TRAIN, 1, seed=0)
