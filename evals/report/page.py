"""A run's report: one HTML page without network access, and its data in files beside it (`evals.report.export`).

The page supports light and dark themes, narrow screens and paper. Without JavaScript everything is shown and only the
filters of the samples are missing. A content security policy allows the page's own script and no other.
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from markupsafe import Markup

from base.store.checkpoint import write_whole
from evals.comparison.headline import histograms
from evals.comparison.results import Cost, Results
from evals.promotion.advice import Settings
from evals.promotion.gate import GateVerdict
from evals.report.costs import costs_section
from evals.report.curves import curves_cards
from evals.report.export import DATA_FILE, SCORES_FILE, write_data, write_scores
from evals.report.figures import forgetting_figure, roles_figure
from evals.report.first_screen import first_screen
from evals.report.samples import samples_section
from evals.report.summary import Summary, summarise
from evals.report.table import grids, statements
from evals.tables.templates import html

# The number of missing nodes' ids that fit into the head of the page.
GAPS = 5
# In the order of the criteria on the page.
MARKS = {False: ("✗ failed", "bad"), None: ("not compared", "na"), True: ("✓ met", "ok")}


@dataclass(frozen=True)
class Background:
    """The data of a run besides its scores.

    Attributes:
        curves: node id -> its journal's metric records `{"step", "values"}` and notes `{"step", "text"}`.
        drawing: The lineage as HTML with inline SVG, which is trusted and not escaped; empty if there is none.
        lineage: A mapping of column to text for each checkpoint.
        scoring: checkpoint -> cost of its evaluations, a mean over seeds.
        summary: The first screen; made from scores and verdict only where it is None.
        missing: Ids of the run's nodes that are not made yet.
    """

    curves: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    drawing: str = ""
    lineage: Sequence[Mapping[str, str]] = ()
    scoring: Mapping[str, Cost] = field(default_factory=dict)
    summary: Summary | None = None
    missing: Sequence[str] = ()


def write_report(path: Path, results: Results, verdict: GateVerdict | None, background: Background) -> Path:
    """Write the report of a run, and `scores.csv` and `report.json` beside it, replacing whole files.

    Args:
        path: The HTML file.
        results: The run's scores.
        verdict: The gate's verdict; None if nothing was judged.
        background: The data of the run besides its scores.
    """
    made = datetime.now(UTC)
    summary = background.summary or summarise(results, verdict, Settings())
    path.parent.mkdir(parents=True, exist_ok=True)
    # The page links to the data, so they are written first.
    write_scores(path.with_name(SCORES_FILE), results)
    data, bins = path.with_name(DATA_FILE), histograms(background.curves)
    write_data(data, results, verdict, background.scoring, background.lineage, made, summary, background.missing, bins)
    write_whole(path, _page(results, verdict, background, summary, made) + "\n")
    return path


def _page(
    results: Results, verdict: GateVerdict | None, background: Background, summary: Summary, made: datetime
) -> str:
    roles, *others = grids(results)
    script = _asset("report.js")
    return html(
        "evals.report",
        "report.html",
        results=results,
        made=made,
        missing=background.missing,
        gaps=GAPS,
        style=_asset("report.css"),
        script=script,
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        scores_file=SCORES_FILE,
        data_file=DATA_FILE,
        first_screen=first_screen(summary, verdict),
        verdict=verdict,
        criteria=sorted(verdict.criteria, key=lambda one: list(MARKS).index(one.passed)) if verdict else (),
        marks=MARKS,
        roles=roles,
        roles_figure=Markup(roles_figure(results)),
        grids=others,
        statements=statements(results),
        forgetting_figure=Markup(forgetting_figure(results)),
        costs=costs_section(results, background.scoring),
        curves=curves_cards(background.curves),
        drawing=Markup(background.drawing),
        lineage=background.lineage,
        samples=samples_section(results),
        provenance=[
            {"node": node, "key": key, "digest": digest[:16]} for node, (key, digest) in results.provenance.items()
        ],
    )


def _asset(name: str) -> Markup:
    return Markup((files("evals") / "assets" / name).read_text(encoding="utf-8"))
