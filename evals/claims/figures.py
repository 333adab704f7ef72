"""The two figures of the page of claims: every test's interval as small multiples, and the fits with their points.

The background is white, because a Markdown page has no theme colours to adopt.
"""

import io
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np

from evals.claims.page import UNITS
from evals.claims.verdicts import Finding

COLOURS = {"shown": "#2aa876", "contradicted": "#d9605a"}
UNDECIDED = "#8a939b"
COLUMNS = 3
LINES = ("#4c8bd6", "#d19a3d", "#2aa876", "#b565c9")


def intervals_figure(found: Mapping[str, Sequence[Finding]]) -> str | None:
    """Estimates with intervals and margins as SVG, a panel for each hypothesis and unit; None if nothing was measured.

    Args:
        found: Title of a hypothesis -> its findings; fits are left out.
    """
    panels: dict[tuple[str, str], list[Finding]] = {}
    for title, own in found.items():
        for one in own:
            if one.interval is not None and not one.config.fit:
                unit = UNITS[one.config.measure][1] + (" a unit of the setting" if one.config.slope else "")
                panels.setdefault((title, unit), []).append(one)
    if not panels:
        return None
    sizes = [len(rows) for rows in panels.values()]
    heights = [1 + 0.2 * max(sizes[first : first + COLUMNS]) for first in range(0, len(sizes), COLUMNS)]
    figure = _figure(12, sum(heights))
    figure.supxlabel("green: shown; red: contradicted; grey: neither; dotted: the margin", fontsize=8)
    grid = figure.subplots(len(heights), COLUMNS, squeeze=False, height_ratios=heights)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    for ((title, unit), rows), axes in zip(panels.items(), grid.flat, strict=False):
        axes.set_title(title, fontsize=8, loc="left")
        axes.set_xlabel(unit, fontsize=7)
        _intervals(rows, axes)
    return _svg(figure)


def fits_figure(found: Mapping[str, Sequence[Finding]]) -> str | None:
    """Fits as points with their curves, as SVG, a panel for each hypothesis; None if there are none.

    Args:
        found: As for `intervals_figure`.
    """
    panels = {title: fits for title, own in found.items() if (fits := [one for one in own if one.coefficients])}
    if not panels:
        return None
    figure = _figure(6.4, 4 * len(panels))
    for (title, fits), (axes,) in zip(panels.items(), figure.subplots(len(panels), squeeze=False), strict=True):
        axes.set_title(title, fontsize=8, loc="right")
        _fits(fits, axes)
    return _svg(figure)


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


def _intervals(rows: Sequence[Finding], axes: Any) -> None:
    """Draw a forest plot: each test's estimate with its interval, and its margin as a dotted line."""
    for place, one in enumerate(reversed(rows)):
        scale = UNITS[one.config.measure][2]
        assert one.interval is not None
        mean, low, high = (scale * bound for bound in (one.interval.mean, one.interval.low, one.interval.high))
        colour = COLOURS.get(one.verdict, UNDECIDED)
        axes.errorbar([mean], [place], xerr=[[mean - low], [high - mean]], fmt="o", markersize=3, color=colour)
        for bound in {-one.config.margin, one.config.margin} if one.config.margin else ():
            axes.plot([scale * bound] * 2, [place - 0.35, place + 0.35], color="#b0b7bd", linestyle=":")
    axes.axvline(0, color="#1d2329", linewidth=0.6)
    axes.set_yticks(range(len(rows)), [one.test.replace("_", " ") for one in reversed(rows)])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    # Few ticks and few lines keep the file small.
    axes.locator_params(axis="x", nbins=4)
    axes.tick_params(labelsize=7)
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def _svg(figure: Any) -> str:
    """The figure as an SVG document; equal values give equal bytes."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "mopd", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
