"""Options and keys: an option at its default is not in the key, any other value is, and the plan names it."""

import json
from pathlib import Path

import pytest

from base.store.checkpoint import Store
from flows.plan.lock import lock_path, status, write_lock
from flows.plan.shifts import shift_request
from flows.run_file.evaluation import EvaluateConfig
from flows.run_file.schema import ColdStartSFT
from stages.config.distill import DistillConfig
from stages.config.evaluation import EvaluationConfig
from stages.config.on_policy import RFTConfig, RLConfig
from stages.config.shift import ShiftConfig
from stages.config.training import LoraConfig, OptimizerConfig, PretrainConfig, SFTConfig, StrictModel
from tests.unit.flows.plan.test_plan import changed, graph_of, with_evaluations


@pytest.mark.parametrize(
    "schema", [PretrainConfig, SFTConfig, RLConfig, RFTConfig, DistillConfig, EvaluationConfig, ShiftConfig]
)
def test_no_default_is_in_a_key(schema: type[StrictModel]) -> None:
    assert schema().key_fields() == {}


def test_where_the_optimizer_s_state_is_kept_is_in_no_key() -> None:
    assert SFTConfig(sharding="fsdp", cpu_offload=True).key_fields() == {}
    narrow = [SFTConfig(optimizer=OptimizerConfig(states="8bit", paged=paged)) for paged in (False, True)]
    assert narrow[0].key_fields() == narrow[1].key_fields() != SFTConfig(optimizer=OptimizerConfig()).key_fields()


def test_a_nested_option_is_in_the_key_where_it_differs_from_what_is_in_force_without_it() -> None:
    """RL's learning rate is 5e-4 by default, that of a lone optimizer 1e-3."""
    assert RLConfig(optimizer=OptimizerConfig(learning_rate=5e-4)).key_fields() == {}
    given = [OptimizerConfig(learning_rate=rate) for rate in (1e-3, 2e-3)]
    keys = [RLConfig(optimizer=optimizer).key_fields() for optimizer in given]
    assert keys == [{"optimizer": {}}, {"optimizer": {"learning_rate": 0.002}}]
    assert (RLConfig().key_fields(), RLConfig(lora=LoraConfig()).key_fields()) == ({}, {"lora": {}})


def test_equal_effective_configs_of_two_stages_have_one_key() -> None:
    """The cold start's own default is `rough`; the stage that it becomes has another one."""
    cold = ColdStartSFT()
    stage = SFTConfig.model_validate({name: getattr(cold, name) for name in SFTConfig.model_fields})
    assert stage.key_fields() == SFTConfig(demonstrations="rough").key_fields() == {"demonstrations": "rough"}


def test_an_option_of_an_objective_stays_out_of_the_key_until_it_is_set() -> None:
    chosen = {"type": "jsd", "beta": 0.1, "reference_kl": 0.01, "chunk_tokens": 7}
    objective = DistillConfig(objective=chosen).key_fields()["objective"]
    assert objective == {"type": "jsd", "beta": 0.1, "reference_kl": 0.01}


@pytest.mark.parametrize(
    "override",
    [
        "merge.on_policy_fraction=1.0",
        "merge.optimizer.max_grad_norm=1.0",
        "merge.optimizer.states=float32",
        "merge.sampler.backend=transformers",
        "merge.domain_weights={sort: 1}",
        "merge.max_domain_share=1.0",
        "merge.off_policy=dataset",
        "merge.sampler.memory_share=0.2",
        "merge.health={max_mismatch: 3, window: 5}",
        "merge.health.min_improvement=0.1",
        "merge.objective={type: reverse_kl, importance: drop}",
        "merge.objective={type: reverse_kl, reference_kl: 0}",
        "merge.objective=reverse_kl",
        "merge.health={}",
        "merge.health={window: 10, on_alarm: warn}",
        "experts.sort.train.rl.health={}",
        "merge.monitor={every: 5}",
        "experts.sort.train.rl.monitor={every: 7, examples: 9}",
        "merge.gradient_checkpointing=true",
        "merge.teacher_cache=cpu",
    ],
)
def test_an_option_at_its_default_leaves_every_key_as_it_was(tmp_path: Path, override: str) -> None:
    assert changed(graph_of(tmp_path), graph_of(tmp_path, [override])) == set()


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["merge.on_policy_fraction=0.5"], "on_policy_fraction 1.0 → 0.5"),
        (["merge.optimizer={states: 8bit, paged: true}"], "optimizer.states float32 → 8bit"),
        (
            ["merge.objective={type: sampled_reverse_kl, importance: mask}"],
            "objective.advantage_clip None → 5.0; objective.importance drop → mask; "
            "objective.type reverse_kl → sampled_reverse_kl",
        ),
        (
            ["merge.objective={type: reverse_kl, top_k: {k: 8}}"],
            "objective.top_k None → {'k': 8, 'support': 'teacher', 'remainder': 'tail'}",
        ),
        (["merge.health={on_alarm: stop}"], "health.on_alarm warn → stop"),
        (["merge.health={patience: 20}"], "health.patience None → 20"),
        (
            ["merge.loss_normalisation=domain", "merge.domain_weights={sort: 2}"],
            "domain_weights.sort None → 2.0; loss_normalisation token → domain",
        ),
    ],
)
def test_an_option_set_changes_the_key_and_is_worded(tmp_path: Path, overrides: list[str], why: str) -> None:
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


def test_the_sampler_of_an_evaluation_is_in_its_key_unless_it_is_transformers() -> None:
    assert EvaluationConfig(backend="vllm").key_fields() == {"backend": "vllm"}
    assert EvaluationConfig(backend="transformers").key_fields() == {}


def test_the_precision_of_measurements_is_in_the_keys_of_scores_and_shift() -> None:
    asked = {"dtype": "bfloat16", "float32_matmul": "high"}
    assert EvaluationConfig.model_validate(asked).key_fields() == asked
    request, before = (shift_request(EvaluateConfig.model_validate(own)) for own in (asked, {}))
    assert request is not None
    assert before is not None
    assert request.key_fields() == before.key_fields() | asked
