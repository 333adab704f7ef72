"""Draws a lineage as one self-contained page: inline SVG in layers from base to student, and a table of facts.

Layout in the manner of Sugiyama: a checkpoint's layer is its longest distance from a root; an edge that skips layers
gets its own place in each, so that it never runs behind a box; within a layer the order follows the mean height of the
parents.
"""

from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from base.store.checkpoint import Store
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
# The rules apply only inside `.lineage`, so that the drawing can be embedded in another page.
DRAWING_STYLE = """
.lineage { color-scheme: light dark; --paper: #ffffff; --ink: #1d2430; --faint: #667085; --line: #98a2b3;
  --box: #f8fafc; --rim: #d0d5dd; --grey: #667085; --blue: #2563eb; --amber: #d97706; --green: #059669;
  --purple: #7c3aed; }
@media screen and (prefers-color-scheme: dark) { .lineage { --paper: #11151c; --ink: #e6e9ef; --faint: #98a2b3;
  --line: #667085; --box: #1a212c; --rim: #344054; --grey: #98a2b3; --blue: #60a5fa; --amber: #fbbf24;
  --green: #34d399; --purple: #a78bfa; } }
.lineage .graph { overflow-x: auto; border: 1px solid var(--rim); border-radius: 10px; margin-bottom: 28px;
  background: var(--paper); }
.lineage svg { display: block; width: 100%; min-width: 820px; height: auto; margin: auto; }
@media print { .lineage .graph { overflow: visible; } .lineage svg { min-width: 0; } }
.lineage text { font-family: inherit; fill: var(--ink); }
.lineage .box { fill: var(--box); stroke: var(--rim); } .lineage .planned { stroke-dasharray: 5 4; }
.lineage .name { font-size: 14px; font-weight: 600; } .lineage .fact { font-size: 11.5px; fill: var(--faint); }
.lineage .edge { fill: none; stroke: var(--line); stroke-width: 1.4; } .lineage #tip { fill: var(--line); }
.lineage .role { font-size: 11px; fill: var(--faint); paint-order: stroke; stroke: var(--paper); stroke-width: 5px; }
.lineage .grey { fill: var(--grey); } .lineage .blue { fill: var(--blue); } .lineage .amber { fill: var(--amber); }
.lineage .green { fill: var(--green); } .lineage .purple { fill: var(--purple); }
.lineage .legend { color: var(--faint); margin: 0 0 20px; } .lineage .legend span { margin-right: 18px; }
.lineage .legend i { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 6px; }
"""
PAGE_STYLE = """
body { margin: 0; padding: 28px 32px; background: var(--paper); color: var(--ink);
  font: 14px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 20px; margin: 0 0 4px; }
table { border-collapse: collapse; width: 100%; } th, td { text-align: left; vertical-align: top;
  padding: 8px 14px 8px 0; border-top: 1px solid var(--rim); } th { color: var(--faint); font-weight: 500; border: 0; }
code { font: 12px ui-monospace, SFMono-Regular, Menlo, monospace; } td div { overflow-wrap: anywhere; }
"""


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
    heading = escape(title)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Lineage of {heading}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{PAGE_STYLE}</style></head>'
        f'<body class="lineage"><h1>Lineage of {heading}</h1>{drawing(rows)}{_table(rows)}</body></html>'
    )


def drawing(rows: Sequence[Row], domains: Sequence[str] | None = None) -> str:
    """The drawn graph with its legend and style, to be embedded in an element of the class `lineage`.

    Args:
        rows: The checkpoints, parents first (`flows.lineage.rows`).
        domains: The domains of the run's experts, for a checkpoint's mean; by default those of the experts drawn.
    """
    colours = dict.fromkeys(colour_of(row.stage) for row in rows)
    legend = "".join(f'<span><i style="background:var(--{c})"></i>{MEANINGS[c]}</span>' for c in colours)
    return f'<style>{DRAWING_STYLE}</style><p class="legend">{legend}</p><div class="graph">{_svg(rows, domains)}</div>'


def _svg(rows: Sequence[Row], asked: Sequence[str] | None) -> str:
    known = {row.key: row for row in rows}
    domains = expert_domains(rows) if asked is None else asked
    layers = _layers(rows)
    roles = _edges(rows)
    boxes = {key: _Place(layer, BOX_HEIGHT) for key, layer in layers.items()}
    lanes = {
        (parent, child): [_Place(layer, LANE_HEIGHT) for layer in range(layers[parent] + 1, layers[child])]
        for parent, child in roles
    }
    height = _stack(boxes, lanes)
    width = 2 * MARGIN + max(layers.values(), default=0) * (BOX_WIDTH + GAP_X) + BOX_WIDTH
    arrows = [_edge([boxes[p], *lanes[p, c], boxes[c]]) for p, c in roles]
    labels = [
        _role([boxes[p], *lanes[p, c], boxes[c]], names, at_child)
        for (p, c), names, at_child in _labelled(roles, {edge for edge, lane in lanes.items() if lane})
    ]
    drawn = [_box(known[key], place, domains) for key, place in boxes.items()]
    tip = (
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path id="tip" d="M0 0 8 4 0 8z"/></marker></defs>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" style="max-width:{width:.0f}px" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" role="img">{tip}{"".join([*arrows, *drawn, *labels])}</svg>'
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
    x, y = chain[0].left + BOX_WIDTH, chain[0].middle
    path = [f"M{x:.0f} {y:.1f}"]
    for place in chain[1:]:
        reach = place.left - (5 if place is chain[-1] else 0)
        half = (x + reach) / 2
        path.append(f"C{half:.0f} {y:.1f} {half:.0f} {place.middle:.1f} {reach:.0f} {place.middle:.1f}")
        x, y = place.left + BOX_WIDTH, place.middle
        if place is not chain[-1]:
            path.append(f"L{x:.0f} {y:.1f}")
    return f'<path class="edge" marker-end="url(#arrow)" d="{"".join(path)}"/>'


def _role(chain: Sequence[_Place], roles: Sequence[str], at_child: bool) -> str:
    """The roles as text: over the lane of a long edge; for a short one beside the box where fewer edges meet."""
    whole = ", ".join(roles)
    text = escape(_cut(whole, LINE_CHARACTERS if len(chain) > 2 else SHORT_EDGE_CHARACTERS))
    if len(chain) > 2:
        x, y, anchor = chain[1].left + 8, chain[1].middle - 5, "start"
    elif at_child:
        x, y, anchor = chain[1].left - 12, chain[1].middle - 7, "end"
    else:
        x, y, anchor = chain[0].left + BOX_WIDTH + 10, chain[0].middle - 7, "start"
    hint = f"<title>{escape(whole)}</title>"
    return f'<text class="role" text-anchor="{anchor}" x="{x:.0f}" y="{y:.1f}">{text}{hint}</text>'


def _box(row: Row, place: _Place, domains: Sequence[str]) -> str:
    lines = [f"{row.stage}, seed {row.seed}" + (f", {row.seconds:,.0f} s" if row.seconds else "")]
    lines.append(f"digest {row.digest[:SHORT]}" if row.made else "not made yet")
    if (mean := mean_score(row, domains)) is not None:
        lines.append(f"mean of experts' domains {100 * mean:.1f} %")
    texts = "".join(
        f'<text class="fact" x="{place.left + 16:.0f}" y="{place.y + 40 + 15 * index:.1f}">{escape(line)}</text>'
        for index, line in enumerate(lines)
    )
    hint = escape("\n".join([row.name, f"key {row.key}", *details(row)]))
    planned = "" if row.made else " planned"
    name = _cut(row.name, 2 * NAME_CHARACTERS)
    squeezed = f' textLength="{BOX_WIDTH - 28}" lengthAdjust="spacingAndGlyphs"' if len(name) > NAME_CHARACTERS else ""
    return (
        f"<g><title>{hint}</title>"
        f'<rect class="box{planned}" x="{place.left:.0f}" y="{place.y:.1f}" '
        f'width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="8"/>'
        f'<rect class="{colour_of(row.stage)}" x="{place.left:.0f}" y="{place.y + 8:.1f}" width="4" '
        f'height="{BOX_HEIGHT - 16}" rx="2"/>'
        f'<text class="name" x="{place.left + 16:.0f}" y="{place.y + 22:.1f}"{squeezed}>{escape(name)}</text>'
        f"{texts}</g>"
    )


def _table(rows: Sequence[Row]) -> str:
    names = {row.key: row.name for row in rows}
    body = []
    for row in reversed(rows):
        parents = "".join(
            f"<div>{escape(row.label(role))} ← {escape(names.get(key, key))}</div>" for role, key in row.parents.items()
        )
        facts = "".join(f"<div>{escape(line)}</div>" for line in details(row))
        body.append(
            f"<tr><td><b>{escape(row.name)}</b><div>{escape(row.stage)}, seed {row.seed}</div></td>"
            f"<td><code>{escape(row.digest[:SHORT] or '–')}</code></td><td><code>{escape(row.key)}</code></td>"
            f"<td>{parents or '–'}</td><td>{facts}</td></tr>"
        )
    return (
        "<table><tr><th>checkpoint</th><th>digest</th><th>content key</th><th>made from</th><th>how</th></tr>"
        f"{''.join(body)}</table>"
    )


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def draw_html(store: Store, keys: Sequence[str], title: str) -> str:
    """The lineage of these checkpoints as a complete page: a drawn graph and a table."""
    return page(rows(store, keys), title)
