"""Stages that a program of one's own makes: their settings, and what of them is part of the content key."""

from pathlib import Path

import pytest

from base.errors import UserError
from flows.check.programs import program_problems
from flows.plan.graph import build_graph
from flows.plan.nodes import StageGraph
from tests.unit.flows.run_file.test_config import MINIMAL, load, message

RUN = ["{python}", "train.py", "--model", "{start}", "--out", "{out}"]
PROGRAM = {"run": RUN, "files": ["train.py"], "environment": ["RATE"], "max_steps": 5}


def experts(**changes) -> dict:
    own = {"domain": "sort", "train": {"command": {**PROGRAM, **changes}}}
    return {**MINIMAL["experts"], "sort": own}


def graph_of(tmp_path: Path, text: str = "print()", merge: dict | None = None, **changes) -> StageGraph:
    (tmp_path / "train.py").write_text(text)
    merge = {**MINIMAL["merge"], **(merge or {})}
    return build_graph(load(tmp_path, experts=experts(**changes), merge=merge), tmp_path / "home")


def keys(graph: StageGraph) -> dict[str, str]:
    return {node.name: node.key for node in graph.nodes}


def test_a_program_is_a_stage_with_a_start_a_domain_and_a_key(tmp_path: Path) -> None:
    node = graph_of(tmp_path).node("experts/sort@0")
    assert (node.stage, node.parents, list(node.domains)) == ("command", {"start": "cold_start@0"}, ["sort"])
    assert node.config["files"] == [str(tmp_path / "train.py")]
    assert node.config["run"][1] == str(tmp_path / "train.py")


@pytest.mark.parametrize(
    "changed",
    [
        {"text": "print(1)"},
        {"max_steps": 6},
        {"examples": 7},
        {"run": [*RUN, "--rate", "1"]},
        {"environment": []},
    ],
)
def test_what_decides_the_result_changes_the_keys_of_the_expert_and_the_merge(tmp_path: Path, changed) -> None:
    before, after = keys(graph_of(tmp_path)), keys(graph_of(tmp_path, **changed))
    differing = {name for name in before if before[name] != after[name]}
    assert {"experts/sort", "student"} <= differing and "experts/reverse" not in differing


def test_the_folder_and_the_pattern_of_progress_change_no_key(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = keys(graph_of(tmp_path / "other", progress=r"(?P<step>\d+)"))
    assert keys(graph_of(tmp_path)) == other


def test_a_named_variable_is_part_of_the_key_by_its_hash(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("RATE", raising=False)
    unset = graph_of(tmp_path).node("experts/sort@0")
    monkeypatch.setenv("RATE", "secret")
    node = graph_of(tmp_path).node("experts/sort@0")
    assert node.key != unset.key and "secret" not in str(node)


def test_a_merge_and_a_variant_by_a_program_have_the_teachers_of_the_merge(tmp_path: Path) -> None:
    program = {"method": "command", "command": PROGRAM}
    graph = graph_of(tmp_path, merge={"variants": {"own": program}})
    ours, theirs = graph.node("student@0"), graph.node("variants/own@0")
    assert (ours.stage, theirs.stage) == ("distill", "merge_command")
    assert theirs.parents == ours.parents and list(theirs.domains) == list(ours.domains)
    assert graph_of(tmp_path, merge=program).node("student@0").stage == "merge_command"


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"run": ["train", "{uot}"]}, "'{uot}' is none of python, start"),
        ({"run": ["train", "{out"]}, "write {{ or }} for a brace"),
        ({"run": ["train"]}, "no argument has '{out}'"),
        ({"run": []}, "experts.sort.train.command.run"),
        ({"files": ["train.py", "train.py"]}, "'train.py' is named twice"),
        ({"environment": ["A B"]}, "experts.sort.train.command.environment"),
        ({"progress": "("}, "is no regular expression"),
        ({"progress": "(?P<loss>.)"}, "name a group `step`"),
    ],
)
def test_a_wrong_program_is_refused_by_its_key(tmp_path: Path, changed, text: str) -> None:
    assert text in message(tmp_path, experts=experts(**changed))


def test_a_method_without_its_program_is_refused(tmp_path: Path) -> None:
    for merge in ({"method": "command"}, {"command": PROGRAM}):
        assert "both method: command and the program" in message(tmp_path, merge={**MINIMAL["merge"], **merge})


def test_a_missing_file_is_named_with_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "trian.py").write_text("")
    config = load(tmp_path, experts=experts())
    with pytest.raises(UserError, match=r"experts\.sort\.train\.command\.files: .*train\.py: No such file.*trian\.py"):
        build_graph(config, tmp_path / "home")


def test_a_program_that_this_machine_lacks_is_named_before_the_run(tmp_path: Path) -> None:
    variants = {"variants": {"own": {"method": "command", "command": {**PROGRAM, "run": ["nosuch", "{out}"]}}}}
    graph = graph_of(tmp_path, run=["absent", "{out}"], merge=variants)
    problems = list(program_problems(list(graph.nodes)))
    assert [problem.split(" is no program")[0] for problem in problems] == [
        "experts.sort.train.command.run: 'absent'",
        "merge.variants.own.command.run: 'nosuch'",
    ]
    assert list(program_problems(list(graph_of(tmp_path).nodes))) == []
