"""Each family corrupts where it says it does, and nowhere else."""

import ast

import pytest

from experts.code.mutations import FAMILIES, corruptions, parses
from experts.isolation.sandbox import passes

# One function a family can corrupt, with odd spacing and a comment that must survive.
MATERIAL = {
    "operator": ("def f(a,  b):  # ä: keep\n    return a  +  b*2", [[1, 2], [5, 3]], [5, 11]),
    "augmented_assignment": ("def f(a,  b):  # ä: keep\n    a  +=  b\n    return a", [[1, 2], [5, 3]], [3, 8]),
    "comparison": ("def f(a,  b):  # ä: keep\n    return a  <  b", [[1, 2], [3, 3], [4, 3]], [True, False, False]),
    "constant": ("def f(a):  # ä: keep\n    return a  *  3", [[1], [5]], [3, 15]),
    "index": ("def f(s):  # ä: keep\n    return s[ 1 :]", [[[1, 2, 3]]], [[2, 3]]),
    "boolean": ("def f(a,  b):  # ä: keep\n    return a  and  b", [[True, False]], [False]),
    "swapped_operands": ("def f(a,  b):  # ä: keep\n    return a  -  b", [[5, 3]], [2]),
    "swapped_arguments": ("def f(a,  b):  # ä: keep\n    return pow(a,  b)", [[2, 3]], [8]),
    "wrong_variable": ("def f(a,  b):  # ä: keep\n    return a  -  b", [[5, 3]], [2]),
    "negation": ("def f(a):  # ä: keep\n    return -  a", [[5]], [-5]),
    "call": ("def f(a,  b):  # ä: keep\n    return max(a,  b)", [[2, 3]], [3]),
    "range_bound": ("def f(a):  # ä: keep\n    return list(range(0,  a))", [[3]], [[0, 1, 2]]),
}


def test_there_is_material_for_every_family():
    assert set(MATERIAL) == set(FAMILIES)
    assert len(FAMILIES) >= 8


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_makes_failing_mutants_and_leaves_the_rest_alone(family):
    text, arguments, expected = MATERIAL[family]
    assert passes(text, "f", arguments, expected)
    splices = corruptions(text, family)
    mutants = [splice.apply(text) for splice in splices]
    assert any(not passes(mutant, "f", arguments, expected) for mutant in mutants)
    for splice, mutant in zip(splices, mutants, strict=True):
        assert mutant != text
        assert parses(mutant)
        assert mutant.startswith(text[: splice.start])
        assert mutant.endswith(text[splice.stop :])
        assert "  # ä: keep\n" in mutant
        assert text[splice.start : splice.stop] != splice.new


def test_text_in_strings_and_comments_is_never_touched():
    text = 'def f(a):\n    """a + 1 < 2"""\n    return a # a - 1\n'
    for family in ("operator", "comparison", "constant", "swapped_operands"):
        assert corruptions(text, family) == []


def test_parenthesised_operands_are_swapped_whole():
    text = "def f(a,b):\n return (a+1)*(b-2)"
    mutants = [splice.apply(text) for splice in corruptions(text, "swapped_operands")]
    assert "def f(a,b):\n return (b-2)*(a+1)" in mutants
    assert all(ast.parse(mutant) for mutant in mutants)


def test_corruptions_come_in_a_stable_order():
    text = MATERIAL["operator"][0]
    assert corruptions(text, "operator") == corruptions(text, "operator")
    assert len(corruptions(text, "operator")) >= 2


def test_parses_refuses_what_is_no_python():
    assert parses("a = 1")
    assert not parses("def f(:")
    assert not parses("a\x00b")
