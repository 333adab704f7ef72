"""Pieces of HTML that the sections of a report share; every text is escaped here."""

from collections.abc import Mapping, Sequence
from html import escape

from evals.tables.grid import Grid


def folded(title: str, content: str) -> str:
    """A folded section with its heading and an anchor; empty if there is no content."""
    head = f"<summary><h2>{escape(title)}</h2></summary>"
    return f'<details class="part" id="{anchor(title)}">{head}{content}</details>' if content else ""


def anchor(title: str) -> str:
    """The `id` of a section."""
    return "".join(letter if letter.isalnum() else "-" for letter in title.lower())


def figure(svg: str) -> str:
    """A figure; empty if there is no drawing."""
    return f"<figure>{svg}</figure>" if svg else ""


def card(name: str, content: str) -> str:
    """Content in a folded card with a name."""
    return f'<details class="card"><summary>{escape(name)}</summary>{content}</details>' if content else ""


def grid_table(grid: Grid) -> str:
    """A table of numbers; an interval is in small print below its number."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in grid.head)
    rows = "".join("<tr>" + "".join(f"<td>{_cell(cell)}</td>" for cell in row) + "</tr>" for row in grid.rows)
    caption = f"<caption>{escape(grid.title)}</caption>"
    return f'<div class="scroll"><table>{caption}<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def word_table(rows: Sequence[Mapping[str, str]]) -> str:
    """A table of words with a column for every key that occurs; empty if there are no rows."""
    if not rows:
        return ""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(str(row.get(c, '')))}</td>" for c in columns) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table class="words"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(text: str) -> str:
    number, bracket, bounds = text.partition(" [")
    return f"{escape(number)}<br><small>[{escape(bounds)}</small>" if bracket else escape(text)
