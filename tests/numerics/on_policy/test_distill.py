"""The distillation stage whole, on tiny checkpoints: every objective, who writes, what is recorded."""

import pytest

import stages.distill
import stages.on_policy.loop
import stages.rl
from base.store.checkpoint import Artifact
from base.store.journal import read
from experts.domain import Domain
from stages.config.distill import DistillConfig
from stages.config.objective import TopKConfig
from stages.config.on_policy import HealthConfig, RLConfig
from stages.config.training import OptimizerConfig
from stages.learner.workspace import Workspace
from stages.model.policy import Policy

SMALL = {"max_steps": 2, "examples": 40, "prompts_per_step": 6, "max_new_tokens": 8}
OBJECTIVES = {
    "forward_kl": DistillConfig(**SMALL, objective={"type": "forward_kl"}),
    "jsd": DistillConfig(**SMALL, objective={"type": "jsd"}),
    "entropy_aware": DistillConfig(**SMALL, objective={"type": "entropy_aware"}),
    "top_k": DistillConfig(**SMALL, objective={"type": "reverse_kl", "top_k": TopKConfig(k=8, support="union")}),
    "extrapolated": DistillConfig(
        **SMALL, objective={"type": "reverse_kl", "extrapolation": 1.25, "reference_kl": 0.01}
    ),
    "sequence": DistillConfig(
        **SMALL,
        updates_per_batch=2,
        objective={"type": "sampled_reverse_kl", "importance": "mask", "importance_level": "sequence"},
    ),
    "golden": DistillConfig(**SMALL, objective={"type": "reverse_kl", "golden_share": 0.2}),
    "rewarded": DistillConfig(**SMALL, group_size=3, objective={"type": "reverse_kl", "outcome_weight": 0.5}),
    "teacher-written": DistillConfig(**SMALL, on_policy_fraction=0.5, group_size=2),
    "gold-written": DistillConfig(**SMALL, on_policy_fraction=0.0, off_policy="dataset"),
    "balanced": DistillConfig(**SMALL, loss_normalisation="domain"),
}


@pytest.fixture
def taught(checkpoint, domains: dict[str, Domain]) -> tuple[dict[str, Artifact], dict[str, Domain]]:
    """Parents and domains of a merge: two teachers, and the start as the anchor."""
    parents = {"start": checkpoint("start", 0), "teacher/sort": checkpoint("one", 1)}
    return parents | {"teacher/reverse": checkpoint("two", 2), "teacher/uppercase": parents["start"]}, domains


def records(place: Workspace, kind: str) -> list[dict]:
    return [record for record in read(place.folder / "journal.jsonl") if record["kind"] == kind]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_moves_the_student(name, taught, workspace):
    parents, domains = taught
    place = workspace(name, parents, domains)
    student = stages.distill.train(OBJECTIVES[name], place)
    assert student.digest != parents["start"].digest
    steps = [record["values"] for record in records(place, "metrics")]
    assert len(steps) == 2
    assert all(values["distill/grad_norm"] > 0 for values in steps)
    assert steps[0]["distill/reverse_kl"] > 0.01
    # The anchor is the start itself: nothing to learn there before the first update has moved the student.
    anchored = steps[0].get("distill/reverse_kl/uppercase")
    if OBJECTIVES[name].updates_per_batch == 1 and OBJECTIVES[name].objective.extrapolation == 1:
        assert abs(anchored) < 1e-6


def test_the_student_names_who_taught_it_what(taught, workspace):
    parents, domains = taught
    config = DistillConfig(**SMALL, objective={"type": "jsd", "beta": 0.3}, domain_weights={"sort": 4.0})
    student = stages.distill.train(config, workspace("student", parents, domains))
    by_domain = {entry["domain"]: entry for entry in student.manifest["teachers"]}
    assert list(by_domain) == ["reverse", "sort", "uppercase"]
    assert by_domain["sort"]["digest"] == parents["teacher/sort"].digest
    assert by_domain["sort"]["prompt_share"] == pytest.approx(4 / 6)
    assert by_domain["uppercase"]["teacher"] == "start"
    assert by_domain["reverse"]["objective"]["type"] == "jsd"
    assert by_domain["reverse"]["objective"]["beta"] == 0.3


def test_several_teachers_share_a_domain_by_weight(taught, workspace):
    parents, domains = taught
    parents = dict(parents) | {"teacher/sort/a": parents["teacher/sort"], "teacher/sort/b": parents["teacher/reverse"]}
    del parents["teacher/sort"]
    config = DistillConfig(**SMALL, teacher_weights={"sort": {"a": 3.0, "b": 1.0}})
    place = workspace("student", parents, domains)
    student = stages.distill.train(config, place)
    first = records(place, "metrics")[0]["values"]
    # Up to a constant the divergence from the mean is the weighted sum of those from each.
    apart = {name: first[f"distill/reverse_kl_from/{name}/sort"] for name in ("one", "two")}
    assert 0 < first["distill/reverse_kl/sort"] <= 0.75 * apart["one"] + 0.25 * apart["two"]
    assert "distill/reverse_kl_from/one/reverse" not in first
    assert first["distill/reverse_kl_from/two/reverse"] == pytest.approx(first["distill/reverse_kl/reverse"], rel=1e-4)
    weights = {e["teacher"]: e["weight"] for e in student.manifest["teachers"] if e["domain"] == "sort"}
    assert weights == {"one": 0.75, "two": 0.25}


def test_prompts_the_student_does_not_answer_are_answered_by_teacher_or_dataset(taught, workspace):
    parents, domains = taught
    place = workspace("gold", parents, domains)
    stages.distill.train(OBJECTIVES["gold-written"], place)
    shown = records(place, "sample")
    assert shown
    for record in shown:
        assert record["answer"].startswith(record["completion"])
    # What the teachers write does not depend on the student: another start, the same completions.
    written = []
    for start in ("teacher/sort", "teacher/reverse"):
        place = workspace(f"from-{start[-4:]}", parents | {"start": parents[start]}, domains)
        stages.distill.train(DistillConfig(**SMALL, on_policy_fraction=0.0), place)
        written.append([record["completion"] for record in records(place, "sample")])
    assert written[0] == written[1] != []


def test_a_plateau_ends_the_stage_early_and_says_so(taught, workspace):
    parents, domains = taught
    # A student that cannot learn cannot improve.
    still = {
        **SMALL,
        "max_steps": 30,
        "optimizer": OptimizerConfig(learning_rate=1e-12),
        "health": HealthConfig(patience=5, window=2, min_improvement=0.5),
    }
    place = workspace("student", parents, domains)
    student = stages.distill.train(DistillConfig(**still), place)
    steps = [record["step"] for record in records(place, "metrics")]
    assert 5 < steps[-1] < 30
    (note,) = [record["text"] for record in records(place, "note") if "stopped early" in record["text"]]
    assert f"step {steps[-1]} of 30" in note
    assert "sort" in note
    assert student.manifest["teachers"]


def test_a_stage_that_stopped_early_and_was_killed_before_its_commit_keeps_its_metrics(taught, workspace, monkeypatch):
    parents, domains = taught
    still = {
        **SMALL,
        "max_steps": 30,
        "save_every": 1,
        "optimizer": OptimizerConfig(learning_rate=1e-12),
        "health": HealthConfig(patience=5, window=2, min_improvement=0.5),
    }
    finish = stages.on_policy.loop.finish
    place = workspace("student", parents, domains)

    def killed(*arguments: object) -> Artifact:
        raise KeyboardInterrupt

    monkeypatch.setattr(stages.on_policy.loop, "finish", killed)
    with pytest.raises(KeyboardInterrupt):
        stages.distill.train(DistillConfig(**still), place)
    monkeypatch.setattr(stages.on_policy.loop, "finish", finish)
    student = stages.distill.train(DistillConfig(**still), place)
    last = records(place, "metrics")[-1]["values"]
    assert last["distill/reverse_kl"] > 0
    assert student.manifest["metrics"] == last


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["reverse_kl", "sampled_reverse_kl"])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(name, dtype, taught, workspace):
    parents, domains = taught
    same = {role: parents["start"] for role in parents}
    # The sampled estimator also meets tokens the teachers wrote, whose rows it must not blame.
    config = DistillConfig(**SMALL, dtype=dtype, on_policy_fraction=0.5, objective={"type": name})
    place = workspace("student", same, domains)
    stages.distill.train(config, place)
    first = records(place, "metrics")[0]["values"]
    assert first["distill/grad_norm"] < 1e-6
    assert abs(first["distill/reverse_kl"]) < 1e-7


def test_lengths_and_rewards_are_the_students_own(taught, workspace):
    parents, domains = taught
    logged = {}
    # A student of random weights hardly ever ends by itself; gold answers are short and right.
    for fraction in (1.0, 0.5, 0.0):
        config = DistillConfig(
            **{**SMALL, "max_new_tokens": 24, "prompts_per_step": 12},
            on_policy_fraction=fraction,
            off_policy="dataset",
        )
        place = workspace(f"student-{fraction}", parents, domains)
        stages.distill.train(config, place)
        logged[fraction] = records(place, "metrics")[0]["values"]
    assert logged[1.0]["distill/length"] > 16
    assert logged[0.5]["distill/length"] > 16
    assert logged[0.0]["distill/length"] < 12


@pytest.mark.parametrize("stage", ["distill", "rl"])
def test_a_monitor_draws_the_learning_curve(stage, taught, workspace):
    parents, domains = taught
    asked: list[int] = []
    seen: list[int] = []

    class Watch:
        examples = ()

        def fits(self, policy: Policy, context: int | None) -> bool:
            return True

        def due(self, step: int) -> bool:
            asked.append(step)
            return step % 2 == 0

        def __call__(self, policy: Policy, step: int, sampler: object = None) -> dict[str, float]:
            # The sampler is the student's own model.
            assert sampler is None
            assert not policy.model.training
            seen.append(step)
            return {"score/sort": step / 10}

    monitor = Watch()

    place = workspace("student", parents, domains)
    if stage == "distill":
        stages.distill.train(DistillConfig(**SMALL), place, monitor)
    else:
        stages.rl.train(RLConfig(**SMALL, group_size=4), place, monitor)
    assert (asked, seen) == ([0, 1, 2], [0, 2])
    curve = {r["step"]: r["values"].get(f"{stage}/score/sort") for r in records(place, "metrics")}
    assert curve == {0: 0.0, 1: None, 2: 0.2}
