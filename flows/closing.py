"""What a finished run comes to: its scores, what the gate says of the student, and the report."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flows.plan import StageGraph
from stages.core.checkpoint import Store

if TYPE_CHECKING:
    from evals.compare import Interval
    from evals.gate import Verdict
    from evals.results import Results

NOT_MEASURED = "–"


@dataclass(frozen=True)
class Outcome:
    """A finished run.

    Attributes:
        results: The comparison of base, cold start, teachers and student.
        verdict: What the gate says of the student; None without a merge.
        report: The HTML report.
    """

    results: "Results"
    verdict: "Verdict | None"
    report: Path | None

    @property
    def promoted(self) -> bool:
        """Whether the student becomes the champion."""
        return self.verdict is not None and self.verdict.promoted

    def rows(self) -> list[dict[str, str]]:
        """The table: greedy accuracy in percent with its interval, a row for each domain."""
        return score_rows(self.results)

    def verdict_lines(self) -> list[str]:
        """The gate's verdict, a line for each criterion."""
        if self.verdict is None:
            return []
        answers = {True: "passed", False: "FAILED", None: "–"}
        lines = [f"{answers[line.passed]}  {line.name}: {line.text}" for line in self.verdict.criteria]
        return [*lines, "gate: promoted to champion" if self.promoted else "gate: completed, not promoted"]

    def markdown(self) -> str:
        """Table, verdict and the report's place as a page."""
        rows = self.rows()
        columns = list(rows[0]) if rows else []
        lines = [_markdown_row(columns), _markdown_row(["---"] * len(columns))] if columns else []
        lines += [_markdown_row(list(row.values())) for row in rows]
        lines += ["", *(f"- {line}" for line in self.verdict_lines()), ""]
        return "\n".join([*lines, f"Report: `{self.report}`"] if self.report else lines)


def conclude(graph: StageGraph, store: Store) -> Outcome:
    """Compare the checkpoints of a run from the scores in the store, and ask the gate.

    Raises:
        UserError: a score sheet is malformed.
    """
    from evals.gate import judge
    from flows.results import collect

    results, gate = collect(graph, store), graph.config.gate
    verdict = judge(results, gate.non_inferiority_margin, gate.max_forgetting) if graph.config.merge else None
    return Outcome(results, verdict, None)


def score_rows(results: "Results") -> list[dict[str, str]]:
    """Base, cold start, teacher and student of every domain; roles that this run has not are left out."""
    from evals.results import ROLES

    roles = [role for role in ROLES if role in results.checkpoints or (role == "teacher" and results.teachers)]
    rows = []
    for domain in results.domains:
        scores = {role: _percent(results.score(role, domain)) for role in roles}
        recovered = {"recovery": _percent(results.recovery([domain]))} if "student" in roles else {}
        rows.append({"domain": domain, **scores, **recovered})
    if results.expert_domains:
        means = {role: _percent(results.mean_score(role)) for role in roles}
        recovered = {"recovery": _percent(results.recovery())} if "student" in roles else {}
        rows.append({"domain": "mean of expert domains", **means, **recovered})
    return rows


def _percent(value: "Interval | None") -> str:
    if value is None:
        return NOT_MEASURED
    return f"{100 * value.mean:.1f} [{100 * value.low:.1f}, {100 * value.high:.1f}]"


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
