"""Reads steps and metrics from the output of a program. Free of torch."""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

STEP, TOTAL = "step", "total"
LONGEST_LINE = 100_000
# A program may print any number of values; a curve of each is kept.
MOST_METRICS = 50


@dataclass(frozen=True)
class Line:
    """One line of progress.

    Attributes:
        step: The number of finished steps.
        total: The number of all steps; None if the line has none.
        metrics: Name -> value; only finite numbers.
    """

    step: int
    total: int | None
    metrics: Mapping[str, float]


def parser(pattern: str | None) -> Callable[[str], Line | None]:
    """A function that reads one line of output; None for a line without progress.

    Args:
        pattern: A regular expression with the group `step`, and optionally `total` and one for each metric; without
            one, lines that are JSON objects with a number `step` are read.
    """
    if pattern is None:
        return lambda text: _line(_object(text))
    compiled = re.compile(pattern)

    def parse(text: str) -> Line | None:
        found = compiled.search(text[:LONGEST_LINE])
        return None if found is None else _line({k: _number(v) for k, v in found.groupdict().items()})

    return parse


def _line(values: Mapping[str, Any]) -> Line | None:
    numbers = {name: value for name, value in values.items() if _is_number(value)}
    step, total = numbers.pop(STEP, None), numbers.pop(TOTAL, None)
    if step is None or step < 0:
        return None
    metrics = {name: float(value) for name, value in list(numbers.items())[:MOST_METRICS]}
    return Line(int(step), None if total is None or total < 1 else int(total), metrics)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _object(text: str) -> Mapping[str, Any]:
    if not text.lstrip().startswith("{") or len(text) > LONGEST_LINE:
        return {}
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None
