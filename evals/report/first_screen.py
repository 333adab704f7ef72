"""The report's first screen as HTML: scores, the weakest domain, why it was (not) promoted, and what to do next."""

from markupsafe import Markup

from evals.promotion.gate import GateVerdict
from evals.report.summary import CAPTION, Summary, percent, points
from evals.tables.templates import html

# Of a domain's figure, and of the margin on either side of it.
WIDTH, MARGIN = 180, 6


def first_screen(summary: Summary, verdict: GateVerdict | None) -> Markup:
    """The sentence, the table of domains with a figure for each, the failed criteria and the suggestions."""
    style = "na" if verdict is None or verdict.unfinished else "ok" if verdict.is_champion else "bad"
    status, _, goodness = summary.sentence.rpartition(": ")
    return html(
        "evals.report",
        "first_screen.html",
        summary=summary,
        style=style,
        status=status,
        goodness=goodness[:1].upper() + goodness[1:],
        caption=CAPTION,
        width=WIDTH,
        place=lambda share: f"{MARGIN + share * (WIDTH - 2 * MARGIN):.1f}",
        percent=percent,
        points=points,
    )
