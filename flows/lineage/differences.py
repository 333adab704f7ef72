"""Differences between two checkpoints: settings, data, code, parents, scores. Read from the store; torch-free.

Differing parents are compared too, down to the origin of the difference or to stages of different kinds.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from base.store.checkpoint import Artifact, Store
from flows.lineage.rows import SHORT
from stages.config.kinds import SCORINGS

if TYPE_CHECKING:
    from rich.table import Table

    from evals.statistics.interval import Interval

HASH_LENGTH = 64
COMPARED = ("stage", "seed", "config", "data", "packages", "code", "version", "world_size", "digest")


@dataclass(frozen=True)
class Difference:
    """One fact in which two checkpoints, or two of their ancestors, differ.

    Attributes:
        where: The roles that lead to the ancestor, such as `teacher/sort > start`; empty for the checkpoints.
        what: `stage`, `seed`, `config.KEY`, `data.DOMAIN`, `code`, `packages.NAME`, `parents.ROLE` or `digest`.
        a: The first checkpoint's value; None if it has none.
        b: The second checkpoint's value.
    """

    where: str
    what: str
    a: Any
    b: Any


@dataclass(frozen=True)
class ScoreDifference:
    """Two checkpoints on the same examples.

    Attributes:
        domain: The domain of the examples.
        split: `held_out` or `out_of_distribution`.
        a: Greedy accuracy of the first.
        b: Greedy accuracy of the second.
        difference: b - a with its paired interval; None if the examples differ.
    """

    domain: str
    split: str
    a: float
    b: float
    difference: "Interval | None"


def differences(store: Store, a: Artifact, b: Artifact) -> list[Difference]:
    """Compare two checkpoints and, where their parents differ, those too.

    Args:
        store: Where the ancestors are.
        a: One checkpoint.
        b: The other.

    Returns:
        The differences, the checkpoints' own first; empty for equal ones. A pair of ancestors is compared once.
    """
    found: list[Difference] = []
    seen: set[tuple[str, str]] = set()

    def compare(one: Artifact, other: Artifact, where: str) -> None:
        if one.key == other.key or (one.key, other.key) in seen:
            return
        seen.add((one.key, other.key))
        found.extend(Difference(where, *each) for each in _own(one.manifest, other.manifest))
        ours, theirs = one.manifest.get("parents", {}), other.manifest.get("parents", {})
        changed = {
            role: (ours.get(role), theirs.get(role))
            for role in dict.fromkeys([*ours, *theirs])
            if (ours.get(role) or {}).get("key") != (theirs.get(role) or {}).get("key")
        }
        for role, (left, right) in changed.items():
            found.append(Difference(where, f"parents.{role}", _name(left), _name(right)))
        for role, pair in changed.items():
            parents = [store.find(each["key"]) if each else None for each in pair]
            if parents[0] and parents[1] and one.manifest.get("stage") == other.manifest.get("stage"):
                compare(parents[0], parents[1], f"{where} > {role}" if where else role)

    compare(a, b, "")
    return found


def score_differences(store: Store, a: Artifact, b: Artifact) -> list[ScoreDifference]:
    """The scores of two checkpoints on every domain and split that both were evaluated on.

    Raises:
        UserError: a score sheet is malformed.
    """
    from evals.comparison.scores import read_scores
    from evals.statistics.intervals import paired_difference

    sheets: dict[str, dict[tuple[str, str], Artifact]] = {a.key: {}, b.key: {}}
    for artifact in store.artifacts():
        if artifact.manifest.get("stage") in SCORINGS:
            scored = artifact.manifest["parents"]["checkpoint"]["key"]
            if scored in sheets:
                config = artifact.manifest["config"]
                sheets[scored][config["domain"], config["split"]] = artifact
    found = []
    for domain, split in sorted(sheets[a.key].keys() & sheets[b.key].keys()):
        ours, theirs = (read_scores(sheets[key][domain, split].path, domain, split) for key in (a.key, b.key))
        means = float(ours.greedy_N.mean()), float(theirs.greedy_N.mean())
        paired = ours.ids == theirs.ids
        interval = paired_difference(theirs.greedy_G, ours.greedy_G) if paired else None
        found.append(ScoreDifference(domain, split, *means, interval))
    return found


def as_mapping(a: Artifact, b: Artifact, store: Store) -> dict[str, Any]:
    """Both comparisons for programs."""
    return {
        "a": {"name": a.name, "key": a.key, "digest": a.digest},
        "b": {"name": b.name, "key": b.key, "digest": b.digest},
        "differences": [dataclasses.asdict(each) for each in differences(store, a, b)],
        "scores": [dataclasses.asdict(each) for each in score_differences(store, a, b)],
    }


def as_lines(a: Artifact, b: Artifact, store: Store) -> list[str]:
    """The differences as text: a line for each fact, under the ancestor it belongs to."""
    lines, shown = [f"a: {_name(a.manifest)}", f"b: {_name(b.manifest)}"], None
    for each in differences(store, a, b):
        if each.where != shown:
            shown = each.where
            lines.append(f"{shown or 'the checkpoints themselves'}:")
        lines.append(f"  {each.what}: {_shown(each.a)} → {_shown(each.b)}")
    return lines


def score_table(a: Artifact, b: Artifact, store: Store) -> "Table | None":
    """The scores side by side, b - a with its interval; None if they share no scores."""
    from rich.table import Table

    table = Table("domain", "split", "a", "b", "b - a", title="greedy scores", title_justify="left")
    for each in score_differences(store, a, b):
        shown = "other examples"
        if interval := each.difference:
            shown = f"{100 * interval.mean:+.1f} [{100 * interval.low:+.1f}, {100 * interval.high:+.1f}] points"
        table.add_row(each.domain, each.split.replace("_", " "), f"{each.a:.1%}", f"{each.b:.1%}", shown)
    return table if table.row_count else None


def _own(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    # Settings of two kinds of stage cannot be compared.
    compared = COMPARED if a.get("stage") == b.get("stage") else ("stage", "seed", "data", "digest")
    return [each for name in compared for each in _leaves(a.get(name), b.get(name), name)]


def _leaves(a: Any, b: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    """The differences of two values, down to the innermost keys."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in dict.fromkeys([*a, *b]):
            yield from _leaves(a.get(key), b.get(key), f"{path}.{key}")
    elif a != b:
        yield path, a, b


def _name(parent: Mapping[str, Any] | None) -> str | None:
    return f"{parent['name']} (key {parent['key'][:SHORT]})" if parent else None


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    text = value if isinstance(value, str) else json.dumps(value)
    return f"{text[:SHORT]}…" if len(text) == HASH_LENGTH else text
