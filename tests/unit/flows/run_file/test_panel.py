"""Where experts are scored: everywhere when they are few, on their own domains and a panel when they are many."""

from pathlib import Path

from flows.plan.nodes import StageGraph
from flows.run_file.panel import FEW_EXPERTS
from tests.unit.flows.plan.test_plan import graph_of
from tests.unit.flows.run_file.test_config import message

MANY = FEW_EXPERTS + 1
GENERAL = ["upper", "double"]


def domains(experts: int) -> dict[str, dict]:
    trained = {f"d{n}": {"kind": "strings", "options": {"task": "sort"}} for n in range(experts)}
    return {**trained, **{name: {"kind": "strings", "options": {"task": "uppercase"}} for name in GENERAL}}


def experts(count: int) -> dict[str, dict]:
    return {f"e{n}": {"domain": f"d{n}", "train": {"sft": {"max_steps": 2}}} for n in range(count)}


def graph(tmp_path: Path, count: int, *overrides: str, **evaluate) -> StageGraph:
    merge = {"max_steps": 2, "anchor": {"domains": ["upper"]}}
    return graph_of(
        tmp_path, list(overrides), domains=domains(count), experts=experts(count), merge=merge, evaluate=evaluate
    )


def scored(graph: StageGraph, checkpoint: str) -> list[str]:
    return [node.config["domain"] for node in graph.evaluations(checkpoint)]


def test_a_few_experts_are_scored_everywhere(tmp_path):
    whole = graph(tmp_path, FEW_EXPERTS)
    assert scored(whole, "experts/e3@0") == scored(whole, "student@0") == list(domains(FEW_EXPERTS))


def test_many_experts_are_scored_on_their_own_domain_and_on_what_no_expert_trains(tmp_path):
    whole = graph(tmp_path, MANY)
    assert scored(whole, "experts/e3@0") == ["d3", *GENERAL]
    for checkpoint in ("base@0", "cold_start@0", "student@0"):
        assert scored(whole, checkpoint) == list(domains(MANY))
    shift = {node.name: list(node.domains) for node in whole.nodes if node.stage == "shift"}
    assert shift["shift/experts/e3"] == ["d3", *GENERAL]
    assert shift["shift/student"] == list(domains(MANY))


def test_the_number_of_nodes_grows_with_the_experts_not_with_their_square(tmp_path):
    fifty, hundred = (len(graph(tmp_path, count).nodes) for count in (50, 100))
    assert hundred < 2.1 * fifty


def test_the_panel_is_all_domains_or_those_named(tmp_path):
    assert scored(graph(tmp_path, MANY, expert_panel="all"), "experts/e3@0") == list(domains(MANY))
    assert scored(graph(tmp_path, MANY, expert_panel=["d0"]), "experts/e3@0") == ["d0", "d3"]
    assert scored(graph(tmp_path, 2, expert_panel=[]), "experts/e1@0") == ["d1"]
    # The panel has no place in a key.
    everywhere, own = graph(tmp_path, 2), graph(tmp_path, 2, expert_panel=[])
    assert {node.key for node in own.checkpoints} == {node.key for node in everywhere.checkpoints}


def test_an_expert_is_scored_on_what_it_teaches_in_the_merge_or_a_variant(tmp_path):
    several = graph(tmp_path, MANY, "merge.teachers.d1=e0", 'merge.variants={"other": {"teachers": {"d2": "e0"}}}')
    assert scored(several, "experts/e0@0") == ["d0", "d1", "d2", *GENERAL]


def test_experts_of_every_round_are_scored_alike(tmp_path):
    rounds = graph(tmp_path, MANY, "merge.rounds=2")
    assert scored(rounds, "round1/experts/e3@0") == scored(rounds, "experts/e3@0") == ["d3", *GENERAL]


def test_a_domain_of_the_panel_that_is_not_scored_is_refused(tmp_path):
    found = message(tmp_path, evaluate={"domains": ["sort", "general"], "expert_panel": ["reverse"]})
    assert "evaluate.expert_panel: unknown domain of evaluate.domains 'reverse'" in found
