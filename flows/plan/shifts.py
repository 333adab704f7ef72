"""The nodes that measure checkpoints' shifts from the run's start, and their results in the store. Free of torch.

Every checkpoint trained here has a node `shift`, except the start and its ancestors. The experts trained from the start
share one node `cosines` per seed.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from base.store.checkpoint import Artifact, Store
from evals.comparison.shift_sheet import read_cosines, read_shift
from flows.run_file.evaluation import EvaluateConfig
from flows.run_file.schema import BASE
from stages.config.kinds import DISTANCES
from stages.config.shift import ShiftRequest

if TYPE_CHECKING:
    from flows.plan.nodes import Node, StageGraph

SHIFT, COSINES = "shift", "cosines"
# The samples do not depend on the seed of the training.
SEED = 0


def shift_request(evaluate: EvaluateConfig) -> ShiftRequest | None:
    """The nodes' config; None if the run file disables them."""
    asked = evaluate.shift
    if asked is None:
        return None
    return ShiftRequest(
        examples=min(asked.examples, evaluate.examples),
        temperature=asked.temperature,
        max_new_tokens=evaluate.max_new_tokens,
        batch_size=evaluate.batch_size,
        dtype=evaluate.dtype,
        float32_matmul=evaluate.float32_matmul,
    )


def shift_nodes(
    request: ShiftRequest,
    nodes: Mapping[str, "Node"],
    made: Mapping[str, list[str]],
    start: str,
    expert_start: str,
    seed: int,
) -> Iterator[dict[str, Any]]:
    """The nodes of one seed, as arguments of the plan's own addition of a node.

    Args:
        request: The settings of the measurement.
        nodes: The graph so far, by id.
        made: Ids of the seed's checkpoints -> the domains on which each is measured.
        start: Id of the run's start.
        expert_start: Id of the experts' start, for their task vectors: the run's, or the previous round's student.
        seed: A seed of the run.
    """
    trained = [nodes[i] for i in made if _descends(nodes, i, start) and i != start and nodes[i].name != BASE]
    full = request.model_dump(mode="json")
    for node in trained:
        name = f"{SHIFT}/{node.name}"
        yield {
            "node_id": f"{name}@{seed}",
            "name": name,
            "stage": SHIFT,
            "seed": SEED,
            "config": full,
            "facts": {"config": request.key_fields()},
            "parents": {"start": start, "checkpoint": node.id},
            "domains": made[node.id],
        }
    experts = [
        node for node in trained if node.name.startswith("experts/") and node.parents.get("start") == expert_start
    ]
    if len(experts) >= 2:
        yield {
            "node_id": f"{COSINES}@{seed}",
            "name": COSINES,
            "stage": COSINES,
            "seed": SEED,
            "config": {},
            "facts": {},
            "parents": {"start": expert_start} | {f"expert/{node.name.partition('/')[2]}": node.id for node in experts},
            "domains": [],
        }


def _descends(nodes: Mapping[str, "Node"], node_id: str, start: str) -> bool:
    """Whether a checkpoint descends from the start's origin by training here, so that the two can be compared."""
    return nodes[node_id].stage != "load" and _origin(nodes, node_id) == _origin(nodes, start)


def _origin(nodes: Mapping[str, "Node"], node_id: str) -> str:
    while parent := nodes[node_id].parents.get("start"):
        node_id = parent
    return node_id


@dataclass
class Shifts:
    """The finished measurements, in the form of `evals.comparison.results.Results`.

    Attributes:
        values: (checkpoint, measure, domain or "") -> seed -> value.
        kl_examples: (checkpoint, domain) -> seed -> values by independent example whose mean is `kl_start`.
        cosines: (expert, another) -> seed -> cosine.
        provenance: Content key and digest by node id.
    """

    values: dict[tuple[str, str, str], dict[int, float]] = field(default_factory=dict)
    kl_examples: dict[tuple[str, str], dict[int, np.ndarray]] = field(default_factory=dict)
    cosines: dict[tuple[str, str], dict[int, float]] = field(default_factory=dict)
    provenance: dict[str, tuple[str, str]] = field(default_factory=dict)


def collect_shifts(graph: "StageGraph", store: Store) -> Shifts:
    """Read every finished node; unfinished ones are absent.

    Raises:
        UserError: a sheet is malformed.
    """
    found = Shifts()
    for node in graph.nodes:
        if node.stage in DISTANCES and (artifact := store.find(node.key)):
            seed = int(node.id.rpartition("@")[2])
            found.provenance[node.id] = (artifact.key, artifact.digest)
            if node.stage == SHIFT:
                _take_shift(found, node.name.partition("/")[2], seed, artifact)
            else:
                for pair, value in read_cosines(artifact.path).values().items():
                    found.cosines.setdefault(pair, {})[seed] = value
    return found


def _take_shift(found: Shifts, name: str, seed: int, artifact: Artifact) -> None:
    sheet = read_shift(artifact.path)
    for key, value in sheet.values().items():
        found.values.setdefault((name, *key), {})[seed] = value
    for domain, part in sheet.domains.items():
        found.kl_examples.setdefault((name, domain), {})[seed] = part.kl_start_G
