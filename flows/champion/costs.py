"""Costs of the evaluations of a run's checkpoints, read from the store. Free of torch, prefect and mlflow."""

from collections.abc import Iterable
from statistics import fmean

from base.store.checkpoint import Artifact, Store
from evals.comparison.results import Cost, Results
from flows.plan.nodes import StageGraph
from stages.config.kinds import EVALUATIONS


def scoring_costs(graph: StageGraph, store: Store, results: Results) -> dict[str, Cost]:
    """Node name -> cost of all measurements of a checkpoint together, a mean over seeds.

    Tokens are those of all completions in the score sheets.

    Args:
        graph: The run.
        store: Where its artifacts are.
        results: The run's score sheets.
    """
    spent: dict[str, list[Cost]] = {}
    for checkpoint in graph.checkpoints:
        measured = [
            node
            for node in graph.nodes
            if node.stage in EVALUATIONS and node.parents.get("checkpoint") == checkpoint.id
        ]
        made = [found for node in measured if (found := store.find(node.key))]
        if made:
            memory = max(float(artifact.manifest.get("peak_memory", 0)) for artifact in made)
            tokens = _tokens(results, checkpoint.name, checkpoint.seed)
            spent.setdefault(checkpoint.name, []).append(Cost(tokens, busy_seconds(made), memory))
    return {
        name: Cost(fmean(c.tokens for c in costs), fmean(c.seconds for c in costs), max(c.memory for c in costs))
        for name, costs in spent.items()
    }


def busy_seconds(artifacts: Iterable[Artifact]) -> float:
    """Seconds in which at least one of the artifacts was being made.

    Several evaluations of a checkpoint share a process, and the `seconds` of each count from the start of that process,
    so their sum would count the first ones repeatedly.
    """
    total, reached = 0.0, 0.0
    spans = [(a.manifest["created"] - float(a.manifest.get("seconds", 0)), a.manifest["created"]) for a in artifacts]
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _tokens(results: Results, name: str, seed: int) -> int:
    sheets = [cell[seed] for (checkpoint, *_), cell in results.cells.items() if checkpoint == name and seed in cell]
    return sum(drawn["tokens"] for sheet in sheets for row in sheet.rows for drawn in (row["greedy"], *row["samples"]))
