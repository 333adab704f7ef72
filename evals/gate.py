"""The gate: what a student must show to become champion, one line a criterion."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from evals.compare import Interval, mean_over
from evals.forgetting import mean_drop
from evals.results import Results
from evals.scores import Scores
from experts.domain import HELD_OUT


@dataclass(frozen=True)
class Criterion:
    """One line of the verdict; `passed` is None where there was nothing to compare with."""

    name: str
    passed: bool | None
    text: str


@dataclass(frozen=True)
class Verdict:
    """Whether the student is promoted, and why."""

    criteria: tuple[Criterion, ...]

    @property
    def promoted(self) -> bool:
        """Whether no criterion failed and at least one was met."""
        answers = [criterion.passed for criterion in self.criteria]
        return False not in answers and True in answers


def judge(
    results: Results, margin: float, max_forgetting: float, champion: Mapping[str, Scores] | None = None
) -> Verdict:
    """Judge the student of a run; intervals are at the results' own confidence.

    A criterion whose scores are missing fails: nothing is promoted unmeasured. Non-inferiority to every teacher is an
    intersection-union test (Berger 1982): all must pass, so each is held to the full level without correction.

    Args:
        results: The run's scores.
        margin: Allowed deficit to each domain's teacher (`Results.teacher`): the lower bound of the paired difference
            must lie above `-margin`.
        max_forgetting: Allowed mean drop (the estimate, not its bound) on domains no expert trains.
        champion: domain -> held-out sheet of the previous champion; None when there is none.
    """
    criteria = [_teacher(results, domain, margin) for domain in results.teachers]
    if not criteria:
        criteria = [Criterion("teachers", False, "no teacher to compare with")]
    return Verdict((*criteria, _forgetting(results, max_forgetting), _champion(results, champion)))


def _teacher(results: Results, domain: str, margin: float) -> Criterion:
    name = f"non-inferior to {results.teacher(domain)} on {domain}"
    difference = results.difference("student", "teacher", domain)
    if difference is None:
        return Criterion(name, False, "not scored")
    every = "; every teacher must pass, so no correction" if len(results.teachers) > 1 else ""
    text = f"difference {_points(difference)}; lower bound must exceed {-100 * margin:+.1f}{every}"
    return Criterion(name, difference.low > -margin, text)


def _forgetting(results: Results, allowed: float) -> Criterion:
    if not results.untrained:
        return Criterion("forgetting", None, "not measured: every domain has an expert")
    lost = mean_drop(results, "student")
    if lost is None:
        return Criterion("forgetting", False, "not scored")
    return Criterion("forgetting", lost.mean <= allowed, f"mean drop {_points(lost)}; at most {100 * allowed:.1f}")


def _champion(results: Results, champion: Mapping[str, Scores] | None) -> Criterion:
    name = "not worse than the previous champion"
    if not champion:
        return Criterion(name, None, "no scores of a previous champion: not compared")
    strata: dict[str, np.ndarray] = {}
    for domain in results.expert_domains:
        # One student can become champion: the first seed's.
        student = results.cells.get(("student", domain, HELD_OUT), {}).get(results.seeds[0])
        sheet = champion.get(domain)
        if student and sheet and sheet.ids == student.ids:
            strata[f"{domain}/{HELD_OUT}"] = (student.greedy_N - sheet.greedy_N)[None]
    if not strata:
        return Criterion(name, None, "the champion was not scored on these examples: not compared")
    difference = mean_over(strata, results.confidence)
    text = f"difference {_points(difference)} over {len(strata)} of {len(results.expert_domains)} expert domains"
    return Criterion(name, difference.high >= 0, f"{text}; fails only when shown worse")


def _points(value: Interval) -> str:
    return f"{100 * value.mean:+.1f} [{100 * value.low:+.1f}, {100 * value.high:+.1f}] points"
