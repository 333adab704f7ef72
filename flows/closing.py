"""What a finished run comes to: its scores, what the gate says of the student, and the report."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.plan import StageGraph
from stages.core.checkpoint import Store

if TYPE_CHECKING:
    from evals.results import Results

REPORT_FILE = "report.html"


@dataclass(frozen=True)
class Outcome:
    """A finished run.

    Attributes:
        results: The comparison; None while nothing was scored.
        report: The HTML report.
        promoted: Whether the gate made the student the champion.
        rows: The table of scores, a mapping of column to text for each row.
        markdown: The same for a page, with the verdict and where the report is.
    """

    results: "Results | None"
    report: Path | None
    promoted: bool
    rows: list[dict[str, Any]]
    markdown: str


def conclude(graph: StageGraph, store: Store, home: Path) -> Outcome:
    """Compare the checkpoints of a run from the scores in the store."""
    del home
    rows = [{"checkpoint": node.id, **_greedy(graph, store, node.id)} for node in graph.checkpoints]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    lines += [f"| {' | '.join(str(row.get(column, '')) for column in columns)} |" for row in rows]
    return Outcome(None, None, False, rows, "\n".join(lines))


def _greedy(graph: StageGraph, store: Store, checkpoint_id: str) -> dict[str, str]:
    scores = {}
    for node in graph.evaluations(checkpoint_id):
        artifact = store.find(node.key)
        if artifact is not None:
            name = f"{node.config['domain']}/{node.config['split']}"
            scores[name] = f"{100 * artifact.manifest['metrics']['greedy']:.1f}"
    return scores
