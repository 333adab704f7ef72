"""One line of a verdict, and the format of its differences."""

from dataclasses import dataclass
from typing import Literal

from evals.statistics.interval import Interval

Kind = Literal["gain", "teacher", "forgetting", "champion", "missing", ""]


@dataclass(frozen=True)
class Criterion:
    """One line of the verdict.

    Attributes:
        name: The criterion in words.
        passed: Whether it is met; None where there was nothing to compare with.
        text: The measurement, with interval and p-value.
        brief: `text` in less than a line, for the first screen; `text` is used where it is empty.
        kind: The kind of criterion, for programs; `missing` where the scores it needs do not exist.
        domain: The domain, for a criterion against a teacher.
    """

    name: str
    passed: bool | None
    text: str
    brief: str = ""
    kind: Kind = ""
    domain: str = ""


def points(value: Interval) -> str:
    """A difference with its interval, in points."""
    return f"{100 * value.mean:+.1f} [{100 * value.low:+.1f}, {100 * value.high:+.1f}] points"
