"""What a run is likely to cost, from what earlier stages of its kind took. Torch-free."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from base.store.checkpoint import Artifact, Store
from flows.champion.costs import busy_seconds
from flows.engines.memory import origin
from flows.plan.graph import Node, StageGraph
from flows.run.progress import duration


@dataclass(frozen=True)
class Estimate:
    """What a node is likely to take.

    Attributes:
        node: Its id.
        seconds: Of the clock, on as many devices as before; None where nothing like it was made.
        tokens: Trained on; 0 for measurements.
        like: Key of the artifact the estimate is from; empty where there is none.
        device_seconds: Of all its devices together, of its process on a CPU.
        joules: Energy of its devices; None where the earlier stage could not tell.
    """

    node: str
    seconds: float | None
    tokens: int = 0
    like: str = ""
    device_seconds: float = 0.0
    joules: float | None = None


def estimate(graph: StageGraph, store: Store, missing: Sequence[Node]) -> list[Estimate]:
    """Scale the most similar finished stage by the work that is asked for.

    Similar is a stage of the same kind on a model of the same size, first one of the same name, then the newest.
    """
    made: dict[str, list[Artifact]] = {}
    sizes: dict[str, int] = {}
    for artifact in store.artifacts():
        made.setdefault(str(artifact.manifest.get("stage")), []).append(artifact)
        sizes[artifact.key] = int(artifact.manifest.get("parameters", 0))
    found = []
    for node in missing:
        size = sizes.get(origin(graph, node).key, 0)
        like = _most_similar(node, size, made.get(node.stage, ()), sizes)
        if like is None:
            found.append(Estimate(node.id, None))
            continue
        scale = work(node.config) / (work(like.manifest["config"]) or 1.0)
        found.append(_scaled(node.id, like, scale, _share(like, made[node.stage])))
    return found


def work(config: Mapping[str, Any]) -> float:
    """How much a stage's settings ask for, in units that only its own kind shares: samples, rows or tokens in all."""
    if "max_steps" not in config:
        return float(config.get("examples", 1) * (1 + config.get("samples", 0)))
    per_step = config.get("batch_tokens") or config.get("batch_size")
    if per_step is None:
        per_step = config.get("prompts_per_step", 1) * config.get("group_size", 1)
    return float(config["max_steps"] * per_step)


def summary(estimates: Sequence[Estimate]) -> list[str]:
    """The estimates in a line, for people; empty where nothing is to run."""
    if not estimates:
        return []
    known = [each for each in estimates if each.seconds is not None]
    unknown = [each.node for each in estimates if each.seconds is None]
    if not known:
        return [f"cost: nothing like these {len(unknown)} nodes was made before, so nothing is known of it"]
    seconds, tokens = sum(each.device_seconds for each in known), sum(each.tokens for each in known)
    told = [each.joules for each in known if each.joules is not None]
    energy = f", {sum(told):,.0f} J" if told else ""
    if told and len(told) < len(known):
        energy += f" (of {len(told)} of {len(known)} nodes)"
    line = f"cost: about {duration(seconds)} of device time{energy} and {tokens:,} tokens, from earlier stages of "
    line += "their kind"
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        line += f"; nothing like {', '.join(unknown[:3])}{more} was made before"
    return [line]


def _scaled(node: str, like: Artifact, scale: float, share: float) -> Estimate:
    """What an earlier stage took, by the work that is asked for."""
    manifest, factor = like.manifest, scale * share
    seconds, joules = float(manifest["seconds"]), manifest.get("joules")
    return Estimate(
        node,
        seconds=factor * seconds,
        tokens=int(scale * int(manifest.get("tokens", 0))),
        like=like.key,
        # Older manifests have seconds alone.
        device_seconds=factor * float(manifest.get("device_seconds", seconds)),
        joules=None if joules is None else factor * float(joules),
    )


def _share(artifact: Artifact, made: Sequence[Artifact]) -> float:
    """How much of what its manifest counts is its own: measurements of one checkpoint share a process, and each counts
    from the start of that."""
    parents, seconds = artifact.manifest.get("parents", {}), float(artifact.manifest["seconds"])
    if "checkpoint" not in parents or not seconds:
        return 1.0
    together = [each for each in made if each.manifest["parents"].get("checkpoint") == parents["checkpoint"]]
    return busy_seconds(together) / len(together) / seconds


def _most_similar(node: Node, size: int, made: Sequence[Artifact], sizes: Mapping[str, int]) -> Artifact | None:
    def rank(artifact: Artifact) -> tuple[bool, bool, float]:
        parents = artifact.manifest.get("parents", {})
        model = parents["checkpoint"]["key"] if "checkpoint" in parents else artifact.key
        same_size = not size or sizes.get(model, 0) in (0, size)
        return same_size, artifact.name == node.name, float(artifact.manifest["created"])

    best = max(made, key=rank, default=None)
    return best if best is not None and rank(best)[0] else None
