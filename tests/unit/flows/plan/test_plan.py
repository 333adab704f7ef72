"""Content keys: they change with what changes the result, exactly downstream, and with nothing else."""

import dataclasses
from pathlib import Path

import pytest

from base.errors import UserError
from base.store.checkpoint import Store
from flows.plan.graph import build_graph
from flows.plan.lock import code_fingerprint, status, write_lock
from flows.plan.nodes import StageGraph
from stages.config.distill import DistillConfig
from stages.config.kinds import STAGES
from tests.support.checkpoints import pretend_checkpoint
from tests.unit.flows.run_file.test_config import MINIMAL, TWINS, load

SORT_TREE = {"experts/sort@0", "student@0"}


def graph_of(tmp_path: Path, overrides: list[str] | None = None, **changes) -> StageGraph:
    return build_graph(load(tmp_path, overrides, **changes), tmp_path / "home")


def changed(before: StageGraph, after: StageGraph) -> set[str]:
    """Ids of the nodes of `before` whose key is another in `after`."""
    keys = {node.id: node.key for node in after.nodes}
    return {node.id for node in before.nodes if keys.get(node.id) != node.key}


def with_evaluations(graph: StageGraph, checkpoints: set[str]) -> set[str]:
    return checkpoints | {node.id for name in checkpoints for node in graph.evaluations(name)}


def make(store: Store, key: str, code: str) -> None:
    folder = store.staging(key)
    (folder / "weights").write_text(key)
    store.commit(folder, key, {"name": key, "code": code})


def test_parents_come_first_and_every_checkpoint_is_scored_everywhere(tmp_path: Path) -> None:
    graph = graph_of(tmp_path)
    seen: set[str] = set()
    for node in graph.nodes:
        assert seen.issuperset(node.parents.values())
        seen.add(node.id)
    assert [node.id for node in graph.checkpoints] == [
        "base@0",
        "cold_start@0",
        "experts/sort@0",
        "experts/reverse@0",
        "student@0",
    ]
    assert {node.config["domain"] for node in graph.evaluations("student@0")} == set(MINIMAL["domains"])


@pytest.mark.parametrize(
    ("override", "checkpoints"),
    [
        ("experts.sort.train.rl.max_steps=6", SORT_TREE),
        ("experts.sort.train.rl.optimizer.learning_rate=0.1", SORT_TREE),
        ("merge.objective.type=sampled_reverse_kl", {"student@0"}),
        (
            "cold_start.sft.max_steps=6",
            {"cold_start@0", "experts/sort@0", "experts/reverse@0", "student@0"},
        ),
        (
            "base.pretrain.max_steps=6",
            {"base@0", "cold_start@0", "experts/sort@0", "experts/reverse@0", "student@0"},
        ),
    ],
)
def test_a_change_reaches_exactly_what_lies_downstream(tmp_path: Path, override: str, checkpoints: set[str]) -> None:
    before, after = graph_of(tmp_path), graph_of(tmp_path, [override])
    assert changed(before, after) == with_evaluations(before, checkpoints)


@pytest.mark.parametrize(
    "override",
    [
        "experts.sort.train.rl.save_every=3",
        "merge.max_resident=2",
        "merge.micro_batch_tokens=100",
        "merge.objective={type: reverse_kl, chunk_tokens: 7}",
        "resources.parallel_experts=4",
        "resources.threads=2",
        "resources.retries=0",
        "gate.max_forgetting=0.5",
        "name=another",
        "resources.gpus=1",
    ],
)
def test_what_does_not_change_the_result_is_not_in_the_key(tmp_path: Path, override: str) -> None:
    assert changed(graph_of(tmp_path), graph_of(tmp_path, [override])) == set()


def test_the_number_of_devices_is_in_the_key_of_training_only(tmp_path: Path) -> None:
    before = graph_of(tmp_path)
    assert changed(before, graph_of(tmp_path, ["resources.gpus=2"])) == {node.id for node in before.nodes}
    ingredients = graph_of(tmp_path, ["resources.gpus=2"]).evaluations("base@0")[0].ingredients
    assert "world_size" not in ingredients


def test_the_runs_sampler_reaches_the_stages_that_sample_and_do_not_say_their_own(tmp_path: Path) -> None:
    before = graph_of(tmp_path)
    assert changed(before, graph_of(tmp_path, ["resources.sampler=transformers"])) == set()
    after = graph_of(tmp_path, ["resources.sampler=vllm"])
    assert changed(before, after) == with_evaluations(before, {"experts/sort@0", "student@0"})
    assert after.node("student@0").config["sampler"]["backend"] == "vllm"
    capped = [
        build_graph(load(tmp_path, asked, max_steps=2), tmp_path / "home") for asked in ([], ["resources.sampler=vllm"])
    ]
    assert changed(*capped) == with_evaluations(before, {"experts/sort@0", "student@0"})
    own = graph_of(tmp_path, ["resources.sampler=vllm", "merge.sampler.backend=transformers"])
    assert own.node("student@0").config["sampler"]["backend"] is None
    assert changed(before, own) == with_evaluations(before, {"experts/sort@0", "student@0"})  # the student's start only


def test_evaluation_settings_change_no_checkpoint(tmp_path: Path) -> None:
    before = graph_of(tmp_path)
    after = graph_of(tmp_path, ["evaluate.examples=7"])
    assert changed(before, after) == {node.id for node in before.nodes if node.stage == "evaluate"}


def test_a_domains_options_reach_what_draws_from_it(tmp_path: Path) -> None:
    before = graph_of(tmp_path, ["base.pretrain.domains=[general]", "cold_start.sft.domains=[general]"])
    after = graph_of(
        tmp_path,
        [
            "base.pretrain.domains=[general]",
            "cold_start.sft.domains=[general]",
            "domains.sort.options.max_length=5",
        ],
    )
    scored_on_sort = {n.id for n in before.nodes if n.stage == "evaluate" and n.config["domain"] == "sort"}
    assert changed(before, after) == with_evaluations(before, SORT_TREE) | scored_on_sort


def test_an_added_expert_reuses_everything_else(tmp_path: Path) -> None:
    before = graph_of(tmp_path)
    experts = MINIMAL["experts"] | {"upper": {"domain": "general", "train": {"sft": {}}}}
    after = graph_of(tmp_path, experts=experts, merge={"max_steps": 5})
    assert changed(before, after) == with_evaluations(before, {"student@0"})
    assert "experts/upper@0" in {node.id for node in after.nodes}


def test_seeds_share_only_what_has_none(tmp_path: Path) -> None:
    graph = graph_of(tmp_path, ["seeds=[0,1]"])
    keys = {node.id: node.key for node in graph.checkpoints}
    assert keys["student@0"] != keys["student@1"]
    assert len(keys) == 10


def test_keys_are_the_same_in_another_home_and_order(tmp_path: Path) -> None:
    here = graph_of(tmp_path)
    experts = dict(reversed(MINIMAL["experts"].items()))
    there = build_graph(load(tmp_path, experts=experts), tmp_path / "elsewhere")
    assert changed(here, there) == set()


def test_a_raised_version_invalidates_downstream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = graph_of(tmp_path)
    raised = dataclasses.replace(STAGES["rl"], version=STAGES["rl"].version + 1)
    monkeypatch.setitem(STAGES, "rl", raised)
    assert changed(before, graph_of(tmp_path)) == with_evaluations(before, SORT_TREE)


def test_status_says_why(tmp_path: Path) -> None:
    graph = graph_of(tmp_path)
    store = Store(tmp_path / "home")
    assert {entry.why for entry in status(graph, store)} == {"never made"}
    write_lock(graph, store.home)
    make(store, graph.node("base@0").key, code_fingerprint())
    make(store, graph.node("cold_start@0").key, "older code")
    entries = {entry.node.id: entry for entry in status(graph, store)}
    assert (entries["base@0"].cached, entries["base@0"].why) == (True, "cached")
    assert (entries["cold_start@0"].cached, entries["cold_start@0"].why) == (True, "cached, code changed since")
    assert entries["experts/sort@0"].why == "not finished"
    assert entries["student@0"].why == "waits for experts/sort@0, experts/reverse@0"
    changed_graph = graph_of(tmp_path, ["experts.sort.train.rl.max_steps=6"])
    entries = {entry.node.id: entry for entry in status(changed_graph, store)}
    assert entries["experts/sort@0"].why == "changed: max_steps 5 → 6"
    assert entries["student@0"].why == "changed: parent teacher/sort"


def test_of_several_teachers_each_has_a_role_and_a_weight(tmp_path: Path) -> None:
    taught = {"sort": {"one": 3, "two": 1}, "reverse": {"reverse": 5}}
    student = graph_of(tmp_path, experts=TWINS, merge={"teachers": taught}).node("student@0")
    assert student.parents == {
        "start": "cold_start@0",
        "teacher/sort/one": "experts/one@0",
        "teacher/sort/two": "experts/two@0",
        "teacher/reverse": "experts/reverse@0",
    }
    assert student.config["teacher_weights"] == {"sort": {"one": 0.75, "two": 0.25}}
    assert student.domains.keys() == {"sort", "reverse"}
    assert DistillConfig.model_validate(student.config).teacher_weights["sort"]["two"] == 0.25


def test_only_the_ratio_of_teacher_weights_is_in_the_key(tmp_path: Path) -> None:
    def key(weights: dict[str, float] | str) -> str:
        merge = {"teachers": {"sort": weights, "reverse": "reverse"}}
        return graph_of(tmp_path, experts=TWINS, merge=merge).node("student@0").key

    assert key({"one": 3, "two": 1}) == key({"two": 0.25, "one": 0.75})
    assert key({"one": 3, "two": 1}) != key({"one": 1, "two": 1})
    assert key("one") == key({"one": 9}) != key("two")


def test_an_option_of_a_domain_is_checked_while_planning(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"domains\.sort\.options\.max_lenght: unknown key — did you mean 'max_length'"):
        graph_of(tmp_path, ["domains.sort.options.max_lenght=5"])


def test_an_adapter_keeps_the_shape_of_its_start(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="experts/sort: its lora"):
        graph_of(tmp_path, ["cold_start.sft.lora={rank: 4}", "experts.sort.train.rl.lora={rank: 8}"])


def test_a_local_base_is_keyed_by_its_content(tmp_path: Path) -> None:
    folder = pretend_checkpoint(tmp_path / "model")
    base = {"checkpoint": str(folder)}
    before = graph_of(tmp_path, base=base)
    assert changed(before, graph_of(tmp_path, base=base)) == set()
    pretend_checkpoint(folder, changed=True)
    assert changed(before, graph_of(tmp_path, base=base)) == {node.id for node in before.nodes}
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="not a Hugging Face checkpoint"):
        graph_of(tmp_path, base=base)
