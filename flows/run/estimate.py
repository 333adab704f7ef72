"""Estimates the cost of a run from earlier stages of the same kind. Free of torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from base.store.checkpoint import Artifact, Store
from flows.champion.costs import busy_seconds
from flows.engines.shapes import origin
from flows.plan.nodes import Node, StageGraph
from flows.run.progress import duration


@dataclass(frozen=True)
class Estimate:
    """The estimated cost of a node.

    Attributes:
        node: Id of the node.
        seconds: Wall-clock seconds, on as many devices as before; None if no similar stage was made before.
        tokens: Tokens trained on; 0 for measurements.
        like: Key of the artifact the estimate is from; empty if there is none.
        device_seconds: Seconds of all its devices together, or of its process on a CPU.
        joules: Energy of its devices; None if the earlier stage could not measure it.
    """

    node: str
    seconds: float | None
    tokens: int = 0
    like: str = ""
    device_seconds: float = 0.0
    joules: float | None = None


def estimate(graph: StageGraph, store: Store, missing: Sequence[Node]) -> list[Estimate]:
    """Scale the cost of the most similar finished stage by the amount of work.

    Similar is a stage of the same kind on a model of the same size; among these one of the same name, then the newest.
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
    """The amount of work in a stage's settings: samples, rows or tokens in all. Comparable within one kind only."""
    if "max_steps" not in config:
        return float(config.get("examples", 1) * (1 + config.get("samples", 0)))
    per_step = config.get("batch_tokens") or config.get("batch_size")
    if per_step is None:
        per_step = config.get("prompts_per_step", 1) * config.get("group_size", 1)
    return float(config["max_steps"] * per_step)


def summary(estimates: Sequence[Estimate]) -> list[str]:
    """The estimates as one line of text; empty if nothing is to run."""
    if not estimates:
        return []
    known = [each for each in estimates if each.seconds is not None]
    unknown = [each.node for each in estimates if each.seconds is None]
    if not known:
        return [f"cost: unknown, because no nodes like these {len(unknown)} were made before"]
    seconds, tokens = sum(each.device_seconds for each in known), sum(each.tokens for each in known)
    measured = [each.joules for each in known if each.joules is not None]
    energy = f", {sum(measured):,.0f} J" if measured else ""
    if measured and len(measured) < len(known):
        energy += f" (of {len(measured)} of {len(known)} nodes)"
    line = f"cost: about {duration(seconds)} of device time{energy} and {tokens:,} tokens, from earlier stages of "
    line += "their kind"
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        line += f"; no nodes like {', '.join(unknown[:3])}{more} were made before"
    return [line]


def _scaled(node: str, like: Artifact, scale: float, share: float) -> Estimate:
    """The cost of an earlier stage, scaled by `scale` (relative work) and `share` (its part of its process)."""
    manifest, factor = like.manifest, scale * share
    seconds, joules = float(manifest["seconds"]), manifest.get("joules")
    return Estimate(
        node,
        seconds=factor * seconds,
        tokens=int(scale * int(manifest.get("tokens", 0))),
        like=like.key,
        device_seconds=factor * float(manifest["device_seconds"]),
        joules=None if joules is None else factor * float(joules),
    )


def _share(artifact: Artifact, made: Sequence[Artifact]) -> float:
    """The fraction of an artifact's recorded seconds that is its own.

    Measurements of one checkpoint share a process, and each records the seconds since the start of that process.
    """
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
