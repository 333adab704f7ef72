"""Draws a lineage as one self-contained page: inline SVG in layers from base to student, and a table of facts.

Layout in the manner of Sugiyama: a checkpoint's layer is its longest distance from a root; an edge that skips layers
gets its own place in each, so that it never runs behind a box; within a layer the order follows the mean height of the
parents.
"""

from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from markupsafe import Markup

from base.store.checkpoint import Store
from evals.tables.templates import html
from flows.lineage.rows import SHORT, Row, details, expert_domains, mean_score, rows
from stages.config.kinds import colour_of

BOX_WIDTH, BOX_HEIGHT = 208, 78
LANE_HEIGHT = 26
GAP_X, GAP_Y = 150, 22
MARGIN = 24
LINE_CHARACTERS, SHORT_EDGE_CHARACTERS = 30, 22
# A longer name is compressed to fit its box.
NAME_CHARACTERS = 20
MEANINGS = {"grey": "base", "blue": "SFT", "amber": "RL, RFT", "green": "merge", "purple": "own program"}


@dataclass
class _Place:
    """A box, or the place where an edge passes through a layer."""

    layer: int
    height: int
    y: float = 0.0

    @property
    def left(self) -> float:
        return MARGIN + self.layer * (BOX_WIDTH + GAP_X)

    @property
    def middle(self) -> float:
        return self.y + self.height / 2


def page(rows: Sequence[Row], title: str) -> str:
    """The page of a lineage.

    Args:
        rows: The checkpoints, parents first (`flows.lineage.rows`).
        title: Heads the page.

    Returns:
        HTML without network access that follows the reader's light or dark theme.
    """
    names = {row.key: row.name for row in rows}
    shown = {"title": title, "drawing": drawing(rows), "rows": rows, "names": names, "details": details, "short": SHORT}
    return html("flows.lineage", "lineage.html", **shown)


def drawing(rows: Sequence[Row], domains: Sequence[str] | None = None) -> Markup:
    """The drawn graph with its legend and style, to be embedded in an element of the class `lineage`.

    Args:
        rows: The checkpoints, parents first (`flows.lineage.rows`).
        domains: The domains of the run's experts, for a checkpoint's mean; by default those of the experts drawn.
    """
    known = {row.key: row for row in rows}
    if domains is None:
        domains = expert_domains(rows)
    layers = _layers(rows)
    roles = _edges(rows)
    boxes = {key: _Place(layer, BOX_HEIGHT) for key, layer in layers.items()}
    lanes = {
        (parent, child): [_Place(layer, LANE_HEIGHT) for layer in range(layers[parent] + 1, layers[child])]
        for parent, child in roles
    }
    height = _stack(boxes, lanes)
    chains = {(p, c): [boxes[p], *lanes[p, c], boxes[c]] for p, c in roles}
    labelled = _labelled(roles, {edge for edge, lane in lanes.items() if lane})
    return html(
        "flows.lineage",
        "drawing.html",
        legend=[(colour, MEANINGS[colour]) for colour in dict.fromkeys(colour_of(row.stage) for row in rows)],
        width=2 * MARGIN + max(layers.values(), default=0) * (BOX_WIDTH + GAP_X) + BOX_WIDTH,
        height=f"{height:.0f}",
        edges=[_edge(chain) for chain in chains.values()],
        boxes=[_box(known[key], place, domains) for key, place in boxes.items()],
        labels=[_label(chains[edge], ", ".join(names), at_child) for edge, names, at_child in labelled],
        box_width=BOX_WIDTH,
        box_height=BOX_HEIGHT,
        name_characters=NAME_CHARACTERS,
    )


def _layers(rows: Sequence[Row]) -> dict[str, int]:
    """Each checkpoint's longest distance from a root."""
    layers: dict[str, int] = {}
    for row in rows:
        layers[row.key] = 1 + max((layers[p] for p in row.parents.values() if p in layers), default=-1)
    return layers


def _edges(rows: Sequence[Row]) -> dict[tuple[str, str], list[str]]:
    """(parent, child) -> the parent's roles for the child."""
    known = {row.key for row in rows}
    edges: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for role, parent in row.parents.items():
            if parent in known:
                edges.setdefault((parent, row.key), []).append(row.label(role))
    return edges


def _labelled(
    roles: Mapping[tuple[str, str], Sequence[str]], long: Container[tuple[str, str]]
) -> Iterator[tuple[tuple[str, str], Sequence[str], bool]]:
    """The edges to label, their roles, and whether the label is at the child.

    A label is at the end where fewer edges meet. If many meet at both ends, a parent with one role for all its
    neighbours is labelled once.
    """
    leaving, reaching = Counter(p for p, _ in roles), Counter(c for _, c in roles)
    shared: dict[str, set[str]] = {}
    for (parent, child), names in roles.items():
        if (parent, child) not in long:
            shared.setdefault(parent, set()).add(", ".join(names))
    labelled = set()
    for (parent, child), names in roles.items():
        crowded = (parent, child) not in long and leaving[parent] > 1 < reaching[child]
        if not crowded or len(shared[parent]) > 1:
            yield (parent, child), names, leaving[parent] > reaching[child]
        elif parent not in labelled:
            labelled.add(parent)
            yield (parent, child), names, False


def _stack(boxes: Mapping[str, _Place], lanes: Mapping[tuple[str, str], Sequence[_Place]]) -> float:
    """Set the vertical position of every place; returns the page's height."""
    before: dict[int, list[_Place]] = {id(place): [] for place in boxes.values()}
    for (parent, child), passing in lanes.items():
        chain = [boxes[parent], *passing, boxes[child]]
        for left, right in pairwise(chain):
            before.setdefault(id(right), []).append(left)
    everything = [*boxes.values(), *(place for passing in lanes.values() for place in passing)]
    columns: dict[int, list[_Place]] = {}
    for place in everything:
        columns.setdefault(place.layer, []).append(place)
    tall = max(sum(p.height + GAP_Y for p in column) - GAP_Y for column in columns.values()) if columns else 0
    for layer in sorted(columns):
        column = columns[layer]
        if layer:
            column.sort(key=lambda p: sum(b.middle for b in before[id(p)]) / max(1, len(before[id(p)])))
            # A lane at the edge of its layer keeps long edges away from those between the boxes.
            column.sort(key=lambda p: p.height == LANE_HEIGHT)
        y = MARGIN + (tall - sum(p.height + GAP_Y for p in column) + GAP_Y) / 2
        for place in column:
            place.y = y
            y += place.height + GAP_Y
    return tall + 2 * MARGIN


def _edge(chain: Sequence[_Place]) -> str:
    """The path of an edge, as SVG's attribute `d` has it."""
    x, y = chain[0].left + BOX_WIDTH, chain[0].middle
    path = [f"M{x:.0f} {y:.1f}"]
    for place in chain[1:]:
        reach = place.left - (5 if place is chain[-1] else 0)
        half = (x + reach) / 2
        path.append(f"C{half:.0f} {y:.1f} {half:.0f} {place.middle:.1f} {reach:.0f} {place.middle:.1f}")
        x, y = place.left + BOX_WIDTH, place.middle
        if place is not chain[-1]:
            path.append(f"L{x:.0f} {y:.1f}")
    return "".join(path)


def _label(chain: Sequence[_Place], whole: str, at_child: bool) -> dict[str, Any]:
    """The roles as text: over the lane of a long edge; for a short one beside the box where fewer edges meet."""
    text = _cut(whole, LINE_CHARACTERS if len(chain) > 2 else SHORT_EDGE_CHARACTERS)
    if len(chain) > 2:
        x, y, anchor = chain[1].left + 8, chain[1].middle - 5, "start"
    elif at_child:
        x, y, anchor = chain[1].left - 12, chain[1].middle - 7, "end"
    else:
        x, y, anchor = chain[0].left + BOX_WIDTH + 10, chain[0].middle - 7, "start"
    return {"x": x, "y": y, "anchor": anchor, "text": text, "whole": whole}


def _box(row: Row, place: _Place, domains: Sequence[str]) -> dict[str, Any]:
    lines = [f"{row.stage}, seed {row.seed}" + (f", {row.seconds:,.0f} s" if row.seconds else "")]
    lines.append(f"digest {row.digest[:SHORT]}" if row.made else "not made yet")
    if (mean := mean_score(row, domains)) is not None:
        lines.append(f"mean of experts' domains {100 * mean:.1f} %")
    hint = "\n".join([row.name, f"key {row.key}", *details(row)])
    shown = {"row": row, "name": _cut(row.name, 2 * NAME_CHARACTERS), "lines": lines, "hint": hint}
    return {**shown, "colour": colour_of(row.stage), "x": place.left, "y": place.y}


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def draw_html(store: Store, keys: Sequence[str], title: str) -> str:
    """The lineage of these checkpoints as a complete page: a drawn graph and a table."""
    return page(rows(store, keys), title)
