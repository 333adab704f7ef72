"""A run's report: one HTML file that asks nothing of the network and reads well in light, dark and narrow."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from evals.figures import curves_figure, forgetting_figure, roles_figure
from evals.gate import Verdict
from evals.results import Results
from evals.table import Grid, grids, statements
from experts.domain import HELD_OUT, Prompt
from stages.core.checkpoint import write_whole

SAMPLES = 4
MARKS = {True: ("met", "ok"), False: ("failed", "bad"), None: ("not compared", "na")}
STYLE = """
:root{color-scheme:light dark;--ink:#1d2329;--soft:#5d6873;--page:#fbfbf9;--card:#fff;--line:#e1e4e6}
@media(prefers-color-scheme:dark){:root{--ink:#e4e7ea;--soft:#9aa5af;--page:#14181b;--card:#1c2125;--line:#31383e}}
*{box-sizing:border-box}body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 system-ui,sans-serif}
main{max-width:62rem;margin:auto;padding:2rem 1rem 4rem}h1{font-size:1.9rem;margin:0}h2{margin:2.5rem 0 .6rem}
.soft{color:var(--soft)}.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:.88rem}
td small{color:var(--soft)}
caption{text-align:left;color:var(--soft);padding:.3rem 0}th,td{padding:.4rem .6rem;border-bottom:1px solid var(--line);
text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}th:first-child,td:first-child{text-align:left}
.words td{text-align:left;white-space:normal;overflow-wrap:anywhere;vertical-align:top}.words th{text-align:left}
figure,.card{margin:1rem 0;background:var(--card);border:1px solid var(--line);border-radius:.6rem;padding:1rem}
figure,details{overflow-x:auto}svg{width:100%;min-width:32rem;height:auto;color:var(--ink)}summary{cursor:pointer;font-weight:600}
pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:.2rem 0;font-size:.82rem}
.words td.ok,.words td.bad,.words td.na{white-space:nowrap}
.ok{color:#2aa876}.bad{color:#d9605a}.na{color:var(--soft)}.ok,.bad{font-weight:600}
"""


def write_report(
    path: Path,
    results: Results,
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
    lineage_rows: Sequence[Mapping[str, str]],
    verdict: Verdict | None,
) -> Path:
    """Write the report of a run.

    Args:
        path: The HTML file; replaced whole.
        results: The run's scores.
        curves: node name -> its journal's metric records `{"step", "values"}` and notes `{"step", "text"}`.
        lineage_rows: A mapping of column to text for each checkpoint.
        verdict: What the gate said; None when nothing was judged.
    """
    seeds = ", ".join(map(str, results.seeds))
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    roles, *others = grids(results)
    body = [
        f"<header><h1>{escape(results.run)}</h1><p class=soft>seeds {seeds} · {made}</p></header>",
        _section("Verdict", _verdict(verdict)),
        _section("Scores", _grid(roles) + f"<figure>{roles_figure(results)}</figure>"),
        *(_section(other.title.partition(":")[0], _grid(other)) for other in others),
        _section("What it shows", "<ul>" + "".join(f"<li>{escape(s)}</li>" for s in statements(results)) + "</ul>"),
        _section("Forgetting", _figure(forgetting_figure(results))),
        _section("Training", "".join(_curves(name, records) for name, records in curves.items())),
        _section("Samples of the student", "".join(_samples(results, domain) for domain in results.domains)),
        _section("Lineage", _rows(lineage_rows)),
        _section("Provenance of the scores", _rows(_provenance(results))),
    ]
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(results.run)}</title><style>{STYLE}</style><main>{''.join(body)}</main></html>"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, page)
    return path


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>" if content else ""


def _figure(svg: str) -> str:
    return f"<figure>{svg}</figure>" if svg else ""


def _verdict(verdict: Verdict | None) -> str:
    if verdict is None:
        return "<p class=soft>Nothing was judged.</p>"
    style = "ok" if verdict.promoted else "bad"
    head = f"<p class={style}>{escape(verdict.conclusion)}</p>"
    head += f"<p>Candidate: {escape(verdict.candidate)}: {escape(verdict.why)}.</p>"
    lines = []
    for criterion in verdict.criteria:
        word, style = MARKS[criterion.passed]
        lines.append(f"<tr><td class={style}>{word}<td>{escape(criterion.name)}<td>{escape(criterion.text)}</tr>")
    return f'<div class="card">{head}<div class="scroll"><table class="words">{"".join(lines)}</table></div></div>'


def _grid(grid: Grid) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in grid.head)
    rows = "".join("<tr>" + "".join(f"<td>{_cell(cell)}</td>" for cell in row) + "</tr>" for row in grid.rows)
    return f'<div class="scroll"><table><caption>{escape(grid.title)}</caption><tr>{head}</tr>{rows}</table></div>'


def _cell(text: str) -> str:
    """A number with its interval in small below it."""
    number, bracket, bounds = text.partition(" [")
    return f"{escape(number)}<br><small>[{escape(bounds)}</small>" if bracket else escape(text)


def _curves(name: str, records: Sequence[Mapping[str, Any]]) -> str:
    svg = curves_figure([record for record in records if "values" in record])
    said = [f"<li>step {record['step']}: {escape(record['text'])}</li>" for record in records if "text" in record]
    content = svg + (f"<ul>{''.join(said)}</ul>" if said else "")
    return f'<details class="card"><summary>{escape(name)}</summary>{content}</details>' if content else ""


def _samples(results: Results, domain: str) -> str:
    cell = results.cells.get(("student", domain, HELD_OUT))
    if not cell:
        return ""
    rows = []
    for row in next(iter(cell.values())).rows[:SAMPLES]:
        greedy = row["greedy"]
        flag = " · contaminated" if row["contaminated"] else ""
        cells = [_prompt(row["prompt"]), greedy["completion"], row["answer"]]
        rows.append(
            "<tr>"
            + "".join(f"<td><pre>{escape(c)}</pre></td>" for c in cells)
            + f"<td>{greedy['score']:.2f}{flag}</tr>"
        )
    head = "<tr><th>prompt<th>completion<th>answer<th>score</tr>"
    table = f'<div class="scroll"><table class="words">{head}{"".join(rows)}</table></div>'
    return f'<details class="card" open><summary>{escape(domain)}</summary>{table}</details>'


def _prompt(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def _provenance(results: Results) -> list[dict[str, str]]:
    return [{"node": node, "key": key, "digest": digest[:16]} for node, (key, digest) in results.provenance.items()]


def _rows(rows: Sequence[Mapping[str, str]]) -> str:
    if not rows:
        return ""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    head = "".join(f"<th>{escape(column)}" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(row.get(c, '')))}" for c in columns) + "</tr>" for row in rows)
    return f'<div class="scroll"><table class="words"><tr>{head}</tr>{body}</table></div>'
