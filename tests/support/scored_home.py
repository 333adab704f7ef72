"""A home in which every node of a small run stands, with score sheets made by hand: for tests of what follows them."""

import json
from collections.abc import Mapping
from pathlib import Path

import yaml

from base.store.checkpoint import Store
from evals.comparison.scores import FILE
from flows.plan.graph import build_graph
from flows.plan.lock import write_lock
from flows.plan.nodes import StageGraph
from flows.run_file.load import load_run_file
from tests.support.scored import row
from tests.unit.flows.run_file.test_config import MINIMAL

EXAMPLES = 100
BASELINES = ["ties", "mix_sft"]
# Greedy score everywhere; the general domain is below.
SHARES = {
    "base": 0.1,
    "cold_start": 0.4,
    "experts/sort": 0.8,
    "experts/reverse": 0.8,
    "student": 0.8,
    "baselines/ties": 0.95,
    "baselines/mix_sft": 0.6,
}
GENERAL = 0.5


def run_file(folder: Path) -> Path:
    """A run file with two experts, an anchor and two baselines beside the merge."""
    path = folder / "run.yaml"
    merge = {**MINIMAL["merge"], "baselines": BASELINES}
    path.write_text(yaml.safe_dump({**MINIMAL, "merge": merge}, sort_keys=False))
    return path


def graph_of(file: Path, home: Path, *overrides: str) -> StageGraph:
    """The graph of a run file."""
    return build_graph(load_run_file(file, list(overrides)), home)


def finish(graph: StageGraph, home: Path, shares: Mapping[str, float] = SHARES) -> Store:
    """Put an artifact of every node that has none into the store; evaluations score the checkpoint's share."""
    store = Store(home)
    write_lock(graph, home)
    for node in graph.nodes:
        if store.find(node.key) is not None:
            continue
        folder = store.staging(node.key)
        if node.stage == "evaluate":
            name = graph.node(node.parents["checkpoint"]).name
            share = GENERAL if node.config["domain"] == "general" else shares[name]
            rows = [row(number, float(number < share * EXAMPLES)) for number in range(EXAMPLES)]
            (folder / FILE).write_text("".join(json.dumps(each) + "\n" for each in rows))
        else:
            (folder / "model.txt").write_text(node.id)
        parents = {role: store.get(graph.node(parent).key) for role, parent in node.parents.items()}
        manifest = {
            "name": node.name,
            "stage": node.stage,
            "seed": node.seed,
            "config": dict(node.config),
            "parents": {role: {"name": p.name, "key": p.key, "digest": p.digest} for role, p in parents.items()},
            "data": dict(node.ingredients["domains"]),
            "tokens": 100,
            "seconds": 1.0,
            "device_seconds": 1.0,
            "metrics": {"greedy": share} if node.stage == "evaluate" else {},
        }
        store.commit(folder, node.key, manifest)
    return store
