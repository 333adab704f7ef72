"""Reads and writes a run's lock file, its last plan, and compares today's plan with it.

The lock holds every node's ingredients and the revisions that mutable names were pinned to.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from base.errors import UserError
from base.private import require_folder
from base.store.checkpoint import Artifact, Store, write_whole
from flows.plan.state_files import LOCK_FILE, read_json
from stages.config.kinds import STAGES
from stages.config.training import StrictModel

if TYPE_CHECKING:
    from flows.plan.nodes import Node, StageGraph


@dataclass(frozen=True)
class NodeStatus:
    """The state of a node in the plan.

    Attributes:
        artifact: Its artifact, when it is cached.
        why: Reason in words: `cached`, `never made`, or what changed since the last run of this name.
        code_changed: It is cached, but was made by other code than today's.
    """

    node: "Node"
    artifact: Artifact | None
    why: str
    code_changed: bool = False

    @property
    def cached(self) -> bool:
        """Whether its artifact exists, so that nothing has to run."""
        return self.artifact is not None


def status(graph: "StageGraph", store: Store, faults: list[str] | None = None) -> list[NodeStatus]:
    """The state of every node: whether it is cached or will run, and why.

    Args:
        graph: The run.
        store: Where its artifacts are.
        faults: See `read_lock`.
    """
    last = read_lock(store.home, graph.config.name, faults).get("nodes", {})
    answers = []
    rerun: set[str] = set()
    for node in graph.nodes:
        artifact = store.find(node.key)
        if artifact is not None:
            changed = artifact.manifest.get("code") != code_fingerprint()
            answers.append(NodeStatus(node, artifact, "cached, code changed since" if changed else "cached", changed))
            continue
        answers.append(NodeStatus(node, None, _reason(node, last.get(node.id), rerun)))
        rerun.add(node.id)
    return answers


def write_lock(graph: "StageGraph", home: Path) -> None:
    """Record this run's plan: every node's ingredients and the pinned revisions."""
    path = lock_path(home, graph.config.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    nodes = {node.id: {**node.ingredients, "key": node.key} for node in graph.nodes}
    write_whole(path, json.dumps({"pins": dict(graph.pins), "nodes": nodes}, indent=1, sort_keys=True))


def lock_path(home: Path, run: str) -> Path:
    """The path of a run's lock file."""
    return home / "runs" / run / LOCK_FILE


def read_lock(home: Path, run: str, faults: list[str] | None = None) -> dict[str, Any]:
    """The content of a run's lock; empty if there is none.

    Args:
        home: `$MOPD_HOME`.
        run: The run's name.
        faults: Receives the message of a damaged lock, which is then treated as empty; None to raise instead.

    Raises:
        UserError: the lock is damaged, and the message names it and the remedy; or the home is not a folder.
    """
    require_folder(home)
    try:
        return read_json(lock_path(home, run))
    except UserError as error:
        if faults is None:
            raise
        if str(error) not in faults:
            faults.append(str(error))
        return {}


@cache
def code_fingerprint() -> str:
    """Hash of the code that trains and scores: the sources of base, experts, stages and evals."""
    root = Path(__file__).resolve().parents[2]
    sha = hashlib.sha256()
    for package in ("base", "experts", "stages", "evals"):
        for path in sorted((root / package).rglob("*.py")):
            sha.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return sha.hexdigest()


def _reason(node: "Node", before: Mapping[str, Any] | None, rerun: set[str]) -> str:
    waiting = [parent for parent in dict.fromkeys(node.parents.values()) if parent in rerun]
    if before is None:
        return "never made"
    if before["key"] == node.key:
        return "not finished" if not waiting else f"waits for {', '.join(waiting)}"
    changes = _changes(before, node.ingredients)
    return "changed: " + "; ".join(changes[:3]) + ("; …" if len(changes) > 3 else "")


def _differences(before: Any, now: Any, path: str = "") -> list[str]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        found: list[str] = []
        for key in sorted({*before, *now} - {"key"}):
            where = f"{path}.{key}" if path else key
            found += _differences(before.get(key), now.get(key), where)
        return found
    if before == now:
        return []
    top = path.split(".", maxsplit=1)[0]
    if top in ("parents", "domains"):
        return [f"{top.removesuffix('s')} {path.removeprefix(top + '.')}"]
    return [f"{path.removeprefix('config.')} {before} → {now}"]


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The differences of two configs; a key left out at its default counts with that default."""
    schema = STAGES[now["stage"]].config
    if not (isinstance(schema, type) and issubclass(schema, StrictModel)):
        return _differences(before, now)
    try:
        whole = [schema.model_validate(ingredients["config"]).model_dump(mode="json") for ingredients in (before, now)]
    except (ValidationError, KeyError):  # written by another release, with keys that this one lacks
        return _differences(before, now)
    return _differences({**before, "config": whole[0]}, {**now, "config": whole[1]})
