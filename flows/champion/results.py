"""The finished evaluations of a run's graph, read from the store into `Results`. Free of torch, prefect and mlflow."""

from collections.abc import Sequence
from dataclasses import fields
from statistics import fmean

from base.store.checkpoint import Store
from evals.comparison.results import Cost, Expert, Results
from evals.comparison.scores import Scores, read_scores
from flows.plan.nodes import Node, StageGraph
from flows.plan.shifts import collect_shifts
from flows.run_file.schema import BASE, CHAMPION, COLD_START, RunConfig


def collect(graph: StageGraph, store: Store) -> Results:
    """Read every finished evaluation of the graph; unfinished ones are absent.

    A checkpoint shared by all seeds (an imported base) has one sheet, which counts for each seed.

    Raises:
        UserError: a score sheet is malformed, or checkpoints were scored on different examples.
    """
    config = graph.config
    cells: dict[tuple[str, str, str], dict[int, Scores]] = {}
    provenance: dict[str, tuple[str, str]] = {}
    for checkpoint in graph.checkpoints:
        seeds = config.seeds if checkpoint.id == checkpoint.name else [_seed(checkpoint)]
        for node in graph.evaluations(checkpoint.id):
            artifact = store.find(node.key)
            if artifact is None:
                continue
            domain, split = str(node.config["domain"]), str(node.config["split"])
            sheet = read_scores(artifact.path, domain, split)
            cells.setdefault((checkpoint.name, domain, split), {}).update(dict.fromkeys(seeds, sheet))
            provenance[node.id] = (artifact.key, artifact.digest)
    spent = _spent(graph, store)
    shifts = collect_shifts(graph, store)
    return Results(
        run=config.name,
        seeds=tuple(config.seeds),
        checkpoints=tuple(dict.fromkeys(node.name for node in graph.checkpoints)),
        domains=(*config.domain_names(config.evaluate.domains), *config.evaluate.harness_domains),
        cells=cells,
        teachers={
            domain: {_node_name(name): weight for name, weight in weights.items()}
            for domain, weights in config.teachers().items()
        },
        experts=_experts(config),
        anchored=tuple(config.merge.anchor.domains) if config.merge and config.merge.anchor else (),
        start=config.default_start(),
        confidence=config.gate.confidence,
        provenance=provenance | shifts.provenance,
        costs={name: _mean(list(costs.values())) for name, costs in spent.items()},
        spent=spent,
        hypotheses=config.hypotheses,
        shift=shifts.values,
        kl_examples=shifts.kl_examples,
        cosines=shifts.cosines,
    )


def _spent(graph: StageGraph, store: Store) -> dict[str, dict[int, Cost]]:
    """Name -> seed -> cost of making the checkpoint, for those in the store."""
    made: dict[str, dict[int, Cost]] = {}
    for node in graph.checkpoints:
        if artifact := store.find(node.key):
            facts = [float(artifact.manifest.get(name, 0)) for name in ("tokens", "seconds", "peak_memory")]
            made.setdefault(node.name, {})[node.seed] = Cost(*facts)
    return made


def _mean(costs: Sequence[Cost]) -> Cost:
    return Cost(*(fmean(getattr(cost, field.name) for cost in costs) for field in fields(Cost)))


def _seed(checkpoint: Node) -> int:
    return int(checkpoint.id.rpartition("@")[2])


def _node_name(checkpoint: str) -> str:
    return checkpoint if checkpoint in (BASE, CHAMPION, COLD_START) else f"experts/{checkpoint}"


def _experts(config: RunConfig) -> dict[str, Expert]:
    experts = {}
    for name, expert in config.experts.items():
        method = "given" if expert.train is None else expert.train.chosen[0]
        experts[_node_name(name)] = Expert(expert.domain, method)
    return experts
