"""The lineage of checkpoints, read from the store's manifests, and its tree for the terminal.

Free of torch and mlflow, so that `mopd lineage` responds at once and needs no server.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from base.errors import UserError, nearest
from base.store.checkpoint import Artifact, Store
from base.store.mirror import MANIFEST
from experts.domain import HELD_OUT
from flows.lineage import descriptions
from flows.plan.lock import lock_path
from flows.plan.state_files import read_json
from flows.run_file.schema import CHAMPION, STUDENT
from stages.config.kinds import EVALUATIONS, STAGES
from stages.config.roles import is_teacher, taught_domain, teacher_role

if TYPE_CHECKING:
    from rich.tree import Tree

logger = logging.getLogger(__name__)
# The metrics of a stage that summarise its outcome.
OUTCOME_METRICS = {f"{kind.name}/{kind.metric}" for kind in STAGES.values() if kind.metric}
SHORT = 12
SHORTEST_KEY = 4
# The most important settings of a stage; the rest is in the manifest.
HIGHLIGHTS = ("max_steps", "batch_size", "prompts_per_step", "group_size", "optimizer.learning_rate", "objective.type")


@dataclass(frozen=True)
class Row:
    """One checkpoint of a lineage.

    Attributes:
        key: Content key.
        name: The node's name: `base`, `cold_start`, `experts/NAME`, `student`.
        stage: The stage that made it.
        seed: Its seed.
        parents: role -> key.
        made: Whether the artifact is in the store; if not, the attributes below are empty.
        digest: Digest of the files.
        highlights: The most important settings.
        tokens: Tokens trained on; 0 when not recorded.
        seconds: Time it took.
        device_seconds: Time of all its devices together; 0 where it is not recorded.
        joules: Energy its devices used; 0 where it is not recorded.
        code: Fingerprint of the code that made it.
        sample: Where a sample of its data can be read: a file of the store, or of its mirror, and the key in it.
        data: domain -> fingerprint.
        metrics: Final metrics of the stage.
        scores: `domain/split` -> greedy accuracy, of the evaluations in the store.
        weights: role -> weight, of the teachers that share a domain.
        config: All settings in the manifest.
        teachers: The manifest's entries of a student's teachers by domain; empty for other checkpoints.
    """

    key: str
    name: str
    stage: str
    seed: int
    parents: Mapping[str, str]
    made: bool = False
    digest: str = ""
    highlights: Mapping[str, Any] = field(default_factory=dict)
    tokens: int = 0
    seconds: float = 0.0
    device_seconds: float = 0.0
    joules: float = 0.0
    code: str = ""
    sample: str = ""
    data: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    teachers: Sequence[Mapping[str, Any]] = ()

    def label(self, role: str) -> str:
        """A parent's role for display: for one of a domain's several teachers, the weight replaces the name."""
        return f"{role.rpartition('/')[0]} × {self.weights[role]:.2g}" if role in self.weights else role


def resolve(store: Store, reference: str) -> list[str]:
    """The content keys that a reference stands for.

    Args:
        store: The artifact store.
        reference: A run's name (its students, one for each seed), a node such as `lab:experts/sort` (one for each
            seed) or `lab:experts/sort@0`, `lab:champion`, or a content key or the start of one.

    Returns:
        Content keys.

    Raises:
        UserError: nothing has this name, or several keys begin with it.
    """
    runs = sorted(path.parent.name for path in (store.home / "runs").glob("*/lock.json"))
    run, _, node_id = reference.partition(":")
    if run in runs:
        nodes = _lock_nodes(store.home, run)
        if not node_id:
            return _ends(nodes)
        checkpoints = {name: facts["key"] for name, facts in nodes.items() if facts["stage"] not in EVALUATIONS}
        if node_id == CHAMPION:
            return [_champion(store, run)]
        if seeds := [key for name, key in checkpoints.items() if name.partition("@")[0] == node_id]:
            return seeds
        if node_id not in checkpoints:
            raise UserError(f"{reference}: run '{run}' has no checkpoint '{node_id}'{nearest(node_id, checkpoints)}")
        return [checkpoints[node_id]]
    keys = [a.key for a in store.artifacts() if len(run) >= SHORTEST_KEY and a.key.startswith(run)]
    if len(keys) > 1:
        raise UserError(f"{reference}: {len(keys)} content keys begin with this: {', '.join(keys)}")
    if not keys:
        raise UserError(f"{reference}: there is no run in {store.home} or content key of this name{nearest(run, runs)}")
    return keys


def resolve_one(store: Store, reference: str) -> Artifact:
    """The one checkpoint that a reference stands for.

    Raises:
        UserError: as `resolve`; or there are several checkpoints, or it is not made yet.
    """
    keys = resolve(store, reference)
    if len(keys) > 1:
        found = ", ".join(
            f"{key} (seed {artifact.manifest.get('seed')})" for key in keys if (artifact := store.find(key))
        )
        crown = "" if ":" in reference else f", or {reference}:{CHAMPION}"
        raise UserError(
            f"{reference}: stands for {len(keys)} checkpoints; name one of {found or ', '.join(keys)}{crown}"
        )
    artifact = store.find(keys[0])
    if artifact is None:
        raise UserError(f"{reference}: not made yet; `mopd run` makes it")
    return artifact


def rows(store: Store, keys: Sequence[str]) -> list[Row]:
    """The checkpoints with these keys and all their ancestors, parents first.

    An ancestor that is in no lock file and no longer in the store is left out.
    """
    planned = _planned(store.home)
    scores = _scores(store)
    found: dict[str, Row] = {}

    def visit(key: str) -> None:
        if key in found:
            return
        row = _row(store, key, planned.get(key), scores.get(key, {}))
        if row is None:
            return
        for parent in row.parents.values():
            visit(parent)
        found[key] = row

    for key in keys:
        visit(key)
    return list(found.values())


def expert_domains(rows: Sequence[Row]) -> tuple[str, ...]:
    """Domains that an expert among these checkpoints was trained on, or teaches if it was trained elsewhere."""
    experts = {row.key for row in rows if "experts/" in row.name}
    own = [domain for row in rows if row.key in experts for domain in row.data]
    # In a merge of weights the parents' roles have the expert's name, in a distillation the domain's.
    taught = [
        taught_domain(role)
        for row in rows
        if row.stage == "distill"
        for role, parent in row.parents.items()
        if is_teacher(role) and parent in experts
    ]
    return tuple(dict.fromkeys([*own, *taught]))


def mean_score(row: Row, domains: Sequence[str]) -> float | None:
    """A checkpoint's mean held-out greedy score over the experts' domains, as in every table of its run.

    Returns:
        The mean; None unless it was scored on each of them.
    """
    found = [row.scores.get(f"{domain}/{HELD_OUT}") for domain in domains]
    scored = [score for score in found if score is not None]
    return fmean(scored) if scored and len(scored) == len(found) else None


def tree(store: Store, reference: str) -> "Tree":
    """The lineage as a tree: from the student to each teacher, the cold start and the base.

    A shared ancestor is printed in full once, then only by name.

    Raises:
        UserError: as `resolve`.
    """
    from rich.tree import Tree

    keys = resolve(store, reference)
    known = {row.key: row for row in rows(store, keys)}
    printed: set[str] = set()

    def grow(branch: "Tree", key: str, role: str) -> None:
        """Add a checkpoint and its ancestors."""
        row = known.get(key)
        if row is None:
            branch.add(f"{role}[dim]{key}: no longer in the store[/dim]")
            return
        if key in printed:
            branch.add(f"{role}[bold]{row.name}[/bold] [dim]{row.key[:SHORT]}, see above[/dim]")
            return
        printed.add(key)
        twig = branch.add(role + _headline(row))
        for line in details(row):
            twig.add(f"[dim]{line}[/dim]")
        for parent_role, parent in sorted(row.parents.items(), key=lambda item: item[0] == "start"):
            grow(twig, parent, f"[cyan]{row.label(parent_role)}[/cyan] ← ")

    root = Tree(f"[bold]{reference}[/bold]")
    for key in keys:
        grow(root, key, "")
    return root


def details(row: Row) -> list[str]:
    """The facts about a checkpoint, a line for each kind."""
    if not row.made:
        return ["not made yet"]
    facts = [f"{name.rpartition('.')[2]} {value}" for name, value in row.highlights.items()]
    facts += [f"{row.tokens:,} tokens"] if row.tokens else []
    facts += [f"{row.seconds:,.0f} s"] if row.seconds else []
    facts += [f"{row.device_seconds:,.0f} device-seconds"] if row.device_seconds else []
    facts += [f"{row.joules:,.0f} J"] if row.joules else []
    facts += [f"code {row.code[:SHORT]}"] if row.code else []
    lines = [", ".join(facts)] if facts else []
    lines += [f"taught {entry['domain']}: {descriptions.lesson(entry)}" for entry in row.teachers]
    outcome = {name.partition("/")[2]: v for name, v in row.metrics.items() if name in OUTCOME_METRICS}
    for title, values in (("data", row.data), ("last step", outcome), ("greedy", dict(sorted(row.scores.items())))):
        if values:
            shown = (v[:SHORT] if isinstance(v, str) else f"{v:.4g}" for v in values.values())
            lines.append(f"{title}: " + ", ".join(f"{name} {text}" for name, text in zip(values, shown, strict=True)))
    return [*lines, f"some of the data: {row.sample}"] if row.sample else lines


def _champion(store: Store, run: str) -> str:
    from flows.plan.champion_history import read_history

    history = read_history(store, run)
    if not history:
        raise UserError(f"{run}:{CHAMPION}: run '{run}' has no champion yet")
    return history[-1].student


def _headline(row: Row) -> str:
    identity = f"digest {row.digest[:SHORT]}, key {row.key[:SHORT]}" if row.made else f"key {row.key[:SHORT]}"
    return f"[bold]{row.name}[/bold] ({row.stage}, seed {row.seed}) [dim]{identity}[/dim]"


def _row(store: Store, key: str, planned: Mapping[str, Any] | None, scores: Mapping[str, float]) -> Row | None:
    artifact = store.find(key)
    if artifact is None:
        if planned is None:
            return None
        weights = _weights(planned.get("config", {}))
        return Row(key, planned["name"], planned["stage"], planned["seed"], planned["parents"], weights=weights)
    manifest = artifact.manifest
    return Row(
        key=key,
        name=artifact.name,
        stage=str(manifest.get("stage", "?")),
        seed=int(manifest.get("seed", 0)),
        parents={role: parent["key"] for role, parent in manifest.get("parents", {}).items()},
        made=True,
        digest=artifact.digest,
        highlights=_highlights(manifest.get("config", {})),
        tokens=int(manifest.get("tokens", 0)),
        seconds=float(manifest.get("seconds", 0.0)),
        device_seconds=float(manifest.get("device_seconds", 0.0)),
        joules=float(manifest.get("joules", 0.0)),
        code=str(manifest.get("code", "")),
        sample=f"{key}/{MANIFEST}: examples" if manifest.get("examples") else "",
        data=manifest.get("data", {}),
        metrics=manifest.get("metrics", {}),
        scores=scores,
        weights=_weights(manifest.get("config", {})),
        config=manifest.get("config", {}),
        teachers=manifest.get("teachers", ()),
    )


def _weights(config: Mapping[str, Any]) -> dict[str, float]:
    shared = config.get("teacher_weights", {})
    return {teacher_role(domain, name): w for domain, weights in shared.items() for name, w in weights.items()}


def _highlights(config: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in HIGHLIGHTS:
        value: Any = config
        for part in path.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None:
            found[path] = value
    return found


def _scores(store: Store) -> dict[str, dict[str, float]]:
    """checkpoint key -> `domain/split` -> greedy accuracy."""
    found: dict[str, dict[str, float]] = {}
    for artifact in store.artifacts():
        manifest = artifact.manifest
        if manifest.get("stage") in EVALUATIONS and "greedy" in manifest["metrics"]:
            config = manifest["config"]
            scored = found.setdefault(manifest["parents"]["checkpoint"]["key"], {})
            scored[f"{config['domain']}/{config['split']}"] = manifest["metrics"]["greedy"]
    return found


def _planned(home: Path) -> dict[str, dict[str, Any]]:
    """Every checkpoint that some run has planned, by key."""
    found = {}
    for path in (home / "runs").glob("*/lock.json"):
        try:
            nodes = _lock_nodes(home, path.parent.name)
        except UserError as error:
            logger.warning("%s", error)
            continue
        for node_id, facts in nodes.items():
            found[facts["key"]] = facts | {"name": node_id.partition("@")[0]}
    return found


def _lock_nodes(home: Path, run: str) -> dict[str, dict[str, Any]]:
    nodes: dict[str, dict[str, Any]] = read_json(lock_path(home, run)).get("nodes", {})
    return nodes


def _ends(nodes: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The students of a run; without a merge, the checkpoints without descendants."""
    checkpoints = {node_id: facts for node_id, facts in nodes.items() if facts["stage"] not in EVALUATIONS}
    students = [facts["key"] for node_id, facts in checkpoints.items() if node_id.partition("@")[0] == STUDENT]
    used = {parent for facts in checkpoints.values() for parent in facts["parents"].values()}
    return students or [facts["key"] for facts in checkpoints.values() if facts["key"] not in used]
