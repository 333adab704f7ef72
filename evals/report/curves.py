"""Training curves as small inline SVG panels: one per metric, with a line per seed.

They are drawn here, because matplotlib takes 17 s and 3 MB for the some 400 panels of a run of three seeds.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from typing import Any

from markupsafe import Markup

from evals.tables.templates import html

Points = list[tuple[int, float]]

COLOURS = ("#4c8bd6", "#d19a3d", "#2aa876", "#b565c9", "#d9605a", "#7f8c97")
# The metrics of most interest, which come first.
FIRST = ("loss", "reward", "reverse_kl", "entropy", "length", "grad_norm")
# The number of panels that a reader will look at, and half the number of points that fit into a panel.
PANELS, BUCKETS = 12, 80
WIDTH, HEIGHT = 240, 120
LEFT, RIGHT, TOP, BOTTOM = 42, 236, 20, 104


def curves_cards(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> Markup:
    """A folded card for every checkpoint with its curves and its training's notes.

    Args:
        curves: node id (`NAME@SEED`, or `NAME`) -> its journal's metric records `{"step", "values"}` and notes
            `{"step", "text"}`.
    """
    names: dict[str, dict[str, Sequence[Mapping[str, Any]]]] = {}
    for node, records in curves.items():
        name, _, seed = node.partition("@")
        names.setdefault(name, {})[f"seed {seed}" if seed else ""] = records
    return html(
        "evals.report",
        "curves.html",
        trainings={name: _training(seeds) for name, seeds in names.items()},
        size=(WIDTH, HEIGHT),
        axis=f"M{LEFT} {TOP}V{BOTTOM}H{RIGHT}",
    )


def _training(seeds: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """One checkpoint's panels, the colours of its seeds, and its notes."""
    metrics: dict[str, dict[str, Points]] = {}
    for seed, records in seeds.items():
        for record in records:
            for name, value in record.get("values", {}).items():
                if math.isfinite(value):
                    metrics.setdefault(name, {}).setdefault(seed, []).append((record["step"], value))
    lines = _changing(metrics)
    colours = dict(zip(seeds, cycle(COLOURS), strict=False))
    return {
        "colours": colours,
        "panels": [_panel(name, own, colours) for name, own in list(lines.items())[:PANELS]],
        "more": max(0, len(lines) - PANELS),
        "notes": [
            f"{seed}, step {record['step']}: {record['text']}".removeprefix(", ")
            for seed, records in seeds.items()
            for record in records
            if "text" in record
        ],
    }


def _changing(metrics: Mapping[str, dict[str, Points]]) -> dict[str, dict[str, Points]]:
    """The metrics that change, those of most interest first.

    If metrics have equal values, such as a sole domain's and the mean's, the first is kept.
    """
    known = {name: index for index, name in enumerate(FIRST)}
    found: dict[str, dict[str, Points]] = {}
    for name in sorted(metrics, key=lambda name: known.get(name.partition("/")[2].partition("/")[0], len(FIRST))):
        changes = any(len({value for _, value in points}) > 1 for points in metrics[name].values())
        if changes and metrics[name] not in found.values():
            found[name] = metrics[name]
    return found


def _panel(name: str, lines: Mapping[str, Points], colours: Mapping[str, str]) -> dict[str, Any]:
    """The lines of one metric, a colour and points each, and its labels: anchor, x, y, text; the first is the title."""
    steps = [step for points in lines.values() for step, _ in points]
    values = [value for points in lines.values() for _, value in points]
    first, last, low, high = min(steps), max(steps), min(values), max(values)

    def place(points: Iterable[tuple[int, float]]) -> str:
        across, up = (RIGHT - LEFT) / ((last - first) or 1), (BOTTOM - TOP) / ((high - low) or 1)
        return " ".join(f"{LEFT + (x - first) * across:.1f},{BOTTOM - (y - low) * up:.1f}" for x, y in points)

    labels = [
        ("start", 2, 10, name),
        ("end", LEFT - 4, TOP + 4, f"{high:.2g}"),
        ("end", LEFT - 4, BOTTOM, f"{low:.2g}"),
        ("start", LEFT, HEIGHT - 4, f"step {first}"),
        ("end", RIGHT, HEIGHT - 4, str(last)),
    ]
    drawn = [(colours[seed], place(thinned(points))) for seed, points in lines.items()]
    return {"lines": drawn, "labels": labels}


def thinned(points: Points) -> Points:
    """At most `2 * BUCKETS` points: the lowest and the highest of each bucket, so that spikes are kept."""
    if len(points) <= 2 * BUCKETS:
        return points
    size = math.ceil(len(points) / BUCKETS)
    kept: Points = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        ends = {min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])}
        kept.extend(sorted(ends))
    return kept
