"""The number of CPU threads of a node's process."""

import os
from collections.abc import Mapping

from flows.plan.nodes import Node, StageGraph
from flows.run_file.resources import ResourcesConfig
from stages.config.kinds import STAGES


def threads_of(graph: StageGraph, node: Node) -> int:
    """CPU threads of each process that makes `node`.

    With `resources.threads: auto` a training stage has all cores if no other training stage of the run can run beside
    it. All other nodes share the cores. The number depends on the plan and the machine, not on which nodes are still
    missing, so that a resumed stage continues with the number it began with.
    """
    resources = graph.config.resources
    if _trains(node) and _trains_alone(graph, node):
        return _share(resources, 1)
    return threads_beside(resources)


def threads_beside(resources: ResourcesConfig) -> int:
    """CPU threads of a process that shares the machine with the other nodes that run side by side."""
    return _share(resources, resources.parallel_experts)


def _share(resources: ResourcesConfig, nodes: int) -> int:
    if resources.threads != "auto":
        return resources.threads
    return max(1, len(os.sched_getaffinity(0)) // (nodes * max(1, resources.gpus)))


def _trains(node: Node) -> bool:
    return STAGES[node.stage].trains or STAGES[node.stage].launches


def _trains_alone(graph: StageGraph, node: Node) -> bool:
    """Whether every other training stage is an ancestor or a descendant of `node`."""
    parents = {each.id: set(each.parents.values()) for each in graph.nodes}
    children: dict[str, set[str]] = {}
    for child, own in parents.items():
        for parent in own:
            children.setdefault(parent, set()).add(child)
    related = {node.id} | _reached(node.id, parents) | _reached(node.id, children)
    return all(each.id in related for each in graph.nodes if _trains(each))


def _reached(start: str, edges: Mapping[str, set[str]]) -> set[str]:
    found: set[str] = set()
    waiting = [start]
    while waiting:
        new = edges.get(waiting.pop(), set()) - found
        found |= new
        waiting += new
    return found
