"""What a finished run comes to: its scores, what the gate says of the student, the champion, and the report."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experts.domain import HELD_OUT
from flows import lineage
from flows.config import STUDENT
from flows.lock import lock_path
from flows.plan import StageGraph
from stages.core.checkpoint import Store, write_whole
from stages.core.journal import JOURNAL_FILE, read

if TYPE_CHECKING:
    from evals.gate import Verdict
    from evals.results import Results
    from evals.scores import Scores

REPORT_FILE = "report.html"
CHAMPION_FILE = "champion.json"
ANSWERS = {True: "met", False: "FAILED", None: "not compared"}


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
    report: Path

    @property
    def promoted(self) -> bool:
        """Whether the student may become the champion."""
        return self.verdict is not None and self.verdict.promoted

    def verdict_lines(self) -> list[str]:
        """The gate's verdict, a line for each criterion and one for all."""
        if self.verdict is None:
            return []
        lines = [f"gate: {ANSWERS[line.passed]}: {line.name}: {line.text}" for line in self.verdict.criteria]
        return [*lines, "gate: passed, the student is champion" if self.promoted else "gate: completed, not promoted"]

    def rows(self) -> list[dict[str, str]]:
        """The main table, a mapping of column to text for each row."""
        from evals.table import roles_grid

        grid = roles_grid(self.results)
        return [dict(zip(grid.head, row, strict=True)) for row in grid.rows]

    def markdown(self) -> str:
        """Tables, verdict and the report's place as a page."""
        from evals.table import render_markdown

        verdict = "\n".join(f"- {line}" for line in self.verdict_lines())
        return f"{render_markdown(self.results)}\n{verdict}\n\nReport: `{self.report}`\n"


def conclude(graph: StageGraph, store: Store, *, rewrite: bool = True) -> Outcome:
    """Compare the checkpoints of a run from the scores in the store, ask the gate, and write the report.

    Args:
        graph: The run.
        store: Where its artifacts are.
        rewrite: Write the report even where one stands already.

    Raises:
        UserError: a score sheet is malformed.
    """
    from evals.gate import judge
    from flows.results import collect

    results, gate = collect(graph, store), graph.config.gate
    verdict = None
    if graph.config.merge:
        champion = _champion_scores(store, graph.config.name)
        verdict = judge(results, gate.non_inferiority_margin, gate.max_forgetting, champion)
    path = _run_folder(store, graph.config.name) / REPORT_FILE
    if rewrite or not path.exists():
        from evals.report import write_report

        write_report(path, results, _curves(graph, store), _lineage_rows(graph, store), verdict)
    return Outcome(results, verdict, path)


def promote(graph: StageGraph, store: Store, outcome: Outcome) -> None:
    """Remember the student, and the scores the next one will be compared with, where the gate lets it pass."""
    if not outcome.promoted:
        return
    student = next(node for node in graph.checkpoints if node.name == STUDENT)
    scores = {
        str(node.config["domain"]): node.key
        for node in graph.evaluations(student.id)
        if node.config["split"] == HELD_OUT
    }
    path = _run_folder(store, graph.config.name) / CHAMPION_FILE
    write_whole(path, json.dumps({"student": student.key, "scores": scores}, indent=1))


def _champion_scores(store: Store, run: str) -> "dict[str, Scores] | None":
    """domain -> held-out sheet of the champion; None where there is no champion."""
    from evals.scores import read_scores

    path = _run_folder(store, run) / CHAMPION_FILE
    if not path.exists():
        return None
    keys: dict[str, str] = json.loads(path.read_text())["scores"]
    found = {domain: store.find(key) for domain, key in keys.items()}
    return {domain: read_scores(sheet.path, domain, HELD_OUT) for domain, sheet in found.items() if sheet}


def _curves(graph: StageGraph, store: Store) -> dict[str, list[dict[str, Any]]]:
    """Metric records and notes of every training node whose journal is still there."""
    curves = {}
    for node in graph.checkpoints:
        journal = store.home / "work" / node.key / JOURNAL_FILE
        if journal.exists():
            curves[node.id] = [record for record in read(journal) if record["kind"] in ("metrics", "note")]
    return curves


def _lineage_rows(graph: StageGraph, store: Store) -> list[dict[str, str]]:
    rows = lineage.rows(store, [node.key for node in graph.checkpoints])
    names = {row.key: f"{row.name}@{row.seed}" for row in rows}
    return [
        {
            "checkpoint": names[row.key],
            "stage": row.stage,
            "made from": ", ".join(f"{row.label(role)}: {names.get(key, key)}" for role, key in row.parents.items()),
            "digest": row.digest[:16],
            "key": row.key,
            "details": " · ".join(lineage.details(row)[:1]),
        }
        for row in rows
    ]


def _run_folder(store: Store, run: str) -> Path:
    return lock_path(store.home, run).parent
