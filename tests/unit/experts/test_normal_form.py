"""Copies of a prompt have one normal form; prompts that ask for something else have another."""

import pytest

from experts.data.normal_form import normal_form
from experts.domain import HELD_OUT, TRAIN
from experts.kinds.strings import TASKS
from experts.loading import load_domain

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 3 + 4?"}]


@pytest.mark.parametrize(
    ("one", "copy"),
    [
        ("What is 3 + 4?", "  what   is\n3 + 4"),
        ("What is 3 + 4?", CHAT),
        ("What is 3 + 4?", [{"role": "developer", "content": "Think."}, CHAT[1]]),
        ("Hello, world. It’s “fine”!", 'hello world it\'s "FINE"!'),
        ("Name the capital of France.", "name the capital of france"),
        ("ﬁve １２ – six", "five 12 - six"),
        ("Which?\nA. cow\nB. dog\nC. cat", "Which?\nA. cat\nB. cow\nC. dog"),
        ("Which?\n(A) cow\n(B) dog.\nAnswer:", "which\n\n(a) Dog\n(b) cow\nanswer"),
    ],
)
def test_copies_have_one_form(one, copy):
    assert normal_form(one) == normal_form(copy)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("3 + 4", "3 - 4"),
        ("What is 3 + 4?", "What is 3 + 5?"),
        ("What is 5! + 3?", "What is 5 + 3?"),
        ("What is 2²?", "What is 22?"),
        ("x = 1.5", "x = 15"),
        ("x != y", "x = y"),
        ("a <= b", "a < b"),
        ("caesar +1 kot:", "caesar -1 kot:"),
        ("sort up 5 3:", "sort down 5 3:"),
        ("1 2\n3 4", "1 2 3 4"),
        ("#  #\n ##", "# #\n##"),
        ("fix:\ndef f(a):\n return a+1", "fix:\ndef f(a):\n return a-1"),
        ("fix:\ndef f(a):\n return a[1:]", "fix:\ndef f(a):\n return a[1]"),
        ("return (a,)", "return (a)"),
        ("1. wash\n2. dry", "1. dry\n2. wash"),
        ("Which?\nA. cow\nB. dog", "Which?\nA. cow\nB. cat"),
        ([*CHAT, {"role": "assistant", "content": "7"}, {"role": "user", "content": "Why?"}], "Why?"),
    ],
)
def test_prompts_that_differ_have_different_forms(one, other):
    assert normal_form(one) != normal_form(other)


@pytest.mark.parametrize("task", TASKS)
def test_short_prompts_of_generated_tasks_differ_by_their_forms(task):
    domain = load_domain("d", "strings", {"task": task})
    prompts = [example.prompt for split in (TRAIN, HELD_OUT) for example in domain.draw(split, 200, 0)]
    same = len(prompts) - len({normal_form(prompt) for prompt in prompts})
    # Case is what `swapcase` is about; the look-up compares answers as well.
    assert same == 0 or task == "swapcase"
