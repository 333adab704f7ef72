"""The samples of a report: completions of base, cold start, teacher and student for the same prompts, side by side.

A row carries its outcomes as tokens, so that the page's script only compares words; without the script all rows are
shown.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from evals.comparison.copies import NEAR
from evals.comparison.merges import merges
from evals.comparison.results import STUDENT, Results
from evals.comparison.scores import Scores
from evals.report.costs import checkpoint_title
from evals.tables.templates import html
from experts.domain import HELD_OUT, Prompt

EXAMPLES = 40
# Limits in characters, of all samples together and of one completion: a page stays below 5 MB.
BUDGET, LONGEST, SHORTEST = 1_200_000, 4000, 120
# Texts up to these sizes are shown unfolded.
OPEN_CHARACTERS, OPEN_LINES = 240, 8
RIGHT, PARTLY, WRONG = "right", "partly", "wrong"
SIGNS = {RIGHT: "✓ correct", PARTLY: "◐ partly", WRONG: "✗ wrong"}
OUTCOMES = {
    "lost": "student wrong, teacher right",
    "gained": "student right, teacher wrong",
    "all-right": "all right",
    "all-wrong": "all wrong",
}


@dataclass(frozen=True)
class Column:
    """One checkpoint beside others: its title and its sheet of the domain."""

    role: str
    title: str
    sheet: Scores


def samples_section(results: Results) -> Markup:
    """The filters and a table for each domain, of the run's first seed; empty where nothing was scored."""
    seed = results.seeds[0]
    other = best_other(results)
    columns = {domain: found for domain in results.domains if (found := columns_of(results, domain, seed, other))}
    if not columns:
        return Markup()
    texts = sum((2 + len(found)) * min(EXAMPLES, len(found[0].sheet.rows)) for found in columns.values())
    longest = max(SHORTEST, min(LONGEST, BUDGET // texts))
    return html(
        "evals.report",
        "samples.html",
        seed=seed,
        most=EXAMPLES,
        signs=SIGNS,
        outcomes=OUTCOMES,
        domains=[(domain, domain) for domain in columns],
        tables=[_table(domain, found, longest) for domain, found in columns.items()],
        open_characters=OPEN_CHARACTERS,
        open_lines=OPEN_LINES,
    )


def columns_of(results: Results, domain: str, seed: int, other: str | None) -> list[Column]:
    """The columns of base, cold start, the domain's teacher, the student and another merge, if they were scored."""
    teacher = results.teacher(domain)
    found = [("base", "base", "base"), ("cold_start", "cold start", "cold_start")]
    if teacher:
        found.append(("teacher", f"teacher: {checkpoint_title(teacher)}", teacher))
    found.append((STUDENT, "student: MOPD", STUDENT))
    if other:
        found.append(("other", checkpoint_title(other), other))
    return [
        Column(role, title, sheet)
        for role, title, name in found
        if (sheet := results.cells.get((name, domain, HELD_OUT), {}).get(seed)) is not None
    ]


def best_other(results: Results) -> str | None:
    """The merge beside MOPD with the highest mean score; None where there is none."""
    scored = [(m.score.mean, m.name) for m in merges(results) if m.score is not None and m.name != STUDENT]
    return max(scored)[1] if scored else None


def outcomes(standings: Mapping[str, str]) -> list[str]:
    """The filters' outcomes that a row has; `partly` counts as wrong.

    Args:
        standings: role -> `right`, `partly` or `wrong`.
    """
    right = {role: standing == RIGHT for role, standing in standings.items()}
    student, teacher = right.get(STUDENT), right.get("teacher")
    held = {
        "lost": student is False and teacher is True,
        "gained": student is True and teacher is False,
        "all-right": all(right.values()),
        "all-wrong": not any(right.values()),
    }
    return [name for name, holds in held.items() if holds]


def standing(score: float) -> str:
    """`right` at the full score of 1, `wrong` at 0, else `partly`."""
    return RIGHT if score >= 1 else PARTLY if score > 0 else WRONG


def _table(domain: str, columns: Sequence[Column], longest: int) -> dict[str, Any]:
    total = len(columns[0].sheet.rows)
    rows = [_row(columns, number, longest) for number in range(min(EXAMPLES, total))]
    return {"domain": domain, "titles": [column.title for column in columns], "total": total, "rows": rows}


def _row(columns: Sequence[Column], number: int, longest: int) -> dict[str, Any]:
    own = [(column, column.sheet.rows[number]) for column in columns]
    asked = own[0][1]
    return {
        "outcomes": outcomes({column.role: standing(row["greedy"]["score"]) for column, row in own}),
        "prompt": _text(prompt_text(asked["prompt"]), longest),
        "answer": _text(str(asked["answer"]), longest),
        "cells": [_completion(column.title, row, longest) for column, row in own],
    }


def _completion(title: str, row: Mapping[str, Any], longest: int) -> dict[str, Any]:
    greedy = row["greedy"]
    kind = standing(greedy["score"])
    marks = [SIGNS[kind] + (f", {greedy['score']:.2f}" if kind == PARTLY else "")]
    marks += ["cut off"] if greedy["truncated"] else []
    marks += ["contaminated (near copy)" if row.get("copy") == NEAR else "contaminated"] if row["contaminated"] else []
    return {"title": title, "standing": kind, "marks": marks, "text": _text(greedy["completion"], longest)}


def _text(text: str, longest: int) -> str:
    """A text, truncated if it is very long."""
    return text if len(text) <= longest else f"{text[:longest]}… ({len(text) - longest:,} more characters)"


def prompt_text(prompt: Prompt) -> str:
    """A prompt as text; in a conversation each message follows its role."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
