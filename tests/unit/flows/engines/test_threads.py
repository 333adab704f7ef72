"""`resources.threads`: a number for every process, or the cores by what runs side by side."""

import os
from pathlib import Path

import pytest

from flows.engines.threads import threads_beside, threads_of
from flows.plan.graph import build_graph
from flows.plan.nodes import StageGraph
from tests.unit.flows.run_file.test_config import load


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))


def graph_of(tmp_path: Path, *overrides: str, **changes) -> StageGraph:
    return build_graph(load(tmp_path, list(overrides), **changes), tmp_path / "home")


def test_a_stage_that_trains_alone_has_all_cores_and_the_others_share_them(tmp_path: Path) -> None:
    graph = graph_of(tmp_path, "resources.parallel_experts=2", "resources.threads=auto")
    found = {node.name: threads_of(graph, node) for node in graph.nodes}
    assert found["base"] == found["student"] == 8
    assert {threads for name, threads in found.items() if name.startswith("experts/")} == {4}
    assert {threads for name, threads in found.items() if name.startswith("eval/")} == {4}


def test_a_stage_beside_which_another_seed_or_merge_trains_does_not_have_all_cores(tmp_path: Path) -> None:
    graph = graph_of(tmp_path, "merge.variants={half: {on_policy_fraction: 0.5}}", "resources.parallel_experts=4")
    assert threads_of(graph, graph.node("student@0")) == threads_of(graph, graph.node("variants/half@0")) == 2
    two = graph_of(tmp_path, "seeds=[0,1]", "resources.parallel_experts=2")
    assert {threads_of(two, node) for node in two.nodes if node.name == "student"} == {4}


def test_cores_are_divided_among_the_processes_of_a_stage_and_none_has_less_than_one(tmp_path: Path) -> None:
    graph = graph_of(tmp_path, "resources.gpus=4", "resources.parallel_experts=4")
    assert threads_of(graph, graph.node("student@0")) == 2
    assert threads_beside(graph.config.resources) == 1


def test_a_number_holds_for_every_process(tmp_path: Path) -> None:
    graph = graph_of(tmp_path, "resources.threads=3")
    assert {threads_of(graph, node) for node in graph.nodes} == {threads_beside(graph.config.resources)} == {3}
