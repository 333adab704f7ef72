"""A lineage as a Mermaid flowchart, for a README, a wiki or a notebook: from the base to the student."""

from collections.abc import Sequence

from flows.lineage.rows import SHORT, Row
from stages.config.kinds import colour_of

CLASSES = {
    "grey": "fill:#f2f4f7,stroke:#667085,color:#1d2430",
    "blue": "fill:#dbeafe,stroke:#2563eb,color:#1d2430",
    "amber": "fill:#fef3c7,stroke:#d97706,color:#1d2430",
    "green": "fill:#d1fae5,stroke:#059669,color:#1d2430",
    "purple": "fill:#ede9fe,stroke:#7c3aed,color:#1d2430",
}


def mermaid(rows: Sequence[Row]) -> str:
    """The flowchart's text.

    Args:
        rows: The checkpoints, parents first (`flows.lineage.rows`).
    """
    ids = {row.key: f"n{number}" for number, row in enumerate(rows)}
    lines = ["flowchart LR"]
    used = dict.fromkeys(colour_of(row.stage) for row in rows)
    for row in rows:
        lines.append(f'  {ids[row.key]}["{_box(row)}"]:::{colour_of(row.stage)}')
    for row in rows:
        roles: dict[str, list[str]] = {}
        for role, parent in row.parents.items():
            if parent in ids:
                roles.setdefault(parent, []).append(row.label(role))
        lines += [
            f'  {ids[parent]} -- "{_text(", ".join(names))}" --> {ids[row.key]}' for parent, names in roles.items()
        ]
    lines += [f"  classDef {colour} {CLASSES[colour]}" for colour in used]
    return "\n".join(lines)


def _box(row: Row) -> str:
    facts = [f"<b>{_text(row.name)}</b>", f"{_text(row.stage)}, seed {row.seed}"]
    facts.append(f"digest {row.digest[:SHORT]}" if row.made else "not made yet")
    held_out = {
        name.removesuffix("/held_out"): score for name, score in row.scores.items() if name.endswith("/held_out")
    }
    facts += [f"{_text(domain)} {score:.1%}" for domain, score in sorted(held_out.items())]
    return "<br/>".join(facts)


def _text(text: str) -> str:
    """Plain text inside a quoted label."""
    escaped = " ".join(text.split()).replace("&", "&amp;").replace('"', "#quot;")
    # A line of backticks would end the chart's block in a Markdown page.
    return escaped.replace("<", "&lt;").replace(">", "&gt;").replace("`", "#96;")
