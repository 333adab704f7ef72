"""`champion` as a start or a teacher: the run's champion, resolved once and pinned, as a node of the graph. Torch-free.

A merge that starts from the champion, with the champion or the old experts as teachers of their domains, costs only the
new expert and a short merge. The name is mutable, so the lock file pins the checkpoint that was champion when the run
was first planned with it; `mopd repin` updates the pin.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from base.errors import UserError
from base.store.checkpoint import Artifact, Store
from flows.run_file.schema import CHAMPION, STUDENT, RunConfig
from stages.config.roles import is_teacher

if TYPE_CHECKING:
    from flows.plan.nodes import Node, StageGraph


def names_champion(config: RunConfig) -> str | None:
    """The first key of a run file with the value `champion`; None if there is none."""
    for name, expert in config.experts.items():
        if expert.start_from == CHAMPION:
            return f"experts.{name}.start_from"
    merge = config.merge
    if merge is None:
        return None
    if merge.start_from == CHAMPION:
        return "merge.start_from"
    if merge.fallback_teacher == CHAMPION:
        return "merge.fallback_teacher"
    taught = (domain for domain, weights in (merge.teachers or {}).items() if CHAMPION in weights)
    return next((f"merge.teachers.{domain}" for domain in taught), None)


def pinned_champion(config: RunConfig, home: Path, key: str, pins: Mapping[str, str]) -> Artifact:
    """The champion this run is pinned to, or today's.

    Args:
        config: The run.
        home: `$MOPD_HOME`.
        key: The key of the run file that needs it; errors name it.
        pins: The pins in the run's lock.

    Raises:
        UserError: the run has no champion yet, or its checkpoint is no longer in the store.
    """
    from flows.plan.champion_history import read_history

    store = Store(home)
    pinned = pins.get(CHAMPION)
    if pinned is None:
        history = read_history(store, config.name)
        if not history:
            raise UserError(
                f"{key}: run '{config.name}' has no champion in {home} yet; first run it from cold_start or base; "
                f"then the gate or `mopd promote` sets one"
            )
        pinned = history[-1].student
    artifact = store.find(pinned)
    if artifact is None:
        raise UserError(f"{key}: the champion {pinned} is no longer in {store.root}; `mopd repin` pins the present one")
    return artifact


def champion_facts(artifact: Artifact, store: Store, start: tuple[str, str]) -> dict[str, Any]:
    """The node of a champion: its own key, and the run's start as its parent if it was made from that.

    Args:
        artifact: The champion.
        store: Where its ancestors are.
        start: Node id and content key of the run's start.

    Returns:
        Arguments of `flows.plan.nodes.Node`.
    """
    manifest = artifact.manifest
    parents = {role: parent["key"] for role, parent in manifest.get("parents", {}).items()}
    stage, seed, config = str(manifest["stage"]), int(manifest.get("seed", 0)), manifest.get("config", {})
    facts = {"stage": stage, "seed": seed, "config": config, "parents": parents, "domains": manifest.get("data", {})}
    return {
        "id": CHAMPION,
        "name": CHAMPION,
        "stage": stage,
        "seed": seed,
        "config": config,
        "parents": {"start": start[0]} if _descends(artifact, store, start[1]) else {},
        "domains": {},
        "ingredients": facts,
        "key": artifact.key,
    }


def _descends(artifact: Artifact | None, store: Store, start: str) -> bool:
    """Whether a checkpoint's chain of starts leads to another."""
    while artifact is not None and artifact.key != start:
        artifact = _started_from(artifact, store)
    return artifact is not None


def pin_note(graph: "StageGraph", store: Store) -> list[str]:
    """A line if the run is pinned to a former champion; else empty."""
    from flows.plan.champion_history import read_history

    pinned, history = graph.pins.get(CHAMPION), read_history(store, graph.config.name)
    if pinned is None or not history or history[-1].student == pinned:
        return []
    return [f"champion: pinned to {pinned}; today's is {history[-1]}. `mopd repin` moves the run to it."]


def savings(graph: "StageGraph", store: Store) -> list[str]:
    """The cost of an incremental merge beside that of the newest full one from the same start; empty for other runs."""
    merge = graph.config.merge
    if merge is None or merge.start_from != CHAMPION:
        return []
    student = next((store.find(node.key) for node in graph.checkpoints if node.name == STUDENT), None)
    full = _full_merge(store.find(graph.node(CHAMPION).key), store)
    if student is None or full is None:
        return []
    costs = [f"{found.manifest['seconds']:,.0f} s and {found.manifest['tokens']:,} tokens" for found in (student, full)]
    reused = [node for node in graph.checkpoints if node.name.startswith("experts/") and not _new(node, student, store)]
    kept = sum(float(artifact.manifest["seconds"]) for node in reused if (artifact := store.find(node.key)))
    return [
        f"merged from the champion: {costs[0]}; the last full merge, of {_teachers(full)} teachers, took {costs[1]}; "
        f"{len(reused)} experts made before that champion were reused ({kept:,.0f} s)"
    ]


def _full_merge(artifact: Artifact | None, store: Store) -> Artifact | None:
    """The newest student made from the start with which a champion's chain of merges began."""
    head = None
    while artifact is not None and artifact.manifest.get("stage") == "distill":
        head = artifact
        artifact = _started_from(artifact, store)
    if head is None:
        return None
    alike = [each for each in store.artifacts() if each.name == head.name and _start_key(each) == _start_key(head)]
    return max(alike, key=lambda each: float(each.manifest["created"]), default=head)


def _start_key(artifact: Artifact) -> str | None:
    """Content key of a checkpoint's start; None if it has none."""
    key: str | None = artifact.manifest.get("parents", {}).get("start", {}).get("key")
    return key


def _started_from(artifact: Artifact, store: Store) -> Artifact | None:
    """A checkpoint's start; None if it has none, or it is no longer in the store."""
    key = _start_key(artifact)
    return store.find(key) if key else None


def _teachers(artifact: Artifact) -> int:
    """The number of its teachers."""
    parents = artifact.manifest.get("parents", {})
    return len({parent["key"] for role, parent in parents.items() if is_teacher(role)})


def _new(node: "Node", student: Artifact, store: Store) -> bool:
    """Whether an expert was made after the champion that the student starts from."""
    champion = _started_from(student, store)
    expert = store.find(node.key)
    return bool(champion and expert and expert.manifest["created"] > champion.manifest["created"])
