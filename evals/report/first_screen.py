"""The report's first screen as HTML: scores, the weakest domain, why it was (not) promoted, and what to do next."""

import re
from html import escape

from evals.promotion.gate import GateVerdict
from evals.report.summary import CAPTION, Line, Summary, percent, points
from evals.tables.grid import ABSENT

TRACK, TALL, MIDDLE = 180, 16, 8
CODE = re.compile("`([^`]*)`")


def first_screen(summary: Summary, verdict: GateVerdict | None) -> str:
    """The sentence, the table of domains with a figure for each, the failed criteria and the suggestions."""
    good = verdict is not None and (verdict.promoted or (bool(verdict.reigns) and verdict.passed))
    style = "na" if verdict is None or verdict.unfinished else "ok" if good else "bad"
    status, _, goodness = summary.sentence.partition(": ")
    return (
        f'<section id="summary"><p class="status {style}">{escape(status)}</p>'
        f'<p class="goodness">{escape(goodness[:1].upper() + goodness[1:])}</p>'
        f'<div class="first"><div>{_table(summary)}</div><div>{_words(summary)}</div></div></section>'
    )


def _table(summary: Summary) -> str:
    head = "".join(f"<th>{title}</th>" for title in ("domain", "start", "teacher", "student", "gap"))
    rows = "".join(_row(line, line.domain == summary.weakest) for line in summary.shown)
    if summary.more:
        rows += f'<tr><td colspan="6" class="soft">{escape(summary.more)}; all of them below, under Scores</td></tr>'
    keys = "".join(f'<span class="key"><i class="{name}"></i>{name}</span>' for name in ("start", "teacher", "student"))
    return (
        f'<div class="scroll"><table class="domains"><caption>{escape(CAPTION)}</caption><thead><tr>{head}'
        f'<th class="track">{keys}</th></tr></thead><tbody>{rows}{_row(summary.mean, weakest=False, last=True)}</tbody>'
        "</table></div>"
    )


def _row(line: Line, weakest: bool, last: bool = False) -> str:
    cells = "".join(f"<td>{percent(score)}</td>" for score in (line.start, line.teacher, line.student))
    mark = ' <span class="mark bad">weakest</span>' if weakest else ""
    kind = ' class="sum"' if last else ""
    return (
        f"<tr{kind}><td>{escape(line.domain)}{mark}</td>{cells}<td>{points(line.gap)}</td>"
        f'<td class="track">{_track(line)}</td></tr>'
    )


def _track(line: Line) -> str:
    """A figure: 0 to 100 % as a line, start and teacher as ticks, the student as a dot."""

    def place(share: float) -> str:
        return f"{6 + share * (TRACK - 12):.1f}"

    drawn = [f'<path class="axis" d="M6 {MIDDLE}H{TRACK - 6}"/>']
    drawn += [
        f'<path class="{name}" d="M{place(share)} 0V{TALL}"/>'
        for name, share in (("start", line.start), ("teacher", line.teacher))
        if share is not None
    ]
    if line.student is not None:
        drawn.append(f'<circle class="student" cx="{place(line.student)}" cy="{MIDDLE}" r="4"/>')
    label = f"{line.domain}: {percent(line.student) if line.student is not None else ABSENT} of 100 %"
    return f'<svg viewBox="0 0 {TRACK} {TALL}" role="img" aria-label="{escape(label)}">{"".join(drawn)}</svg>'


def _words(summary: Summary) -> str:
    blocks = [("Weakest domain", "", [summary.weakest_text] if summary.weakest_text else [])]
    blocks += [("Failed", ' class="bad"', list(summary.failures)), ("What next", "", list(summary.next))]
    parts = [
        f"<h3{style}>{title}</h3><ul>{''.join(f'<li>{_item(line)}</li>' for line in lines)}</ul>"
        for title, style, lines in blocks
        if lines
    ]
    return "".join(parts) + (f'<p class="soft">Gate: {escape(summary.met)}.</p>' if summary.met else "")


def _item(line: str) -> str:
    return CODE.sub(r"<code>\1</code>", escape(line))
