"""Figures of the page of claims: fits as points with their curves, slopes as lines, contrasts of scores as intervals.
Measures with one value per seed are drawn as these values.

The background is white, because a Markdown page has no theme colours to adopt.
"""

import io
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle
from typing import Any

import numpy as np

from evals.claims.page import UNITS, short
from evals.claims.verdicts import Finding
from evals.config.claims import EXAMPLE_MEASURES
from evals.statistics.interval import Interval

COLOURS = {"shown": "#2aa876", "contradicted": "#d9605a"}
UNDECIDED = "#8a939b"
# Points a slope's axis spans at the least, so that a line of noise does not look steep.
LEAST_SPAN = 10.0
LINES = ("#4c8bd6", "#d19a3d", "#2aa876", "#b565c9")


def claim_figure(own: Sequence[Finding]) -> str | None:
    """The figure of one hypothesis as SVG, one panel for each kind of test; None if nothing was measured."""
    measured = [one for one in own if one.interval is not None]
    fits = [one for one in measured if one.coefficients]
    slopes = [one for one in measured if one.config.slope]
    plain = [one for one in measured if not one.coefficients and not one.config.slope]
    contrasts = [one for one in plain if one.config.measure in EXAMPLE_MEASURES]
    panels: list[tuple[float, Callable[[Any], None]]] = []
    if fits:
        panels.append((4.0, partial(_fits, fits)))
    if slopes:
        panels.append((3.4, partial(_slopes, slopes)))
    if contrasts:
        panels.append((0.9 + 0.42 * len(contrasts), partial(_intervals, contrasts)))
    for unit, rows in _seed_rows([one for one in plain if one.config.measure not in EXAMPLE_MEASURES]).items():
        panels.append((0.9 + 0.42 * len(rows), partial(_seed_values, unit, rows)))
    return _drawn(panels) if panels else None


def _fits(fits: Sequence[Finding], axes: Any) -> None:
    """Plot each checkpoint by its two measures, and the least-squares parabola of each fit."""
    first = fits[0].config
    assert first.fit is not None
    points = {name: point for one in fits for name, point in one.points.items()}
    axes.scatter([x for x, _ in points.values()], [100 * y for _, y in points.values()], color=LINES[0], zorder=3)
    ordered = sorted(points, key=lambda name: points[name])
    for number, name in enumerate(ordered, 1):
        # Neighbours' labels go to different sides; otherwise they would overlap.
        offset, side = (((6, 3), "left"), ((-6, 3), "right"), ((6, -9), "left"))[number % 3]
        x, y = points[name]
        axes.annotate(str(number), (x, 100 * y), textcoords="offset points", xytext=offset, ha=side, fontsize=7)
    names = (name.rpartition("/")[2].replace("_", " ") for name in ordered)
    legend = "\n".join(f"{number}  {name}" for number, name in enumerate(names, 1))
    axes.text(1.03, 1, legend, transform=axes.transAxes, va="top", fontsize=8)
    for one, colour in zip(fits, cycle(LINES[1:]), strict=False):
        assert one.coefficients is not None and one.interval is not None
        own = [x for x, _ in one.points.values()]
        grid = np.linspace(min(own), max(own), 100)
        label = f"{one.test.replace('_', ' ')}: R² {one.interval.mean:.2f}"
        axes.plot(grid, 100 * np.polyval(one.coefficients, grid), color=colour, linewidth=1.2, label=label)
    axes.set_xlabel(f"{first.fit.x.replace('_', ' ')} on {', '.join(first.fit.x_domains)}")
    axes.set_ylabel(f"{first.measure}, points")
    # Above the axes, where no point can be.
    axes.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1))


def _slopes(slopes: Sequence[Finding], axes: Any) -> None:
    """Plot each checkpoint's mean against its setting, one line per test."""
    for one, colour in zip(slopes, cycle(LINES), strict=False):
        assert one.config.slope is not None
        points = sorted((setting, 100 * one.values[name]) for name, setting in one.config.slope.items())
        assert one.interval is not None
        mean, low, high = (f"{100 * bound:+.1f}" for bound in (one.interval.mean, one.interval.low, one.interval.high))
        label = f"{one.test.replace('_', ' ')}: {mean} [{low}, {high}] a unit ({one.label})"
        axes.plot(*zip(*points, strict=True), color=colour, marker="o", label=label)
    bottom, top = axes.get_ylim()
    missing = max(0.0, LEAST_SPAN - (top - bottom)) / 2
    axes.set_ylim(bottom - missing, top + missing)
    axes.set_xlabel("setting")
    axes.set_ylabel("%, or points")
    # Above the axes, where no point can be.
    axes.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1))


def _intervals(found: Sequence[Finding], axes: Any) -> None:
    """Draw a forest plot: each test's contrast with its interval and its margin."""
    for place, one in enumerate(reversed(found)):
        assert one.interval is not None
        value = Interval(*(100 * bound for bound in (one.interval.mean, one.interval.low, one.interval.high)))
        error = [[value.mean - value.low], [value.high - value.mean]]
        axes.errorbar([value.mean], [place], xerr=error, fmt="o", capsize=3, color=COLOURS.get(one.verdict, UNDECIDED))
        for bound in {-one.config.margin, one.config.margin} if one.config.margin else ():
            axes.plot([100 * bound] * 2, [place - 0.35, place + 0.35], color="#b0b7bd", linewidth=1.2, linestyle=":")
    axes.axvline(0, color="#1d2329", linewidth=0.7)
    names = [f"{one.test.replace('_', ' ')}\n({one.label})" for one in reversed(found)]
    axes.set_yticks(range(len(found)), names, fontsize=8)
    axes.set_ylim(-0.6, len(found) - 0.4)
    dotted = "; dotted: the margin" if any(one.config.margin for one in found) else ""
    axes.set_xlabel(f"difference, points{dotted}")


def _seed_rows(found: Sequence[Finding]) -> dict[str, dict[str, list[float]]]:
    """Unit -> row label -> one value for each seed; tests that share a checkpoint's measure share its row."""
    panels: dict[str, dict[str, list[float]]] = {}
    for one in found:
        title, unit, scale, _ = UNITS[one.config.measure]
        for name, values in one.by_seed.items():
            panels.setdefault(unit, {})[f"{short(name)}\n{title}"] = [scale * value for value in values.values()]
    return panels


def _seed_values(unit: str, rows: dict[str, list[float]], axes: Any) -> None:
    """Draw a row for each checkpoint and measure: a dot for each seed, and the mean as a line."""
    for place, values in enumerate(reversed(rows.values())):
        axes.plot(values, [place] * len(values), "o", color=LINES[0], alpha=0.6, markersize=5)
        axes.plot([float(np.mean(values))] * 2, [place - 0.3, place + 0.3], color=LINES[1], linewidth=1.6)
    axes.set_yticks(range(len(rows)), list(reversed(rows)), fontsize=8)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlabel(f"{unit}; one dot per seed, the line is their mean")


def _drawn(panels: Sequence[tuple[float, Callable[[Any], None]]]) -> str:
    from matplotlib.figure import Figure

    heights = [height for height, _ in panels]
    figure = Figure(figsize=(6.4, sum(heights)), layout="constrained", facecolor="white")
    grid = figure.subplots(len(panels), squeeze=False, height_ratios=heights)
    for (_, draw), (axes,) in zip(panels, grid, strict=True):
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        draw(axes)
    return _svg(figure)


def _svg(figure: Any) -> str:
    """The figure as an SVG document; equal values give equal bytes."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "mopd", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
