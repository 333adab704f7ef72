"""Compact text tasks: right answers, distinct prompts, split hygiene, rough demonstrations."""

import random
import string

import pytest

from base.errors import UserError
from experts.domain import HELD_OUT, TRAIN
from experts.kinds.strings import TASKS
from experts.loading import load_domain

SOLUTIONS = {
    "sort up 5 3 9 1:": "1 3 5 9",
    "sort down 5 3 9 1:": "9 5 3 1",
    "reverse kotap:": "patok",
    "caesar +2 zob:": "bqd",
    "caesar -1 abe:": "zad",
    "upper kota:": "KOTA",
    "lower KOTA:": "kota",
    "capital kota:": "Kota",
    "swap kOtA:": "KoTa",
    "rotate 1 kota:": "otak",
    "rotate 2 kota:": "tako",
    "double kot:": "kkoott",
    "zip kot pam:": "kpoatm",
    "first kot pam te:": "kpt",
}


def solve(prompt):
    """An independent solver, so that the answers are not checked against the code that made them."""
    words = prompt.removesuffix(":").split()
    task, last = words[0], words[-1]
    alphabet = string.ascii_lowercase
    if task == "sort":
        digits = sorted(map(int, words[2:]))
        return " ".join(map(str, digits if words[1] == "up" else digits[::-1]))
    if task == "caesar":
        return "".join(alphabet[(alphabet.index(letter) + int(words[1])) % 26] for letter in last)
    if task == "rotate":
        steps = int(words[1])
        return "".join(last[(place + steps) % len(last)] for place in range(len(last)))
    simple = {
        "reverse": lambda: "".join(reversed(last)),
        "upper": last.upper,
        "lower": last.lower,
        "capital": last.title,
        "swap": lambda: "".join(c.lower() if c.isupper() else c.upper() for c in last),
        "double": lambda: "".join(c + c for c in last),
        "zip": lambda: "".join(a + b for a, b in zip(words[1], words[2], strict=True)),
        "first": lambda: "".join(word[0] for word in words[1:]),
    }
    return simple[task]()


@pytest.fixture(params=sorted(TASKS))
def domain(request):
    return load_domain("skill", "strings", {"task": request.param, "rough_share": 1.0})


def test_the_solver_of_this_test_is_right():
    assert {prompt: solve(prompt) for prompt in SOLUTIONS} == SOLUTIONS


def test_defaults_supply_ten_thousand_distinct_solvable_prompts(domain):
    examples = domain.draw(TRAIN, 10_000, seed=0)
    assert len({example.prompt for example in examples}) == 10_000
    assert max(len(example.prompt) for example in examples) <= 24
    assert set("".join(example.prompt + example.answer for example in examples)) <= set(string.printable)
    for example in examples[:500]:
        assert example.answer == solve(example.prompt)
        assert domain.score(example, f" {example.answer}\n") == 1.0
        assert domain.score(example, example.answer + "x") == 0.0
        assert domain.score(example, "") == 0.0


def test_a_draw_repeats_itself_and_splits_share_no_source(domain):
    train = domain.draw(TRAIN, 2000, seed=3)
    assert train == domain.draw(TRAIN, 2000, seed=3)
    assert train != domain.draw(TRAIN, 2000, seed=4)
    held_out = domain.draw(HELD_OUT, 1000, seed=3)
    assert {example.source for example in train}.isdisjoint(example.source for example in held_out)


def test_rough_demonstrations_are_wrong_and_others_right(domain):
    rng = random.Random(0)
    examples = domain.draw(TRAIN, 300, seed=0)
    assert all(domain.demonstration(example, rng) == example.answer for example in examples)
    flawed = [domain.demonstration(example, rng, rough=True) != example.answer for example in examples]
    assert sum(flawed) >= 297  # equal digits leave sorting no mistake to make


def test_rough_share_sets_how_many_are_flawed():
    domain = load_domain("reverse", "strings", {"task": "reverse", "rough_share": 0.3})
    rng = random.Random(0)
    examples = domain.draw(TRAIN, 1000, seed=0)
    flawed = sum(domain.demonstration(example, rng, rough=True) != example.answer for example in examples)
    assert 230 < flawed < 370


def test_partial_counts_right_positions():
    domain = load_domain("reverse", "strings", {"task": "reverse", "min_length": 4, "max_length": 4, "partial": True})
    example = domain.draw(TRAIN, 1, seed=0)[0]
    assert domain.score(example, example.answer) == 1.0
    assert domain.score(example, "#" + example.answer[1:]) == 0.75
    assert domain.score(example, example.answer * 2) == 0.5


def test_too_many_examples_names_the_domain_and_what_exists():
    domain = load_domain("tiny", "strings", {"task": "reverse", "min_length": 2, "max_length": 2})
    existing = 2 * 21 * 5  # consonant and vowel in either order
    with pytest.raises(UserError, match=r"domains\.tiny: 500 examples .* 'held_out'") as too_many_held_out:
        domain.draw(HELD_OUT, 500, seed=0)
    with pytest.raises(UserError) as too_many_train:
        domain.draw(TRAIN, 500, seed=0)
    counts = [int(str(e.value).split("only ")[1].split()[0]) for e in (too_many_held_out, too_many_train)]
    assert sum(counts) == existing
    assert len(domain.draw(HELD_OUT, counts[0], seed=1)) == counts[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "reverse", "min_length": 5, "max_length": 3}, "options.max_length: .*below min_length 5"),
        ({"task": "reverse", "max_length": 2}, "lengths 3–5.* 3–2"),
        ({"task": "reverse", "max_lenght": 4}, "unknown key — did you mean 'max_length'"),
        ({"task": "revers"}, "options.task"),
    ],
)
def test_wrong_options_are_explained(options, message):
    with pytest.raises(UserError, match=message):
        load_domain("x", "strings", options)


def test_unknown_split_is_explained():
    with pytest.raises(UserError, match="no split 'heldout' — did you mean 'held_out'"):
        load_domain("x", "strings", {"task": "sort"}).draw("heldout", 1, seed=0)


def test_fingerprint_follows_the_options():
    def fingerprint(**options):
        return load_domain("any", "strings", {"task": "sort", **options}).fingerprint()

    assert fingerprint() == fingerprint()
    assert len({fingerprint(), fingerprint(max_length=5), fingerprint(partial=True), fingerprint(task="double")}) == 4
