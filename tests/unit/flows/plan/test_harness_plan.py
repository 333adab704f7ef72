"""lm-evaluation-harness tasks in the plan: their nodes, what changes their keys, and what is said of a mistake."""

import importlib.metadata
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from base.errors import UserError
from base.store.checkpoint import Store
from evals.measure.harness_tasks import index_tasks, task_fingerprint
from flows.champion.results import collect
from flows.check.check import deep_check
from flows.engines.process_spec import ProcessSpec
from flows.plan import graph as plan
from flows.plan.graph import build_graph
from flows.plan.nodes import StageGraph
from tests.support.harness_home import write_tasks
from tests.unit.flows.plan.test_check import FEW, SORT_ALONE
from tests.unit.flows.run_file.test_config import MINIMAL, load, message

TASKS = ["choice", "text"]
CHECKPOINTS = ["base", "cold_start", "experts/sort", "experts/reverse", "student"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tasks(tmp_path / "tasks")


def graph_of(tmp_path: Path, folder: Path | None, **settings) -> StageGraph:
    harness = {"tasks": TASKS, **({"include_path": str(folder)} if folder else {}), **settings}
    return build_graph(load(tmp_path, evaluate={**MINIMAL.get("evaluate", {}), "harness": harness}), tmp_path / "home")


def keys(graph: StageGraph) -> dict[str, str]:
    return {node.id: node.key for node in graph.nodes}


def changed(before: StageGraph, after: StageGraph) -> set[str]:
    """Tasks of which some node's key changed; every other key must have stayed."""
    first, second = keys(before), keys(after)
    assert first.keys() == second.keys()
    moved = {name for name, key in first.items() if second[name] != key}
    names = {before.node(name).config.get("task", name) for name in moved}
    assert len(moved) == len(names) * len(CHECKPOINTS)
    return names


@pytest.mark.harness
def test_every_checkpoint_is_scored_on_every_task_and_nothing_else_changes(tmp_path: Path, folder: Path) -> None:
    graph, without = graph_of(tmp_path, folder), build_graph(load(tmp_path), tmp_path / "home")
    added = {name for name in keys(graph) if name not in keys(without)}
    assert added == {f"eval/{c}/harness.{task}/held_out@0" for c in CHECKPOINTS for task in TASKS}
    assert keys(without).items() <= keys(graph).items()
    node = graph.node("eval/student/harness.choice/held_out@0")
    assert (node.stage, dict(node.parents), dict(node.domains)) == ("harness", {"checkpoint": "student@0"}, {})
    assert {node.name for node in graph.checkpoints} == set(CHECKPOINTS)
    job = ProcessSpec.of(graph, [n for n in graph.evaluations("student@0") if n.stage == "harness"], tmp_path, 1)
    assert not job.training
    with pytest.raises(ValueError, match="evaluations of one checkpoint"):
        ProcessSpec.of(graph, graph.evaluations("student@0"), tmp_path, 1)


@pytest.mark.harness
def test_the_harness_has_a_process_of_its_own(tmp_path: Path, folder: Path) -> None:
    from flows.run.schedule import jobs_of

    graph = graph_of(tmp_path, folder)
    of_student = {job.id: {node.stage for node in job.nodes} for job in jobs_of(graph) if "student@0" in job.parents}
    assert of_student["eval/student@0"] == {"evaluate"}
    assert of_student["harness/student@0"] == {"harness"}
    assert all(not job.training for job in jobs_of(graph) if job.id.startswith(("eval/", "harness/")))


@pytest.mark.parametrize(
    ("change", "tasks"),
    [
        (lambda folder: (folder / "choice.jsonl").write_text("{}\n"), {"choice"}),
        (lambda folder: (folder / "base_text.yaml").open("a").write("description: Now.\n"), {"text"}),
        (lambda folder: (folder / "text.yaml").open("a").write("repeats: 2\n"), {"text"}),
        (lambda folder: (folder / "own.py").write_text("def docs(data):\n    return data\n"), {"text"}),
        (lambda folder: (folder / "unrelated.yaml").write_text("task: other\n"), set()),
    ],
)
@pytest.mark.harness
def test_a_task_has_the_key_of_all_its_files(tmp_path: Path, folder: Path, change: Callable, tasks: set[str]) -> None:
    (folder / "own.py").write_text("def docs(data):\n    return data[:1]\n")
    with (folder / "text.yaml").open("a") as file:
        file.write("process_docs: !function own.docs\n")
    before = graph_of(tmp_path, folder)
    change(folder)
    assert changed(before, graph_of(tmp_path, folder)) == tasks


@pytest.mark.parametrize(
    ("settings", "tasks"),
    [
        ({"limit": 5}, {"choice", "text"}),
        ({"num_fewshot": 2}, {"choice", "text"}),
        ({"chat_template": True}, {"choice", "text"}),
        ({"metrics": {"choice": "acc_norm"}}, {"choice"}),
    ],
)
@pytest.mark.harness
def test_settings_change_the_keys_of_the_tasks_they_concern(
    tmp_path: Path, folder: Path, settings: dict, tasks: set[str]
) -> None:
    assert changed(graph_of(tmp_path, folder), graph_of(tmp_path, folder, **settings)) == tasks


@pytest.mark.harness
def test_keys_follow_the_harnesses_version_and_not_the_place(tmp_path: Path, folder: Path, monkeypatch) -> None:
    before = graph_of(tmp_path, folder)
    shutil.move(folder, tmp_path / "moved")
    assert changed(before, graph_of(tmp_path, tmp_path / "moved")) == set()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "99.0")
    assert changed(before, graph_of(tmp_path, tmp_path / "moved")) == set(TASKS)


@pytest.mark.harness
def test_an_unknown_task_is_named_with_the_nearest_before_anything_runs(tmp_path: Path, folder: Path) -> None:
    harness = {"tasks": ["arc_esy", "choise", "mmlu", "arc_easy"], "include_path": str(folder)}
    config = load(tmp_path, [*FEW[:3], *FEW[4:], SORT_ALONE], evaluate={"examples": 5, "harness": harness})
    graph = build_graph(config, tmp_path / "home")
    with pytest.raises(UserError) as caught:
        deep_check(graph, Store(tmp_path / "home"))
    first, second, third = str(caught.value).splitlines()
    assert first == "evaluate.harness.tasks: no task 'arc_esy' — did you mean 'arc_easy'?"
    assert second == "evaluate.harness.tasks: no task 'choise' — did you mean 'choice'?"
    assert third.startswith("evaluate.harness.tasks: mmlu is a group; name its tasks (")


def test_without_the_harness_a_plan_that_asks_for_it_says_how_to_install_it(tmp_path: Path, monkeypatch) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(
        UserError, match=r"evaluate\.harness: .* not installed; `make setup-harness` .*the extra harness"
    ):
        graph_of(tmp_path, None)
    assert build_graph(load(tmp_path), tmp_path / "home").evaluations("student@0")


@pytest.mark.harness
def test_what_a_task_lacks_is_named(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(UserError, match=r"evaluate\.harness\.include_path: .*nowhere: no such directory"):
        graph_of(tmp_path, tmp_path / "nowhere")
    (folder / "group.yaml").write_text("group: text_group\ntask: [text]\n")
    with pytest.raises(UserError, match=r"group\.yaml: text_group is a group; name its tasks"):
        graph_of(tmp_path, folder, tasks=["text_group"])
    (folder / "text.jsonl").unlink()
    with pytest.raises(UserError, match=r"text\.yaml: dataset_kwargs\.data_files: there is no .*text\.jsonl"):
        graph_of(tmp_path, folder)
    (folder / "base_text.yaml").write_text("include: text.yaml\n")
    with pytest.raises(UserError, match=r"text\.yaml: includes itself"):
        graph_of(tmp_path, folder)
    (folder / "base_text.yaml").unlink()
    with pytest.raises(UserError, match=r"text\.yaml: there is no .*base_text\.yaml"):
        graph_of(tmp_path, folder)
    (folder / "text.yaml").write_text("task: text\nfilter_list: [\n")
    with pytest.raises(UserError, match=r"text\.yaml: not valid YAML"):
        graph_of(tmp_path, folder)


def test_mistakes_in_the_run_file_are_named(tmp_path: Path, folder: Path) -> None:
    def said(**harness) -> str:
        return message(tmp_path, evaluate={"harness": harness})

    assert "'choice' is named twice" in said(tasks=["choice", "choice"])
    assert "'a/b' is no task's name" in said(tasks=["a/b"])
    assert "metrics: 'choise' is not among tasks — did you mean 'choice'?" in said(
        tasks=TASKS, metrics={"choise": "acc"}
    )
    assert "evaluate.harness.task: unknown key — did you mean 'tasks'?" in said(task=TASKS)
    taken = {"harness.text": {"kind": "strings", "options": {"task": "sort"}}}
    config = load(tmp_path, evaluate={"harness": {"tasks": TASKS, "include_path": str(folder)}})
    with pytest.raises(UserError, match=r"domains\.harness\.text: evaluate\.harness has a task of this name"):
        plan.build_graph(config.model_copy(update={"domains": {**config.domains, **load_domains(taken)}}), tmp_path)


def load_domains(entries: dict) -> dict:
    """Entries of a run file's domains, validated."""
    from flows.run_file.schema import DomainConfig

    return {name: DomainConfig.model_validate(entry) for name, entry in entries.items()}


def test_data_is_found_in_every_form_and_below_folders(tmp_path: Path) -> None:
    folder = tmp_path / "forms"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "a.json").write_text("1")
    path = folder / "t.yaml"
    found = set()
    for kwargs in ("{data_files: data/a.json}", "{data_files: [data/*.json]}", "{data_dir: data}"):
        path.write_text(f"task: t\ndataset_path: json\ndataset_kwargs: {kwargs}\n")
        before = task_fingerprint(path)
        (folder / "data" / "a.json").write_text(f"{len(found)} changed")
        assert task_fingerprint(path) != before
        found |= {before, task_fingerprint(path)}
    assert len(found) == 6
    path.write_text("task: t\ndataset_path: json\ndataset_kwargs: {data_files: 'https://example.org/a.json'}\n")
    assert task_fingerprint(path)
    assert index_tasks(folder).tasks == {"t": path}


@pytest.mark.harness
def test_a_task_is_a_domain_no_expert_trains(tmp_path: Path, folder: Path) -> None:
    graph, store = graph_of(tmp_path, folder), Store(tmp_path / "home")
    for checkpoint, right in (("cold_start@0", 3), ("student@0", 1)):
        for node in graph.evaluations(checkpoint):
            drawn = {"completion": "", "tokens": 0, "truncated": False}
            rows = [
                {"id": str(i), "source": str(i), "prompt": "", "answer": "", "contaminated": False, "samples": []}
                | {"greedy": {**drawn, "score": float(i < right)}}
                for i in range(4)
            ]
            staged = store.staging(node.key)
            (staged / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            store.commit(staged, node.key, {"name": node.name, "stage": node.stage, "metrics": {}})
    results = collect(graph, store)
    assert results.domains[-2:] == ("harness.choice", "harness.text")
    assert set(results.untrained) == {"general", "harness.choice", "harness.text"}
    lost = results.difference(results.start, "student", "harness.choice")
    assert lost is not None
    assert lost.mean == 0.5


def test_a_hypothesis_may_be_about_a_task(tmp_path: Path, folder: Path) -> None:
    def hypothesis(task: str) -> dict:
        test = {"compare": ["student", "base"], "domains": [f"harness.{task}"], "expect": "above"}
        return {"claim": "It learns the task.", "tests": {"one": test}}

    evaluate = {"harness": {"tasks": TASKS, "include_path": str(folder)}}
    assert load(tmp_path, evaluate=evaluate, hypotheses={"H1": hypothesis("text")}).hypotheses
    said = message(tmp_path, evaluate=evaluate, hypotheses={"H1": hypothesis("txt")})
    assert "'harness.txt' is not a scored domain — did you mean 'harness.text'?" in said
