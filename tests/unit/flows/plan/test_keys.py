"""New options and old keys: an option at its default leaves what was made without it valid."""

import json
from pathlib import Path

import pytest

from base.hashing import stable_hash
from base.store.checkpoint import Store
from flows.plan.lock import lock_path, status, write_lock
from stages.config.distill import DistillConfig, ObjectiveConfig
from stages.config.on_policy import RLConfig
from stages.config.training import EvaluationConfig, PretrainConfig, SFTConfig, StrictModel
from tests.unit.flows.plan.test_plan import changed, graph_of, with_evaluations


@pytest.mark.parametrize(
    ("schema", "digest"),
    [
        (PretrainConfig, "eb054a3c0f98"),
        (SFTConfig, "6b71290956a0"),
        (RLConfig, "f594f8b5e0d3"),
        (DistillConfig, "900f1cbb4f3e"),
        (EvaluationConfig, "f67f0b5245c5"),
    ],
)
def test_the_key_of_an_empty_config_is_that_of_the_first_release(schema: type[StrictModel], digest: str) -> None:
    """A new option must be marked `neutral_default`, or every stage made before it would run again."""
    assert stable_hash(schema().key_fields())[:12] == digest


def test_an_option_of_an_objective_stays_out_of_the_key_until_it_is_set() -> None:
    old = {"name", "advantage_clip", "importance_band", "outcome_weight"}
    assert DistillConfig().key_fields()["objective"].keys() == old
    chosen = ObjectiveConfig(name="jsd", beta=0.1, reference_kl=0.01, chunk_tokens=7)
    objective = DistillConfig(objective=chosen).key_fields()["objective"]
    assert objective.keys() == old | {"beta", "reference_kl"}
    assert (objective["beta"], objective["reference_kl"]) == (0.1, 0.01)


@pytest.mark.parametrize(
    "override",
    [
        "merge.on_policy_fraction=1.0",
        "merge.max_domain_share=1.0",
        "merge.off_policy=dataset",
        "merge.sampler.memory_share=0.2",
        "merge.health={max_length_growth: 3, window: 5}",
        "merge.health.min_improvement=0.1",
        "merge.objective.importance=drop",
        "merge.objective.reference_kl=0",
        "merge.objective.top_k=null",
        "merge.health={}",
        "merge.health={window: 10, on_alarm: warn}",
        "experts.sort.train.rl.health={}",
        "merge.monitor={every: 5}",
        "experts.sort.train.rl.monitor={every: 7, examples: 9}",
        "merge.gradient_checkpointing=true",
        "merge.teacher_cache=cpu",
    ],
)
def test_a_new_option_at_its_default_leaves_every_key_as_it_was(tmp_path: Path, override: str) -> None:
    assert changed(graph_of(tmp_path), graph_of(tmp_path, [override])) == set()


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["merge.on_policy_fraction=0.5"], "on_policy_fraction 1.0 → 0.5"),
        (
            ["merge.objective={name: sampled_reverse_kl, importance: mask}"],
            "objective.importance drop → mask; objective.name reverse_kl → sampled_reverse_kl",
        ),
        (
            ["merge.objective.top_k={k: 8}"],
            "objective.top_k None → {'k': 8, 'support': 'teacher', 'remainder': 'tail'}",
        ),
        (["merge.health={on_alarm: stop}"], "health.on_alarm warn → stop"),
        (["merge.health={patience: 20}"], "health.patience None → 20"),
        (
            ["merge.loss_normalisation=domain", "merge.domain_shares={sort: 2}"],
            "domain_shares.sort None → 2.0; loss_normalisation token → domain",
        ),
    ],
)
def test_a_new_option_set_changes_the_key_and_is_worded(tmp_path: Path, overrides: list[str], why: str) -> None:
    before, after = graph_of(tmp_path), graph_of(tmp_path, overrides)
    assert changed(before, after) == with_evaluations(before, {"student@0"})
    write_lock(before, tmp_path / "home")
    entries = {entry.node.id: entry for entry in status(after, Store(tmp_path / "home"))}
    assert entries["student@0"].why == f"changed: {why}"


def test_a_lock_of_another_release_is_compared_as_it_stands(tmp_path: Path) -> None:
    graph, home = graph_of(tmp_path), tmp_path / "home"
    write_lock(graph, home)
    lock = json.loads(lock_path(home, "tiny").read_text())
    student = lock["nodes"]["student@0"]
    student["config"]["long_gone"] = 1
    student["key"] = "another"
    lock_path(home, "tiny").write_text(json.dumps(lock))
    why = {entry.node.id: entry.why for entry in status(graph, Store(home))}["student@0"]
    assert why == "changed: long_gone 1 → None"
