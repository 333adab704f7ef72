"""One line of a verdict, and how a difference is written in it."""

from dataclasses import dataclass
from typing import Literal

from evals.statistics.interval import Interval

Kind = Literal["gain", "teacher", "forgetting", "champion", "missing", ""]


@dataclass(frozen=True)
class Criterion:
    """One line of the verdict.

    Attributes:
        name: What is asked.
        passed: Whether it is met; None where there was nothing to compare with.
        text: What was measured, with interval and p-value.
        brief: The same in less than a line, for the first screen; `text` where it is empty.
        kind: What is asked, for programs; `missing` where the scores it needs are not there.
        domain: Of a teacher's criterion.
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
