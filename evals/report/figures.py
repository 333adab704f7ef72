"""Figures of the report as inline SVG, drawn by matplotlib; text takes the page's colour, so dark pages work too."""

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from evals.comparison.forgetting import drop
from evals.comparison.results import Results
from evals.report.costs import checkpoint_title
from evals.statistics.interval import Interval

COLOURS = {"base": "#9aa0a6", "cold_start": "#d19a3d", "teacher": "#4c8bd6", "student": "#2aa876"}
INK = "#123456"
SPARE = ("#4c8bd6", "#d19a3d", "#2aa876", "#b565c9", "#d9605a")


def roles_figure(results: Results) -> str:
    """Bars of cold start, teacher and student on every domain, with intervals."""
    roles = ("cold_start", "teacher", "student")
    groups = {role: [results.score(role, domain) for domain in results.domains] for role in roles}
    return _bars(groups, results.domains, "greedy score, %")


def forgetting_figure(results: Results) -> str:
    """Drop of every trained checkpoint on the domains no expert trains, one row each; empty if there are none."""
    names = [name for name in results.checkpoints if name not in ("base", results.start)]
    groups = {domain: [drop(results, name, domain) for name in names] for domain in results.untrained}
    if not any(value for values in groups.values() for value in values):
        return ""
    return _dots(groups, [checkpoint_title(name) for name in names], f"drop from {results.start}, points")


def _series(
    groups: Mapping[str, Sequence[Interval | None]], distance: float
) -> Iterator[tuple[str, str, list[float], list[float], list[list[float]]]]:
    """For each group its name, its spare colour, and the places, means and errors of the values it has.

    Args:
        groups: The values of each, one per label.
        distance: Between the groups' places at one label.
    """
    for index, (group, values) in enumerate(groups.items()):
        found = [(place, value) for place, value in enumerate(values) if value is not None]
        places = [place + (index - (len(groups) - 1) / 2) * distance for place, _ in found]
        yield group, SPARE[index % len(SPARE)], places, *_means(found)


def _bars(groups: Mapping[str, Sequence[Interval | None]], labels: Sequence[str], unit: str) -> str:
    figure = _figure(9, 3.4)
    axes = figure.add_subplot()
    width = 0.8 / len(groups)
    for group, spare, places, means, errors in _series(groups, width):
        axes.bar(places, means, width * 0.92, label=group.replace("_", " "), color=COLOURS.get(group, spare))
        axes.errorbar(places, means, yerr=errors, fmt="none", ecolor=INK, capsize=2, linewidth=1)
    axes.axhline(0, color=INK, linewidth=0.6)
    axes.set_xticks(range(len(labels)), labels, rotation=20 if len(labels) > 6 else 0)
    axes.set_ylabel(unit, color=INK)
    axes.legend(frameon=False, labelcolor=INK, ncols=4, loc="lower right", bbox_to_anchor=(1, 1))
    _plain(axes)
    return _svg(figure)


def _dots(groups: Mapping[str, Sequence[Interval | None]], labels: Sequence[str], unit: str) -> str:
    """A row for every label, so that many labels stay legible; each row has a dot with its interval for every group."""
    figure = _figure(9, 0.9 + len(labels) * (0.12 + 0.14 * len(groups)))
    axes = figure.add_subplot()
    for group, colour, places, means, errors in _series(groups, 0.7 / len(groups)):
        axes.errorbar(means, places, xerr=errors, fmt="o", color=colour, label=group, capsize=2, markersize=4.5)
    axes.axvline(0, color=INK, linewidth=0.6)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.grid(axis="y", color=INK, alpha=0.08)
    axes.set_xlabel(unit, color=INK)
    axes.legend(frameon=False, labelcolor=INK, ncols=4, loc="lower right", bbox_to_anchor=(1, 1))
    _plain(axes)
    return _svg(figure)


def _means(found: Sequence[tuple[int, Interval]]) -> tuple[list[float], list[list[float]]]:
    """Means in percent, and the distances to the bounds below and above."""
    means = [100 * value.mean for _, value in found]
    below = [max(0.0, 100 * (value.mean - value.low)) for _, value in found]
    above = [max(0.0, 100 * (value.high - value.mean)) for _, value in found]
    return means, [below, above]


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _plain(axes: Any) -> None:
    axes.set_facecolor("none")
    axes.tick_params(colors=INK, labelsize=8)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)


def _svg(figure: Any) -> str:
    """The figure as an `<svg>` element whose ink is the page's text colour and whose size follows the column."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")
