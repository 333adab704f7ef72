"""Other merges of the same experts: what they share with the merge, what is their own, and what they leave alone."""

from pathlib import Path

import pytest

from base.errors import UserError
from flows.plan.graph import build_graph
from flows.plan.nodes import Node, StageGraph
from flows.run_file.baselines import baseline_config
from stages.config.training import TrainConfig
from tests.unit.flows.run_file.test_config import load

ALL = "merge.baselines=[weight_average, task_arithmetic, ties, dare_linear, dare_ties, seqkd, mix_sft, mix_rl]"
ANCHOR = "merge.anchor={domains: [general], weight: 0.5}"


def graph_of(tmp_path: Path, *overrides: str) -> StageGraph:
    return build_graph(load(tmp_path, list(overrides)), tmp_path / "home")


def baseline(graph: StageGraph, name: str) -> Node:
    return graph.node(f"baselines/{name}@0")


def test_baselines_are_nodes_beside_the_student_and_change_nobodys_key(tmp_path: Path) -> None:
    without, graph = graph_of(tmp_path), graph_of(tmp_path, ALL)
    keys = {node.id: node.key for node in without.nodes}
    assert {
        node.id: node.key
        for node in graph.nodes
        if not node.name.partition("eval/")[2].startswith("baselines") and not node.name.startswith("baselines")
    } == keys
    made = [node for node in graph.checkpoints if node.name.startswith("baselines/")]
    assert [node.name.removeprefix("baselines/") for node in made] == [
        "weight_average",
        "task_arithmetic",
        "ties",
        "dare_linear",
        "dare_ties",
        "seqkd",
        "mix_sft",
        "mix_rl",
    ]
    for node in made:
        assert len(graph.evaluations(node.id)) == len(graph.evaluations("student@0"))
        assert node.parents["start"] == graph.node("student@0").parents["start"]


def test_weight_merges_take_every_expert_once_and_not_the_anchor(tmp_path: Path) -> None:
    graph = graph_of(tmp_path, ALL, ANCHOR)
    node = baseline(graph, "ties")
    assert (node.stage, node.config["method"], node.domains) == ("merge_weights", "ties", {})
    experts = {role: parent for role, parent in node.parents.items() if role != "start"}
    assert experts == {"teacher/sort": "experts/sort@0", "teacher/reverse": "experts/reverse@0"}
    assert graph.node("student@0").parents["teacher/general"] == "cold_start@0"


def test_seqkd_is_the_merges_loop_on_what_the_teachers_write(tmp_path: Path) -> None:
    graph = graph_of(
        tmp_path, ALL, ANCHOR, "merge.max_steps=7", "merge.objective={type: jsd}", "resources.sampler=vllm"
    )
    node, student = baseline(graph, "seqkd"), graph.node("student@0")
    assert (node.stage, node.parents, node.domains) == ("distill", student.parents, student.domains)
    assert node.config["objective"]["type"] == "imitation"
    assert (node.config["on_policy_fraction"], node.config["off_policy"]) == (0.0, "teacher")
    for shared in ("max_steps", "prompts_per_step", "group_size", "examples", "max_new_tokens", "domain_weights"):
        assert node.config[shared] == student.config[shared]
    assert node.config["domain_weights"] == {"general": 0.5}


def test_mixes_learn_from_the_same_prompts_and_as_many_completions(tmp_path: Path) -> None:
    graph = graph_of(tmp_path, ALL, ANCHOR, "merge.prompts_per_step=32", "merge.group_size=2", "merge.max_steps=7")
    student = graph.node("student@0")
    sft, rl = baseline(graph, "mix_sft"), baseline(graph, "mix_rl")
    assert (sft.stage, rl.stage) == ("sft", "rl")
    assert sft.domains == rl.domains == student.domains
    assert (sft.config["batch_size"], sft.config["max_steps"]) == (64, 7)
    assert sft.config["optimizer"] == student.config["optimizer"]
    assert rl.config["prompts_per_step"] * rl.config["group_size"] == 64
    expert = graph.node("experts/sort@0")
    # As the run's own RL expert learns, for as long as the merge.
    assert rl.config["optimizer"] == expert.config["optimizer"]
    assert (rl.config["group_size"], rl.config["max_steps"]) == (expert.config["group_size"], 7)


def test_settings_of_its_own_reach_a_baseline_alone(tmp_path: Path) -> None:
    settings = "merge.baselines={ties: {density: 0.5}, mix_sft: {max_steps: 3, demonstrations: rough}, seqkd: {}}"
    graph = graph_of(tmp_path, settings)
    assert baseline(graph, "ties").config["density"] == 0.5
    assert baseline(graph, "mix_sft").config["max_steps"] == 3
    assert baseline(graph, "mix_sft").config["demonstrations"] == "rough"
    before = {node.id: node.key for node in graph.nodes}
    changed = graph_of(tmp_path, settings.replace("0.5", "0.4"))
    moved = {node.id for node in changed.nodes if before[node.id] != node.key}
    assert moved == {"baselines/ties@0", *(node.id for node in changed.evaluations("baselines/ties@0"))}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("merge.baselines=[tie]", "merge.baselines.tie: unknown key — did you mean 'ties'?"),
        ("merge.baselines={ties: {densty: 0.5}}", "merge.baselines.ties.densty: "),
        ("merge.baselines={mix_sft: {max_steps: 0}}", "merge.baselines.mix_sft.max_steps: "),
        (
            "merge.baselines={ties: {method: weight_average}}",
            "merge.baselines.ties.method: fixed by the baseline",
        ),
        ("merge.baselines={seqkd: {on_policy_fraction: 0.0}}", "merge.baselines.seqkd.on_policy_fraction: fixed"),
        ("merge.baselines={seqkd: {objective: {type: reverse_kl}}}", "merge.baselines.seqkd.objective: fixed"),
        (
            "merge.baselines={ties: {weights: {sotr: 2}}}",
            "merge.baselines.ties.weights: 'sotr' is no expert of the run — did you mean 'sort'?",
        ),
    ],
)
def test_mistakes_name_the_baseline_and_its_key(tmp_path: Path, settings: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        graph_of(tmp_path, settings)
    assert said in str(caught.value)


def test_only_experts_the_merge_takes_can_be_weighed(tmp_path: Path) -> None:
    weights = "merge.baselines={ties: {weights: {reverse: 2, sort: 1}}}"
    assert baseline(graph_of(tmp_path, weights), "ties").config["weights"] == {"reverse": 2, "sort": 1}
    with pytest.raises(UserError, match=r"ties\.weights: 'reverse' is an expert, but no teacher of the merge"):
        graph_of(tmp_path, weights, "merge.domains=[sort]")


@pytest.mark.parametrize("name", ["seqkd", "mix_sft", "mix_rl"])
def test_all_settings_of_training_are_those_of_the_merge(tmp_path: Path, name: str) -> None:
    config = load(tmp_path, [f"merge.baselines=[{name}]", "experts={}"])
    other = {"max_steps": 7, "dtype": "bfloat16", "float32_matmul": "high", "micro_batch_tokens": 77, "examples": 7}
    other |= {"max_prompt_tokens": 7, "longer_prompts": "drop", "save_every": 7, "sharding": "fsdp"}
    other |= {"cpu_offload": True, "gradient_checkpointing": True, "lora": {"rank": 3}}
    other |= {"optimizer": {"learning_rate": 0.7}}
    assert other.keys() == TrainConfig.model_fields.keys()
    merge = type(config.merge).model_validate(other)
    found = baseline_config(config.model_copy(update={"merge": merge}), name)
    assert {field: getattr(found, field) for field in other} == {field: getattr(merge, field) for field in other}
