"""The sources of the functions to be repaired.

`generated` makes short functions whose *name states what they do* (`gt3_add2_sub1`, `drop1_take2`): without a statement
of intent no reader could infer which of two working functions was corrupted. In HumanEval's functions the signature
and, if kept, the docstring state the intent.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from base.hashing import stable_hash
from experts.isolation.sandbox import Failure, Limits, run_calls, same_value

ARITHMETIC = {"add": "+", "sub": "-", "mul": "*", "div": "//", "mod": "%"}
COMPARISON = {"gt": ">", "lt": "<", "ge": ">=", "le": "<=", "eq": "==", "ne": "!="}
LETTERS = ("ab", "xy", "nm", "pq")
TEST_CALLS = 12


@dataclass(frozen=True, slots=True)
class Function:
    """A working function with its tests.

    Attributes:
        id: Stable identity, by which the split is made.
        entry: Name of the function to call.
        code: Source text without a final newline.
        arguments: One list of positional arguments for each test.
        expected: The output of each test.
    """

    id: str
    entry: str
    code: str
    arguments: list[list[Any]]
    expected: list[Any]


def generate(rng: random.Random, limits: Limits, wanted: Callable[[str], bool]) -> Function | None:
    """Draw one short function of one or two body lines with tests, or None if the draw is unusable.

    A function is unusable if its id is not `wanted`, or if it raises on a test input or never changes its output. The
    id covers the function's behaviour, not the names of its variables.
    """
    template = rng.choice(TEMPLATES)
    name, parameters, body = template(rng)
    letters = rng.choice(LETTERS)
    identity = stable_hash(name)[:16]
    if not wanted(identity):
        return None
    renaming = str.maketrans({"A": letters[0], "B": letters[1], "S": "s"})
    signature = ",".join(parameters)
    code = f"def {name}({signature}):\n {body}".translate(renaming)
    tests = random.Random(identity)
    arguments = [[_argument(tests, parameter) for parameter in parameters] for _ in range(TEST_CALLS)]
    expected = run_calls(code, name, arguments, limits)
    if isinstance(expected, Failure) or all(same_value(value, expected[0]) for value in expected):
        return None
    return Function(identity, name, code, arguments, expected)


def _argument(rng: random.Random, parameter: str) -> Any:
    if parameter == "S":
        return [rng.randint(-3, 12) for _ in range(rng.randint(3, 8))]
    return rng.randint(-4, 12)


def _step(rng: random.Random) -> tuple[str, str]:
    """An operation with a constant: its name and its text, e.g. ("add3", "+3")."""
    word = rng.choice(list(ARITHMETIC))
    constant = rng.randint(2, 9)
    return f"{word}{constant}", f"{ARITHMETIC[word]}{constant}"


def _test(rng: random.Random) -> tuple[str, str]:
    word = rng.choice(list(COMPARISON))
    constant = rng.randint(0, 9)
    return f"{word}{constant}", f"{COMPARISON[word]}{constant}"


Drawn = tuple[str, list[str], str]


def _arithmetic(rng: random.Random) -> Drawn:
    (first, left), (second, right) = _step(rng), _step(rng)
    word = rng.choice(list(ARITHMETIC))
    return f"{first}_{word}_{second}", ["A", "B"], f"return (A{left}){ARITHMETIC[word]}(B{right})"


def _two_lines(rng: random.Random) -> Drawn:
    (first, left), (second, right) = _step(rng), _step(rng)
    third, last = _step(rng)
    if rng.random() < 0.5:
        return f"{first}_{second}", ["A"], f"A{left[:-1]}={left[-1]}\n return A{right}"
    return f"{first}_then_{third}", ["A", "B"], f"B{left[:-1]}={left[-1]}\n return A-B{last}"


def _conditional(rng: random.Random) -> Drawn:
    (condition, test), (first, left), (second, right) = _test(rng), _step(rng), _step(rng)
    return f"{condition}_{first}_{second}", ["A"], f"return A{left} if A{test} else A{right}"


def _branch(rng: random.Random) -> Drawn:
    (condition, test), (first, left) = _test(rng), _step(rng)
    return f"if_{condition}_{first}", ["A", "B"], f"if A{test}:return B\n return A{left}"


def _pick(rng: random.Random) -> Drawn:
    (first, left), (second, right) = _step(rng), _step(rng)
    word = rng.choice(["min", "max"])
    return f"{word}_{first}_{second}", ["A", "B"], f"return {word}(A{left},B{right})"


def _boolean(rng: random.Random) -> Drawn:
    (first, left), (second, right) = _test(rng), _test(rng)
    word = rng.choice(["and", "or"])
    negation = rng.random() < 0.5
    if negation:
        return f"not_{first}_{word}_{second}", ["A", "B"], f"return not A{left} {word} B{right}"
    return f"{first}_{word}_{second}", ["A", "B"], f"return A{left} {word} B{right}"


def _negated(rng: random.Random) -> Drawn:
    (first, left), (second, right) = _step(rng), _step(rng)
    return f"neg_{first}_{second}", ["A"], f"return -(A{left}){right}"


def _slices(rng: random.Random) -> Drawn:
    start, stop = rng.randint(1, 4), rng.randint(1, 4)
    step, text = _step(rng)
    if rng.random() < 0.5:
        return f"drop{start}_take{stop}", ["S"], f"return S[{start}:]+S[:{stop}]"
    return f"at{start % 3}_{step}", ["S"], f"return S[{start % 3}]{text}"


def _members(rng: random.Random) -> Drawn:
    word = rng.choice(["any", "all"])
    (condition, test), (first, left) = _test(rng), _step(rng)
    return f"{word}_{first}_{condition}", ["S"], f"return {word}(i{left}{test} for i in S)"


def _append(rng: random.Random) -> Drawn:
    first, left = _step(rng)
    start = rng.randint(1, 3)
    return f"append_{first}_drop{start}", ["S", "A"], f"S.append(A{left})\n return S[{start}:]"


def _total(rng: random.Random) -> Drawn:
    (first, left), (second, right) = _step(rng), _step(rng)
    if rng.random() < 0.5:
        return f"sum_{first}_{second}", ["A"], f"return sum(i{left} for i in range(A)){right}"
    return f"loop_{first}_{second}", ["S", "A"], f"for i in S:A+=i{left}\n return A{right}"


TEMPLATES: tuple[Callable[[random.Random], Drawn], ...] = (
    _arithmetic,
    _two_lines,
    _conditional,
    _branch,
    _pick,
    _boolean,
    _negated,
    _slices,
    _members,
    _append,
    _total,
)
