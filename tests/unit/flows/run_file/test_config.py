"""The run file: every mistake is said in one message that names the key and the nearest valid choice."""

import re
from pathlib import Path

import pytest
import yaml

from base.errors import UserError
from flows.plan.graph import build_graph
from flows.run_file.load import load_run_file
from flows.run_file.schema import RunConfig

RUNS = Path(__file__).parents[4] / "flows" / "runs"
MINIMAL = {
    "name": "tiny",
    "base": {"pretrain": {"max_steps": 5}},
    "domains": {
        "sort": {"kind": "strings", "options": {"task": "sort"}},
        "reverse": {"kind": "strings", "options": {"task": "reverse"}},
        "general": {"kind": "strings", "options": {"task": "uppercase"}},
    },
    "cold_start": {"sft": {"max_steps": 5}},
    "experts": {
        "sort": {"domain": "sort", "train": {"rl": {"max_steps": 5}}},
        "reverse": {"domain": "reverse", "train": {"sft": {"max_steps": 5}}},
    },
    "merge": {"max_steps": 5, "anchor": {"domains": ["general"]}},
    "evaluate": {"shift": None},
}
TWINS = {
    "one": MINIMAL["experts"]["sort"],
    "two": {"domain": "sort", "train": {"rl": {"max_steps": 6}}},
    "reverse": MINIMAL["experts"]["reverse"],
}


def alone(**teachers: str) -> dict[str, dict[str, float]]:
    """Routes of domains with one teacher each."""
    return {domain: {teacher: 1.0} for domain, teacher in teachers.items()}


def load(tmp_path: Path, overrides: list[str] | None = None, max_steps: int | None = None, **changes) -> RunConfig:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**MINIMAL, **changes}, sort_keys=False))
    return load_run_file(path, overrides, max_steps)


def message(tmp_path: Path, overrides: list[str] | None = None, **changes) -> str:
    with pytest.raises(UserError) as caught:
        load(tmp_path, overrides, **changes)
    return str(caught.value)


@pytest.mark.parametrize("file", sorted(RUNS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_run_files_are_valid(file: Path) -> None:
    config = load_run_file(file)
    assert bool(config.teachers()) == (file.stem != "ground")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed=[1]", "seed: unknown key — did you mean 'seeds'?"),
        (
            "experts.sort.train.rl.max_step=3",
            "experts.sort.train.rl.max_step: unknown key — did you mean 'max_steps'?",
        ),
        ("merge.anchor.domain=[sort]", "merge.anchor.domain: unknown key — did you mean 'domains'?"),
        (
            "cold_start.sft.optimizer.learning_rat=1",
            "cold_start.sft.optimizer.learning_rat: unknown key — did you mean 'learning_rate'?",
        ),
        (
            "domains.sort.option={}",
            "domains.sort.option: unknown key — did you mean 'options'?",
        ),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest(tmp_path: Path, override: str, said: str) -> None:
    assert said in message(tmp_path, [override])


def test_a_wrong_value_is_named_with_what_was_given(tmp_path: Path) -> None:
    said = message(tmp_path, ["experts.sort.train.rl.max_steps=-4"])
    assert "experts.sort.train.rl.max_steps" in said
    assert "given: -4" in said


def test_all_dangling_names_are_said_at_once(tmp_path: Path) -> None:
    said = message(
        tmp_path,
        [
            "experts.sort.domain=srot",
            "merge.teachers={sort: sorrt}",
            "merge.start_from=cold_strat",
            "evaluate.domains=[generall]",
            "domains.general.kind=string",
        ],
    )
    assert "experts.sort.domain: unknown domain 'srot' — did you mean 'sort'?" in said
    assert "merge.teachers.sort: unknown expert 'sorrt' — did you mean 'sort'?" in said
    assert "merge.start_from: unknown checkpoint 'cold_strat' — did you mean 'cold_start'?" in said
    assert "evaluate.domains: unknown domain 'generall' — did you mean 'general'?" in said
    assert "domains.general.kind: unknown kind 'string' — did you mean 'strings'?" in said
    assert len(said.splitlines()) == 5


def test_an_expert_may_not_take_a_stages_name(tmp_path: Path) -> None:
    assert "experts.student: the name is taken" in message(
        tmp_path, experts={"student": {"domain": "sort", "train": {"sft": {}}}}
    )


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("base.gguf=x.gguf", "exactly one of pretrain, checkpoint, gguf"),
        ("experts.sort.train.sft={}", "exactly one of sft, rl"),
        ("experts.sort.checkpoint=some/model", "exactly one of train, checkpoint"),
        ("base.revision=main", "revision goes with checkpoint"),
        ("merge.objective={type: jsd, outcome_weight: 0.5}", "needs a group_size of 2 or more"),
        ("merge.optimizer.learning_rate=.inf", "learning_rate: Input should be a finite number"),
        (
            "merge.objective={type: jsd, top_k: {k: 1, remainder: renormalise}}",
            "one token of probability 1 for every student",
        ),
    ],
)
def test_contradictions_are_refused(tmp_path: Path, override: str, said: str) -> None:
    assert said in message(tmp_path, [override])


def test_overrides_are_yaml_and_reach_deep(tmp_path: Path) -> None:
    config = load(tmp_path, ["seeds=[0,1]", "experts.sort.train.rl.max_steps=50", "evaluate.domains=[sort]"])
    assert config.seeds == [0, 1]
    assert config.experts["sort"].train is not None
    assert config.experts["sort"].train.rl is not None
    assert config.experts["sort"].train.rl.max_steps == 50
    assert config.evaluate.domains == ["sort"]


@pytest.mark.parametrize(
    ("override", "said"),
    [("seeds", "write KEY=VALUE"), ("name.x=1", "not a mapping"), ("seeds=[1", "not valid YAML")],
)
def test_a_malformed_override_is_explained(tmp_path: Path, override: str, said: str) -> None:
    assert said in message(tmp_path, [override])


def test_an_override_of_one_alias_leaves_the_other(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    shared = {"rl": {"max_steps": 5}}
    experts = {name: {"domain": name, "train": shared} for name in ("sort", "reverse")}
    text = yaml.safe_dump({**MINIMAL, "experts": experts}, sort_keys=False)
    assert "*id" in text
    path.write_text(text)
    config = load_run_file(path, ["experts.sort.train.rl.max_steps=9"])
    steps = {name: expert.train.rl.max_steps for name, expert in config.experts.items()}
    assert steps == {"sort": 9, "reverse": 5}


def test_max_steps_caps_and_never_raises(tmp_path: Path) -> None:
    config = load(tmp_path, ["base.pretrain.max_steps=2"], max_steps=3)
    assert config.base.pretrain is not None
    assert config.cold_start is not None
    assert config.merge is not None
    assert config.base.pretrain.max_steps == 2
    assert config.cold_start.sft.max_steps == 3
    assert config.merge.max_steps == 3


def test_a_missing_file_names_its_nearest_sibling(tmp_path: Path) -> None:
    (tmp_path / "lab.yaml").write_text("name: lab")
    with pytest.raises(UserError, match=r"lav\.yaml: no such run file — did you mean '.*lab\.yaml'"):
        load_run_file(tmp_path / "lav.yaml")


def test_broken_yaml_is_a_user_error(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("name: [")
    with pytest.raises(UserError, match="not valid YAML"):
        load_run_file(path)
    path.write_text("- a list")
    with pytest.raises(UserError, match="mapping of keys"):
        load_run_file(path)


def test_teachers_are_routed_by_name_domain_and_anchor(tmp_path: Path) -> None:
    assert load(tmp_path).teachers() == alone(sort="sort", reverse="reverse", general="cold_start")
    renamed = {"sorter": MINIMAL["experts"]["sort"]}
    assert load(tmp_path, experts=renamed).teachers() == alone(sort="sorter", general="cold_start")


def test_ambiguous_and_missing_teachers_are_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"merge\.teachers: domain 'sort' has 2 experts \(one, two\); .*one: 1\.0"):
        load(tmp_path, experts=TWINS).teachers()
    with pytest.raises(UserError, match="'general' has no teacher"):
        load(tmp_path, merge={"domains": ["sort", "general"]}).teachers()
    with pytest.raises(UserError, match="already has the teacher"):
        load(tmp_path, ["merge.anchor.domains=[sort]"]).teachers()


def test_a_fallback_teacher_takes_what_is_left(tmp_path: Path) -> None:
    config = load(tmp_path, merge={"domains": ["sort", "general"], "fallback_teacher": "base"})
    assert config.teachers() == alone(sort="sort", general="base")


def test_several_teachers_of_a_domain_share_it_by_weight(tmp_path: Path) -> None:
    taught = {"sort": {"one": 3, "two": 1}, "reverse": "reverse"}
    config = load(tmp_path, experts=TWINS, merge={"teachers": taught})
    assert config.teachers() == {"sort": {"one": 0.75, "two": 0.25}, "reverse": {"reverse": 1.0}}
    assert config.practised() == ["sort", "reverse"]


@pytest.mark.parametrize(
    ("merge", "said"),
    [
        ({"teachers": {"sort": {}}}, "merge.teachers.sort: name an expert, or several with their weights"),
        ({"teachers": {"sort": 3}}, "merge.teachers.sort: name an expert, or several with their weights"),
        (
            {"teachers": {"sort": {"one": 0}}},
            "merge.teachers.sort.one: Input should be greater than or equal to 0.000001 (given: 0)",
        ),
        (
            {"teachers": {"sort": {"one": -0.5}}},
            "merge.teachers.sort.one: Input should be greater than or equal to 0.000001 (given: -0.5)",
        ),
        ({"teachers": {"sort": {"one": float("inf")}}}, "merge.teachers.sort.one: Input should be a finite number"),
        (
            {"teachers": {"sort": {"one": 1, "tow": 1}}},
            "merge.teachers.sort: unknown expert 'tow' — did you mean 'two'?",
        ),
        ({"teachers": {"srt": {"one": 1}}}, "merge.teachers: unknown domain 'srt' — did you mean 'sort'?"),
        (
            {"teachers": {"sort": {"one": 1, "two": 1}}, "domains": ["reverse"]},
            "merge.teachers.sort: merge.domains leaves 'sort' out",
        ),
        (
            {"teachers": {"sort": "one"}, "teacher_weights": {"sort": {"one": 1}}},
            "merge.teacher_weights: unknown key",
        ),
        (
            {"teachers": {"sort": "one"}, "domain_weights": {"srot": 2}},
            "merge.domain_weights: unknown domain of the merge 'srot' — did you mean 'sort'?",
        ),
        (
            {"teachers": {"sort": "one", "reverse": "reverse"}, "max_domain_share": 0.4},
            "merge.max_domain_share: 0.4 for each of 2 domains does not add up to the whole loss; at least 0.5",
        ),
        (
            {"teachers": {"sort": "one"}, "objective": {"type": "reverse_kl", "importance": "mask"}},
            "importance belongs to sampled_reverse_kl or an outcome_weight",
        ),
    ],
)
def test_mistakes_in_teachers_and_weights_are_explained(tmp_path: Path, merge: dict, said: str) -> None:
    assert said in message(tmp_path, experts=TWINS, merge=merge)


def test_an_anchor_may_not_have_several_teachers_beside_it(tmp_path: Path) -> None:
    merge = {"teachers": {"sort": {"one": 1, "two": 1}}, "anchor": {"domains": ["sort"]}}
    with pytest.raises(UserError, match="'sort' already has the teacher 'one, two'"):
        load(tmp_path, experts=TWINS, merge=merge).teachers()


def test_a_name_with_a_slash_is_refused(tmp_path: Path) -> None:
    domains = MINIMAL["domains"] | {"a/b": MINIMAL["domains"]["sort"]}
    assert "domains.'a/b': a name is made of letters" in message(tmp_path, domains=domains)


def test_an_objectives_name_stands_for_its_defaults(tmp_path: Path) -> None:
    named, spelled = load(tmp_path, ["merge.objective=jsd"]), load(tmp_path, ["merge.objective={type: jsd}"])
    assert named.merge.objective == spelled.merge.objective


@pytest.mark.parametrize("backend", ["vllm", "vllm_server"])
@pytest.mark.parametrize("stage", ["rl", "rft", "merge"])
def test_a_temperature_that_vllm_does_not_sample_at_is_refused(tmp_path, backend, stage):
    """It draws below 0.01 as at 0.01, and the trainer would divide by another number."""

    def changes(temperature: float, **sampler: str) -> dict:
        own = {"max_steps": 5, "temperature": temperature, **({"sampler": sampler} if sampler else {})}
        if stage == "merge":
            return {"merge": MINIMAL["merge"] | own}
        sort = {"domain": "sort", "train": {stage: own}}
        return {"experts": MINIMAL["experts"] | {"sort": sort}}

    key = "merge" if stage == "merge" else f"experts.sort.train.{stage}"
    wrong = rf"temperature: 0\.005 is below 0\.01, and {backend} would sample at 0\.01 .* take 0\.01, or sampler"
    said = message(tmp_path, **changes(0.005, backend=backend))
    assert key in said and re.search(wrong, said)
    # The run's own sampler is known once the stages are planned.
    name = "student" if stage == "merge" else "experts/sort"
    with pytest.raises(UserError, match=rf"^{name}: {wrong}.*\(resources\.sampler: {backend}\)"):
        build_graph(load(tmp_path, resources={"sampler": backend}, **changes(0.005)), tmp_path)
    for fine in (changes(0.01, backend=backend), changes(0.005, backend="transformers"), changes(0.005)):
        build_graph(load(tmp_path, **fine), tmp_path)
    build_graph(load(tmp_path, resources={"sampler": backend}, **changes(0.01)), tmp_path)
