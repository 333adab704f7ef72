"""Figures of the page of claims: a fit as points with its curve, a slope as a line, all else as intervals.

On white, for a Markdown page has no colours of its own to take.
"""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from evals.claim_config import EXAMPLE_MEASURES
from evals.claims import Finding, checkpoint_mean
from evals.compare import Interval
from evals.results import Results

COLOURS = {"shown": "#2aa876", "contradicted": "#d9605a", "not shown": "#8a939b"}
# Points a slope's axis spans at the least, so that a line of noise does not look steep.
LEAST_SPAN = 10.0
LINES = ("#4c8bd6", "#d19a3d", "#2aa876", "#b565c9")


def claim_figure(results: Results, own: Sequence[Finding]) -> str | None:
    """The figure of one hypothesis as an SVG document; None where nothing of it can be drawn."""
    measured = [one for one in own if one.interval is not None]
    fits = [one for one in measured if one.config.fit]
    slopes = [one for one in measured if one.config.slope]
    if fits:
        return _fit(results, fits[0])
    if slopes:
        return _slopes(slopes)
    return _intervals([one for one in measured if one.config.measure in EXAMPLE_MEASURES])


def _fit(results: Results, one: Finding) -> str:
    """Every checkpoint by its two measures, and the least-squares parabola."""
    assert one.config.fit is not None
    fit = one.config.fit
    across = one.config.model_copy(update={"measure": fit.x, "domains": fit.x_domains})
    x = [checkpoint_mean(results, name, across) or 0.0 for name in one.values]
    y = [100 * value for value in one.values.values()]
    figure, axes = _axes(6.4, 4.0)
    axes.scatter(x, y, color=LINES[0], zorder=3)
    for rank, (place, height, name) in enumerate(sorted(zip(x, y, one.values, strict=True))):
        label = name.rpartition("/")[2].replace("_", " ")
        # Neighbours' labels go to different sides.
        offset, side = (((6, 3), "left"), ((-6, 3), "right"), ((6, -9), "left"))[rank % 3]
        axes.annotate(label, (place, height), textcoords="offset points", xytext=offset, ha=side, fontsize=7)
    grid = np.linspace(min(x), max(x), 100)
    axes.plot(grid, np.polyval(np.polyfit(x, y, 2), grid), color=LINES[1], linewidth=1.2)
    axes.set_xlabel(f"{fit.x.replace('_', ' ')} on {', '.join(fit.x_domains)}")
    axes.set_ylabel(f"{one.config.measure}, points")
    return _svg(figure)


def _slopes(slopes: Sequence[Finding]) -> str:
    """Each checkpoint's mean over its setting, a line a test."""
    figure, axes = _axes(6.4, 3.4)
    for one, colour in zip(slopes, LINES, strict=False):
        assert one.config.slope is not None
        points = sorted((setting, 100 * one.values[name]) for name, setting in one.config.slope.items())
        assert one.interval is not None
        mean, low, high = (f"{100 * bound:+.1f}" for bound in (one.interval.mean, one.interval.low, one.interval.high))
        label = f"{one.test.replace('_', ' ')}: {mean} [{low}, {high}] a unit ({one.verdict})"
        axes.plot(*zip(*points, strict=True), color=colour, marker="o", label=label)
    bottom, top = axes.get_ylim()
    missing = max(0.0, LEAST_SPAN - (top - bottom)) / 2
    axes.set_ylim(bottom - missing, top + missing)
    axes.set_xlabel("setting")
    axes.set_ylabel("%, or points")
    axes.legend(frameon=False, fontsize=8)
    return _svg(figure)


def _intervals(found: Sequence[Finding]) -> str | None:
    """A forest plot: each test's contrast with its interval and its margin."""
    if not found:
        return None
    figure, axes = _axes(6.4, 0.9 + 0.42 * len(found))
    for place, one in enumerate(reversed(found)):
        assert one.interval is not None
        value = Interval(*(100 * bound for bound in (one.interval.mean, one.interval.low, one.interval.high)))
        error = [[value.mean - value.low], [value.high - value.mean]]
        axes.errorbar([value.mean], [place], xerr=error, fmt="o", capsize=3, color=COLOURS[one.verdict])
        for bound in {-one.config.margin, one.config.margin} if one.config.margin else ():
            axes.plot([100 * bound] * 2, [place - 0.35, place + 0.35], color="#b0b7bd", linewidth=1.2, linestyle=":")
    axes.axvline(0, color="#1d2329", linewidth=0.7)
    names = [f"{one.test.replace('_', ' ')}\n({one.verdict})" for one in reversed(found)]
    axes.set_yticks(range(len(found)), names, fontsize=8)
    axes.set_ylim(-0.6, len(found) - 0.4)
    axes.set_xlabel("difference, points; dotted: the margin")
    return _svg(figure)


def _axes(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _svg(figure: Any) -> str:
    """The figure as a document that is the same for the same values."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "mopd", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
