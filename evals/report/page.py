"""A run's report: one HTML page without network access, and its data in files beside it (`evals.report.export`).

The page supports light and dark themes, narrow screens and paper. Without JavaScript everything is shown and only the
filters of the samples are missing. A content security policy allows the page's own script and no other.
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

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
from evals.tables.markup import card, figure, folded, grid_table, word_table

# Failed criteria come first.
ORDER = (False, None, True)
# The number of missing nodes' ids that fit into the head of the page.
GAPS = 5
MARKS = {True: ("✓ met", "ok"), False: ("✗ failed", "bad"), None: ("not compared", "na")}


@dataclass(frozen=True)
class Background:
    """The data of a run besides its scores.

    Attributes:
        curves: node id -> its journal's metric records `{"step", "values"}` and notes `{"step", "text"}`.
        drawing: The lineage as HTML with inline SVG, which is trusted and not escaped.
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
    write_whole(path, _page(results, verdict, background, summary, made))
    return path


def _page(
    results: Results, verdict: GateVerdict | None, background: Background, summary: Summary, made: datetime
) -> str:
    style, script = (_asset(name) for name in ("report.css", "report.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
    sections = {title: content for title, content in _sections(results, verdict, background).items() if content}
    body = first_screen(summary, verdict)
    body += "".join(folded(title, content) for title, content in sections.items())
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(results.run)}</title><style>{style}</style></head>"
        f"<body><main>{_header(results, made, background.missing)}{body}</main>"
        f"<script>{script}</script></body></html>\n"
    )


def _sections(results: Results, verdict: GateVerdict | None, background: Background) -> dict[str, str]:
    """Title -> content, in the page's order."""
    roles, *others = grids(results)
    shown = "".join(f"<li>{escape(line)}</li>" for line in statements(results))
    return {
        "Gate": _verdict(verdict),
        "Scores": grid_table(roles) + figure(roles_figure(results)),
        **{other.title.partition(":")[0]: grid_table(other) for other in others},
        "What it shows": f"<ul>{shown}</ul>",
        "Forgetting": figure(forgetting_figure(results)),
        "Cost": costs_section(results, background.scoring),
        "Training": curves_cards(background.curves),
        "Lineage": background.drawing + card("All checkpoints", word_table(background.lineage)),
        "Samples": samples_section(results),
        "Provenance": card("Keys and digests of the measurements", word_table(_provenance(results))),
    }


def _asset(name: str) -> str:
    return (files("evals") / "assets" / name).read_text(encoding="utf-8")


def _header(results: Results, made: datetime, missing: Sequence[str]) -> str:
    seeds = ", ".join(map(str, results.seeds))
    named = "seed" if len(results.seeds) == 1 else "seeds"
    gaps = f" · not made yet: {escape(', '.join(missing[:GAPS]))}{', …' if len(missing) > GAPS else ''}"
    return (
        f"<header><h1>{escape(results.run)}</h1>"
        f'<p class="soft">{named} {seeds} · {made:%Y-%m-%d %H:%M} UTC · data: '
        f'<a href="{SCORES_FILE}">{SCORES_FILE}</a>, <a href="{DATA_FILE}">{DATA_FILE}</a>'
        f"{gaps if missing else ''}</p></header>"
    )


def _verdict(verdict: GateVerdict | None) -> str:
    if verdict is None:
        return '<p class="soft">Nothing was judged.</p>'
    style = "ok" if verdict.promoted or (verdict.reigns and verdict.passed) else "bad"
    head = f'<p class="{style}">{escape(verdict.conclusion)}</p>'
    head += f"<p>Candidate: {escape(verdict.candidate)}: {escape(verdict.why)}.</p>"
    lines = []
    for criterion in sorted(verdict.criteria, key=lambda one: ORDER.index(one.passed)):
        word, style = MARKS[criterion.passed]
        texts = "".join(f"<td>{escape(text)}</td>" for text in (criterion.name, criterion.text))
        lines.append(f'<tr><td class="{style}">{word}</td>{texts}</tr>')
    return (
        f'<div class="card">{head}<div class="scroll"><table class="words verdict">{"".join(lines)}</table></div></div>'
    )


def _provenance(results: Results) -> list[dict[str, str]]:
    return [{"node": node, "key": key, "digest": digest[:16]} for node, (key, digest) in results.provenance.items()]
