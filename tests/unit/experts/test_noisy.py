"""A domain with an erring scorer: the wrapped domain's examples, its scores turned around or biased to length."""

import pytest

from base.errors import UserError
from experts.domain import HELD_OUT, TRAIN
from experts.loading import load_domain

SORT = {"kind": "strings", "options": {"task": "sort"}}
CLEAN = load_domain("sort", "strings", {"task": "sort"})


def noisy(name: str = "sort", **errors):
    return load_domain(name, "noisy", SORT | errors)


def test_examples_and_splits_are_those_of_the_wrapped_domain():
    wrapped = noisy("judged", flip=0.5)
    for split in (TRAIN, HELD_OUT):
        prompts = [example.prompt for example in wrapped.draw(split, 50, 3)]
        assert prompts == [e.prompt for e in load_domain("judged", "strings", {"task": "sort"}).draw(split, 50, 3)]
        assert {example.domain for example in wrapped.draw(split, 5, 3)} == {"judged"}
    assert (wrapped.splits, wrapped.supply(TRAIN)) == (CLEAN.splits, CLEAN.supply(TRAIN))
    # What is trained on under one name is not measured under the other.
    held_out = {example.prompt for example in CLEAN.draw(HELD_OUT, 200, 0)}
    assert not held_out & {example.prompt for example in wrapped.draw(TRAIN, 200, 0)}


def test_no_errors_leave_every_score_and_certain_flips_turn_all():
    examples = CLEAN.draw(TRAIN, 20, 0)
    pairs = [(example, example.answer if at % 2 else "no") for at, example in enumerate(examples)]
    true = CLEAN.score_all(pairs)
    assert set(true) == {0.0, 1.0}
    assert noisy().score_all(pairs) == true
    turned = noisy(flip=1.0)
    assert turned.score_all(pairs) == [1.0 - score for score in true]
    assert turned.facts()["true_score"] == 0.5
    assert turned.score(*pairs[1]) == 0.0


def test_the_share_of_flips_is_the_probability_and_a_completion_is_always_scored_alike():
    domain = noisy(flip=0.2)
    pairs = [(example, example.answer) for example in CLEAN.draw(TRAIN, 4000, 0)]
    scores = domain.score_all(pairs)
    # Within four standard errors.
    assert sum(scores) / 4000 == pytest.approx(0.8, abs=0.026)
    assert domain.score_all(pairs[::-1]) == scores[::-1]


def test_a_judge_that_likes_length():
    domain, (example,) = noisy(length_bias=1.0, longest=100), CLEAN.draw(TRAIN, 1, 0)
    right, long = example.answer, "x" * 50
    assert domain.score(example, right) == pytest.approx((1.0 + len(right) / 100) / 2)
    assert [domain.score(example, text) for text in ("", long, long * 9)] == [0.0, 0.25, 0.5]


def test_errors_and_the_wrapped_domain_are_in_the_fingerprint():
    found = [noisy().identity(), noisy(flip=0.1).identity(), noisy(length_bias=0.1).identity(), CLEAN.identity()]
    found.append(load_domain("sort", "noisy", {"kind": "strings", "options": {"task": "reverse"}}).identity())
    assert len(set(found)) == 5
    assert noisy("other").identity() == noisy().identity()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (SORT | {"flip": 2}, r"domains\.x\.options\.flip: "),
        ({"kind": "noisy"}, r"domains\.x\.options\.kind: a noisy domain wraps a domain of another kind"),
        ({"kind": "string"}, r"domains\.x\.kind: unknown kind 'string' — did you mean 'strings'"),
        ({"kind": "strings", "options": {"tusk": "sort"}}, r"domains\.x\.options\.tusk: unknown key"),
    ],
)
def test_a_wrong_option_is_refused_by_name(options, said):
    with pytest.raises(UserError, match=said):
        load_domain("x", "noisy", options)
