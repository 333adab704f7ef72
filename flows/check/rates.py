"""Warns of the lab's learning rates on a real model."""

from collections.abc import Iterator, Sequence

from base.store.checkpoint import Store
from flows.check.draws import config_key
from flows.engines.shapes import origin, shape_of
from flows.plan.nodes import Node, StageGraph
from stages.config.kinds import STAGES
from stages.config.training import OptimizerConfig

# The lab's models have less than a million parameters.
LARGE = 100_000_000


def rate_warnings(graph: StageGraph, store: Store, missing: Sequence[Node]) -> Iterator[str]:
    """Yield a line for each training node of a large model whose learning rate is the default of its stage."""
    found: dict[str, str] = {}
    for node in missing:
        kind = STAGES[node.stage]
        if not kind.trains or node.stage == "pretrain":
            continue
        # An `optimizer` without a rate has the one of all optimizers, not the stage's.
        lab = {kind.config().optimizer.learning_rate, OptimizerConfig().learning_rate}
        rate = node.config["optimizer"]["learning_rate"]
        if rate not in lab:
            continue
        parameters = shape_of(origin(graph, node), store).parameters
        if parameters > LARGE:
            key = f"{config_key(node)}.optimizer.learning_rate"
            found[key] = (
                f"{key}: {rate:g} is the lab's, for models of a hundred thousand parameters; this one has "
                f"{parameters / 1e6:,.0f} million. Public recipes take 1e-6 to 2e-5 in full and 4e-5 to 1e-4 with "
                f"adapters; flows/runs/qwen3_8b.yaml has some with their sources"
            )
    yield from found.values()
