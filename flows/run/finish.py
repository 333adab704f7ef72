"""The outcome of a finished run: its scores, the gate's verdict on its merges, the champion, and the report."""

import dataclasses
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from base.errors import UserError
from base.store.checkpoint import Store
from base.store.journal import JOURNAL_FILE, thinned_records
from evals.tables.markdown import code, plain
from flows.champion.champion import first_of, judge_run, promote_by_gate
from flows.champion.costs import scoring_costs
from flows.champion.tries import note_try, read_tries
from flows.lineage import rows as lineage
from flows.plan.champion_history import ChampionRecord, read_history
from flows.plan.lock import lock_path
from flows.plan.nodes import Node, StageGraph
from flows.plan.state_files import read_json
from flows.run_file.schema import STUDENT

if TYPE_CHECKING:
    from evals.comparison.results import Results
    from evals.promotion.gate import GateVerdict
    from evals.report.page import Background
    from evals.report.summary import Summary

REPORT_FILE = "report.html"
# The folder for the report of an incomplete run, if there is already a complete report.
PARTIAL = "partial"
ANSWERS = {True: "met", False: "FAILED", None: "not compared"}


@dataclass(frozen=True)
class Outcome:
    """A finished run.

    Attributes:
        results: The comparison of base, cold start, teachers and student.
        summary: The first screen: quality, the weakest domain, the reason for or against promotion, the next steps.
        verdict: The gate's verdict, with the candidate's name; None without a merge.
        candidate: The candidate's node, of the first seed; None without a merge.
        champion: The present champion; None if there is none.
        changed: Whether this call promoted the candidate by the gate.
        report: Path of the HTML report.
        missing: Ids of the nodes that are not yet made.
    """

    results: "Results"
    summary: "Summary"
    verdict: "GateVerdict | None"
    candidate: Node | None
    champion: ChampionRecord | None
    changed: bool
    report: Path
    missing: tuple[str, ...] = ()

    @property
    def crowned(self) -> bool:
        """Whether the candidate is champion, whether promoted now or before."""
        return bool(self.candidate and self.champion and self.champion.student == self.candidate.key)

    def verdict_lines(self) -> list[str]:
        """Lines with the candidate, the gate's answer to each criterion, its conclusion, and the champion."""
        if self.verdict is None:
            return []
        lines = [f"candidate: {self.verdict.candidate}: {self.verdict.why}"]
        lines += [f"gate: {ANSWERS[line.passed]}: {line.name}: {line.text}" for line in self.verdict.criteria]
        lines.append(f"gate: {self.verdict.conclusion}")
        return [*lines, f"champion: {self.champion}, {self.champion.decision}" if self.champion else "champion: none"]

    def facts(self) -> dict[str, Any]:
        """Verdict, summary, champion and the report's path as JSON values, for programs."""
        verdict = self.verdict and {
            **dataclasses.asdict(self.verdict),
            "conclusion": self.verdict.conclusion,
            "promoted": self.verdict.promoted,
        }
        return {
            "run": self.results.run,
            "candidate": self.candidate and self.candidate.id,
            "candidate_is_champion": self.crowned,
            "champion": self.champion and dataclasses.asdict(self.champion),
            "verdict": verdict,
            "summary": dataclasses.asdict(self.summary),
            "missing": self.missing,
            "report": str(self.report),
        }

    def rows(self) -> list[dict[str, str]]:
        """The main table, a mapping of column to text for each row."""
        from evals.report.table import roles_grid

        grid = roles_grid(self.results)
        return [dict(zip(grid.head, row, strict=True)) for row in grid.rows]

    def markdown(self) -> str:
        """Verdict, tables and the report's path as a Markdown page."""
        from evals.report.table import render_markdown

        next_lines = "".join(f"- {plain(line)}\n" for line in self.summary.next)
        first = f"**{plain(self.summary.sentence)}**\n\n{next_lines}"
        verdict = "\n".join(f"- {plain(line)}" for line in self.verdict_lines())
        return f"{first}\n{render_markdown(self.results)}\n{verdict}\n\nReport: {code(str(self.report))}\n"


def finish_run(
    graph: StageGraph,
    store: Store,
    *,
    promote: bool,
    rewrite: bool = True,
    command: str = "",
    faults: list[str] | None = None,
) -> Outcome:
    """Compare the checkpoints of a run from the scores in the store, apply the gate, and write the report.

    The report of a complete run is never replaced by that of an incomplete one, which goes into a separate folder.

    Args:
        graph: The run.
        store: The store of its artifacts.
        promote: Make the candidate champion if it passes the gate.
        rewrite: Write the report even if there is one and nothing changed.
        command: The command line that makes the run; by default that of its last run.
        faults: Receives the messages of damaged files, and the report omits them; None raises them instead.

    Raises:
        UserError: a score sheet is malformed.
    """
    from evals.report.summary import summarise
    from flows.champion.results import collect
    from flows.run.run_settings import settings_of

    results, run = collect(graph, store), graph.config.name
    missing = tuple(node.id for node in graph.nodes if store.find(node.key) is None)
    verdict, candidate, changed = None, None, False
    try:
        history, _ = read_history(store, run), read_tries(store, run)
    except UserError as error:
        if faults is None:
            raise
        faults.append(f"{error}; the gate is not run until this is mended")
        history = None
    if graph.config.merge and history is not None:
        verdict = judge_run(graph, store, results)
        candidate = first_of(graph, verdict.candidate)
        if missing:
            unfinished = f"{len(missing)} of {len(graph.nodes)} parts are not made"
            verdict = dataclasses.replace(verdict, unfinished=unfinished)
        changed = promote and promote_by_gate(graph, store, verdict)
        if promote and not missing:
            note_try(store, results, first_of(graph, STUDENT).key)
    champion = next(reversed(read_history(store, run)), None) if history is not None else None
    if verdict and candidate and verdict.promoted and (champion is None or champion.student != candidate.key):
        verdict = dataclasses.replace(verdict, withheld="`mopd run` has yet to make it champion")
    results = results.of_shared_seeds()
    summary = summarise(results, verdict, settings_of(graph, store, candidate, command))
    path = _place(store, run, missing)
    if rewrite or changed or not path.exists():
        from evals.report.page import write_report

        write_report(path, results, verdict, _background(graph, store, results, summary, missing))
        if not missing:
            shutil.rmtree(path.parent / PARTIAL, ignore_errors=True)
    return Outcome(results, summary, verdict, candidate, champion, changed, path, missing)


def _place(store: Store, run: str, missing: Sequence[str]) -> Path:
    """Path of the report; that of an incomplete run is in `PARTIAL` if there is already a complete report."""
    from evals.report.export import DATA_FILE

    path = lock_path(store.home, run).with_name(REPORT_FILE)
    standing = read_json(path.with_name(DATA_FILE))
    return path.parent / PARTIAL / REPORT_FILE if missing and standing and not standing.get("missing") else path


def _curves(graph: StageGraph, store: Store) -> dict[str, list[dict[str, Any]]]:
    """Thinned metric records and notes of every training node whose journal still exists, by node id."""
    journals = {node.id: store.home / "work" / node.key / JOURNAL_FILE for node in graph.checkpoints}
    return {node: thinned_records(journal) for node, journal in journals.items() if journal.is_file()}


def _background(
    graph: StageGraph, store: Store, results: "Results", summary: "Summary", missing: Sequence[str]
) -> "Background":
    """The first screen, curves, lineage and the evaluations' costs for the report."""
    from evals.report.page import Background
    from flows.lineage.drawing import drawing

    rows = lineage.rows(store, [node.key for node in graph.checkpoints])
    # The drawing shows one seed, because the others have the same shape.
    first = lineage.rows(store, [node.key for node in graph.checkpoints if node.seed == graph.config.seeds[0]])
    return Background(
        summary=summary,
        missing=missing,
        curves=_curves(graph, store),
        drawing=drawing(first, results.expert_domains) if first else "",
        lineage=_lineage_texts(rows),
        scoring=scoring_costs(graph, store, results),
    )


def _lineage_texts(rows: Sequence[lineage.Row]) -> list[dict[str, str]]:
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
