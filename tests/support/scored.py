"""Score sheets and results made by hand, for the tests of what is computed from them."""

from typing import Any

from evals.comparison.results import Expert, Results
from evals.comparison.scores import Scores

SCORES = {"base": 0.2, "cold_start": 0.5, "experts/a": 0.9, "experts/b": 0.4, "student": 0.8}


def row(number: int, score: float, samples: tuple[float, ...] = ()) -> dict[str, Any]:
    """One row of a score sheet."""

    def drawn(value: float) -> dict[str, Any]:
        return {"completion": f"<c{number}>", "score": value, "tokens": 3, "truncated": value == 0}

    return {
        "id": f"id{number}",
        "source": f"s{number}",
        "prompt": f"prompt {number}",
        "answer": "x",
        "contaminated": number == 0,
        "copy": "prompt" if number == 0 else "",
        "greedy": drawn(score),
        "samples": [drawn(value) for value in samples],
    }


def sheet(domain: str, share: float, examples: int = 100, split: str = "held_out") -> Scores:
    """A sheet in which the first `share` of the examples score 1, the others 0."""
    return Scores(domain, split, [row(i, float(i < round(share * examples))) for i in range(examples)])


def results(scores: dict[tuple[str, str], float] | None = None, seeds: tuple[int, ...] = (0, 1)) -> Results:
    """Two experts on domains a and b, a general domain g that is anchored; `scores` overrides the defaults."""
    values = {(name, domain): share for name, share in SCORES.items() for domain in ("a", "b", "g")}
    values |= {("experts/a", "b"): 0.3, ("experts/b", "b"): 0.9} | {(n, "g"): 0.5 for n in ("cold_start", "student")}
    values |= scores or {}
    cells = {(n, d, "held_out"): {s: sheet(d, v) for s in seeds} for (n, d), v in values.items() if v >= 0}
    experts = {"experts/a": Expert("a", "rl"), "experts/b": Expert("b", "sft")}
    teachers = {"a": {"experts/a": 1.0}, "b": {"experts/b": 1.0}}
    names = tuple(SCORES)
    return Results("toy", seeds, names, ("a", "b", "g"), cells, teachers, experts, ("g",), "cold_start", 0.95, {})
