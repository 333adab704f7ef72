"""The same merge with other settings beside it, and run files that extend others."""

from pathlib import Path

import pytest
import yaml

from base.errors import UserError
from flows.plan.graph import build_graph
from flows.plan.nodes import StageGraph
from flows.run_file.load import load_run_file
from tests.unit.flows.run_file.test_config import TWINS, load, message


def graph_of(tmp_path: Path, *overrides: str, **changes) -> StageGraph:
    return build_graph(load(tmp_path, list(overrides), **changes), tmp_path / "home")


def test_a_variant_is_a_node_beside_the_student_that_changes_nobodys_key(tmp_path: Path) -> None:
    without = {node.id: node.key for node in graph_of(tmp_path).nodes}
    graph = graph_of(tmp_path, "merge.variants={half: {on_policy_fraction: 0.5}, same: {}}")
    assert {node.id: node.key for node in graph.nodes if "variants/" not in node.name} == without
    student, half = graph.node("student@0"), graph.node("variants/half@0")
    assert graph.node("variants/same@0").key == student.key
    assert (half.stage, half.parents, half.config["on_policy_fraction"]) == ("distill", student.parents, 0.5)
    differing = {name for name, value in half.config.items() if student.config[name] != value}
    assert differing == {"on_policy_fraction"}
    assert len(graph.evaluations(half.id)) == len(graph.evaluations(student.id))


def test_settings_are_laid_over_and_teachers_replaced(tmp_path: Path) -> None:
    graph = graph_of(
        tmp_path,
        "merge.teachers={sort: one, reverse: reverse}",
        "merge.objective={type: reverse_kl, reference_kl: 0.1}",
        "merge.variants={other: {teachers: {sort: {one: 1, two: 3}}, objective: {reference_kl: 0.2}}}",
        experts=TWINS,
    )
    other = graph.node("variants/other@0")
    assert set(other.parents) == {"start", "teacher/sort/one", "teacher/sort/two", "teacher/general"}
    assert other.config["teacher_weights"] == {"sort": {"one": 0.25, "two": 0.75}}
    assert (other.config["objective"]["type"], other.config["objective"]["reference_kl"]) == ("reverse_kl", 0.2)
    assert graph.node("student@0").config["teacher_weights"] == {}


@pytest.mark.parametrize(
    ("variants", "said"),
    [
        ("{a: {max_step: 3}}", "merge.variants.a.max_step"),
        ("{a: {group_size: 0}}", "merge.variants.a.group_size"),
        (
            "{a: {teachers: {sort: sorte}}}",
            "merge.variants.a.teachers.sort: unknown expert 'sorte' — did you mean 'sort'?",
        ),
        ("{a: {baselines: [ties]}}", "merge.variants.a.baselines: set this in merge, not in a variant"),
        ("{a/b: {}}", "merge.variants.'a/b': a name is made of letters"),
        ("{a: {objective: {type: reverse_kl, outcome_weight: 1.0}}}", "it needs a group_size of 2 or more"),
    ],
)
def test_mistakes_name_the_variants_own_key(tmp_path: Path, variants: str, said: str) -> None:
    assert said in message(tmp_path, [f"merge.variants={variants}"])


def test_a_run_file_extends_another_key_by_key(tmp_path: Path) -> None:
    load(tmp_path)
    child = tmp_path / "runs" / "child.yaml"
    child.parent.mkdir()
    child.write_text(
        yaml.safe_dump({"extends": "../run.yaml", "name": "child", "merge": {"max_steps": 7}, "seeds": [4]})
    )
    config = load_run_file(child)
    assert (config.name, config.seeds, config.merge.max_steps) == ("child", [4], 7)
    assert config.merge.anchor.domains == ["general"]
    assert list(config.experts) == ["sort", "reverse"]


@pytest.mark.parametrize(
    ("extends", "said"),
    [
        ("run.yml", "no such run file"),
        ("child.yaml", "extends this file in turn"),
        (["run.yaml"], "extends: name one run file"),
    ],
)
def test_a_wrong_extends_is_explained(tmp_path: Path, extends, said: str) -> None:
    load(tmp_path)
    child = tmp_path / "child.yaml"
    child.write_text(yaml.safe_dump({"extends": extends, "name": "child"}))
    with pytest.raises(UserError, match=said):
        load_run_file(child)
