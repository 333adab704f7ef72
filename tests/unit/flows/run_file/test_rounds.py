"""Rounds of co-evolution: who starts from whom, and what another run's round is worth."""

from pathlib import Path

import pytest

from base.errors import UserError
from flows.check.draws import config_key
from flows.plan.graph import build_graph
from flows.plan.nodes import StageGraph
from flows.run_file.rounds import round_prefix, without_round
from tests.unit.flows.run_file.test_config import MINIMAL, load


def graph_of(tmp_path: Path, rounds: int, **changes) -> StageGraph:
    merge = MINIMAL["merge"] | {"rounds": rounds} | changes.pop("merge", {})
    return build_graph(load(tmp_path, merge=merge, **changes), tmp_path / "home")


def test_each_rounds_experts_start_from_the_student_before(tmp_path: Path) -> None:
    graph = graph_of(tmp_path, 3, evaluate={})
    names = [node.id for node in graph.checkpoints]
    assert len(names) == len(set(names))
    for before, prefix in (("cold_start", "round1/"), ("round1/student", "round2/"), ("round2/student", "")):
        for expert in MINIMAL["experts"]:
            assert graph.node(f"{prefix}experts/{expert}@0").parents == {"start": f"{before}@0"}
        student = graph.node(f"{prefix}student@0").parents
        assert student["start"] == f"{before}@0"
        assert student["teacher/sort"] == f"{prefix}experts/sort@0"
    assert all(graph.evaluations(node.id) for node in graph.checkpoints)
    assert graph.node("cosines@0").parents["start"] == "round2/student@0"


def test_a_further_round_reuses_the_rounds_before(tmp_path: Path) -> None:
    one, two = graph_of(tmp_path, 1), graph_of(tmp_path, 2)
    for name in (*(f"experts/{expert}@0" for expert in MINIMAL["experts"]), "student@0"):
        assert two.node(f"round1/{name}").key == one.node(name).key != two.node(name).key


def test_the_anchor_stays_the_start_of_the_run_and_a_start_of_ones_own_is_kept(tmp_path: Path) -> None:
    own = MINIMAL["experts"] | {"upper": {"domain": "general", "train": {"sft": {}}, "start_from": "base"}}
    graph = graph_of(tmp_path, 2, experts=own, merge={"start_from": "cold_start", "anchor": None})
    assert graph.node("student@0").parents["start"] == "cold_start@0"
    assert graph.node("experts/upper@0").parents == {"start": "base@0"}
    assert "round1/experts/upper@0" not in {node.id for node in graph.nodes}
    assert graph.node("round1/student@0").parents["teacher/general"] == "experts/upper@0"

    anchored = graph_of(tmp_path, 2)
    assert anchored.node("student@0").parents["start"] == "round1/student@0"
    assert anchored.node("student@0").parents["teacher/general"] == "cold_start@0"


def test_names_of_rounds(tmp_path: Path) -> None:
    assert [round_prefix(number, 3) for number in (1, 2, 3)] == ["round1/", "round2/", ""]
    assert [without_round(name) for name in ("round12/experts/a", "experts/round1", "student")] == [
        "experts/a",
        "experts/round1",
        "student",
    ]
    graph = graph_of(tmp_path, 2)
    assert config_key(graph.node("round1/experts/sort@0")) == config_key(graph.node("experts/sort@0"))


def test_a_hypothesis_may_name_a_round_that_the_run_has(tmp_path: Path) -> None:
    def asking(name: str) -> dict:
        test = {"compare": ["student", name], "expect": "above"}
        return {"H": {"claim": "later is better", "tests": {"round": test}}}

    assert graph_of(tmp_path, 2, hypotheses=asking("round1/student"))
    with pytest.raises(UserError, match="round2/student"):
        graph_of(tmp_path, 2, hypotheses=asking("round2/student"))
