"""A small lab graph and artifacts made of nothing but manifests, for tests of tracking and lineage."""

import dataclasses
import json
from typing import Any

from base.hashing import stable_hash
from base.store.checkpoint import Artifact, Store
from evals.comparison.scores import FILE
from flows.plan.nodes import Node, StageGraph
from flows.run_file.schema import RunConfig
from tests.support.scored import row

DOMAINS = ("sort", "caesar")
SECONDS = {"pretrain": 95.0, "sft": 14.0, "rl": 61.0, "distill": 83.0}


def lab_graph(name: str = "lab") -> StageGraph:
    """base → cold start → two experts → student, each with one evaluation a domain; fixed keys, no planning."""
    config = RunConfig.model_validate(
        {
            "name": name,
            "base": {"pretrain": {"max_steps": 5}},
            "domains": {domain: {"kind": "strings", "options": {"task": domain}} for domain in DOMAINS},
            "cold_start": {"sft": {"max_steps": 5}},
            "experts": {
                "sort": {"domain": "sort", "train": {"rl": {"max_steps": 5}}},
                "caesar": {"domain": "caesar", "train": {"sft": {"max_steps": 5}}},
            },
            "merge": {"max_steps": 5},
        }
    )
    start = {"start": "cold_start@0"}
    teachers = {f"teacher/{domain}": f"experts/{domain}@0" for domain in DOMAINS}
    stages = [
        _node("base", "pretrain", {}, DOMAINS),
        _node("cold_start", "sft", {"start": "base@0"}, DOMAINS),
        _node("experts/sort", "rl", start, ("sort",)),
        _node("experts/caesar", "sft", start, ("caesar",)),
        _node("student", "distill", start | teachers, DOMAINS),
    ]
    evaluations = [_evaluation(stage, domain) for stage in stages for domain in DOMAINS]
    return StageGraph(config, (*stages, *evaluations), {})


def shared_graph() -> StageGraph:
    """The lab graph with both experts as teachers of `sort`, three parts to one."""
    graph = lab_graph()
    student = graph.node("student@0")
    parents = {
        "start": "cold_start@0",
        "teacher/sort/sort": "experts/sort@0",
        "teacher/sort/caesar": "experts/caesar@0",
        "teacher/caesar": "experts/caesar@0",
    }
    config = {**student.config, "teacher_weights": {"sort": {"sort": 0.75, "caesar": 0.25}}}
    keys = {role: graph.node(parent).key for role, parent in parents.items()}
    facts = {**student.ingredients, "parents": keys, "config": config}
    shared = dataclasses.replace(student, parents=parents, config=config, ingredients=facts)
    return dataclasses.replace(graph, nodes=tuple(shared if node is student else node for node in graph.nodes))


def lessons(store: Store, graph: StageGraph) -> list[dict[str, Any]]:
    """What the student of `shared_graph` would record of its teachers."""
    weights = {"teacher/sort/sort": 0.75, "teacher/sort/caesar": 0.25, "teacher/caesar": 1.0}
    found = []
    for role, weight in weights.items():
        teacher = store.get(graph.node(graph.node("student@0").parents[role]).key)
        found.append(
            {
                "domain": role.split("/")[1],
                "teacher": teacher.name,
                "key": teacher.key,
                "digest": teacher.digest,
                "weight": weight,
                "prompt_share": 0.5,
                "objective": {"type": "reverse_kl", "outcome_weight": 0.0},
            }
        )
    return found


def commit(store: Store, graph: StageGraph, node: Node, **more: Any) -> Artifact:
    """Put an artifact of a node into the store, with more facts in its manifest; its parents must stand there."""
    folder = store.staging(node.key)
    if node.stage == "evaluate":
        rows = [row(number, float(number % 4 != 3)) for number in range(8)]
        (folder / FILE).write_text("".join(json.dumps(each) + "\n" for each in rows))
    else:
        (folder / "model.txt").write_text(node.id)
    parents = {role: store.get(graph.node(parent).key) for role, parent in node.parents.items()}
    scores = {"greedy": 0.75, "sampled": 0.5}
    manifest = {
        "name": node.name,
        "stage": node.stage,
        "seed": node.seed,
        "config": dict(node.config),
        "code": "c0de",
        "parents": {role: {"name": p.name, "key": p.key, "digest": p.digest} for role, p in parents.items()},
        "data": dict(node.ingredients["domains"]),
        "tokens": 0 if node.stage == "evaluate" else 120_000,
        "seconds": SECONDS.get(node.stage, 1.0),
        "metrics": scores if node.stage == "evaluate" else {f"{node.stage}/loss": 0.25},
        **more,
    }
    return store.commit(folder, node.key, manifest)


def _node(name: str, stage: str, parents: dict[str, str], domains: tuple[str, ...]) -> Node:
    config = {"max_steps": 5, "optimizer": {"learning_rate": 1e-3}}
    return _keyed(f"{name}@0", name, stage, config, parents, domains)


def _evaluation(checkpoint: Node, domain: str) -> Node:
    name = f"eval/{checkpoint.name}/{domain}/held_out"
    config = {"domain": domain, "split": "held_out", "examples": 8}
    return _keyed(f"{name}@0", name, "evaluate", config, {"checkpoint": checkpoint.id}, (domain,))


def _keyed(
    node_id: str, name: str, stage: str, config: dict[str, object], parents: dict[str, str], domains: tuple[str, ...]
) -> Node:
    key = _key(node_id)
    entries = {domain: {"kind": "strings", "options": {"task": domain}} for domain in domains}
    facts = {
        "stage": stage,
        "seed": 0,
        "parents": {role: _key(parent) for role, parent in parents.items()},
        "domains": {domain: stable_hash(domain) for domain in domains},
    }
    return Node(node_id, name, stage, 0, config, parents, entries, facts, key)


def _key(node_id: str) -> str:
    return stable_hash(node_id)[:24]
