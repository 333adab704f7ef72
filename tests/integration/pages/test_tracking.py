"""What a run leaves in MLflow, on a real SQLite store and against a server that does not answer."""

import dataclasses
import json
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from base.store.checkpoint import Artifact, Store
from evals.promotion.criterion import Criterion
from evals.promotion.gate import GateVerdict
from flows.champion.champion import promote_by_gate
from flows.plan.lock import write_lock
from flows.plan.nodes import Node, StageGraph
from flows.tracking.models import NOTE
from flows.tracking.outbox import Doubtful, Rejected, Unreachable
from flows.tracking.tracker import Tracker
from flows.tracking.writer import Writer
from tests.support.homes import with_databases
from tests.support.lineage_home import commit, lab_graph

# The student stops before its last step.
STEPS = {"student@0": 5000}


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run in which base and cold start were cached and the rest trained."""
    home = with_databases(tmp_path_factory.mktemp("home"))
    graph = monitored(lab_graph())
    write_lock(graph, home)
    store = Store(home)
    cached = {id: commit(store, graph, graph.node(id)) for id in ("base@0", "cold_start@0")}
    tracker = Tracker.start(graph, home, run_file(home))
    for node_id, artifact in cached.items():
        tracker.stage_cached(graph.node(node_id), artifact)
    for node in graph.nodes:
        if node.id not in cached:
            play(tracker, store, graph, node)
    report = home / "report.html"
    report.write_text("<p>tables</p>")
    (home / "scores.csv").write_text("checkpoint,domain\n")
    (home / "report.json").write_text("{}")
    promote_by_gate(graph, store, GateVerdict("student", "the only merge", (Criterion("all", True, ""),)))
    tracker.finish("FINISHED", None, report, graph.node("student@0"))
    return {"home": home, "graph": graph, "store": store, "tracker": tracker, "client": tracker.writer.client}


def run_file(home: Path) -> Path:
    path = home / "run.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("name: lab\n")
    return path


def monitored(graph: StageGraph) -> StageGraph:
    """The graph with a student that is measured on six examples while it trains."""
    student = graph.node("student@0")
    config = {**student.config, "max_steps": STEPS["student@0"], "monitor": {"every": 50, "examples": 6}}
    watched = dataclasses.replace(student, config=config)
    nodes = tuple(watched if node is student else node for node in graph.nodes)
    return dataclasses.replace(graph, nodes=nodes)


def play(tracker: Tracker, store: Store, graph: StageGraph, node: Node) -> Artifact:
    """Let a node run: a journal in two pieces, then its artifact."""
    run = tracker.stage_started(node)
    records = [
        {"time": 1000.0 + step, "step": step, "kind": "metrics", "values": values(node.stage, step)}
        for step in range(1, 1201)
    ]
    sample = {"time": 1.0, "step": 3, "kind": "sample", "prompt": "3 1 2", "completion": "1 2 3", "score": 1.0}
    run.forward(records[:7])
    total = STEPS.get(node.id, 1200)
    run.forward([*records[7:], sample, {"time": 1.0, "step": 1200, "kind": "progress", "total": total}])
    if total > 1200:
        run.forward([{"time": 1.0, "step": 1200, "kind": "note", "text": "stopped early: no domain improved"}])
    shown = {"sort": [{"prompt": "sort cab:", "answer": "abc"}]}
    artifact = commit(store, graph, node, examples=shown)
    run.finish("FINISHED", artifact)
    return artifact


def values(stage: str, step: int) -> dict[str, float]:
    found = {f"{stage}/loss": 1.0 / step, f"{stage}/loss/sort": 1.0 / step}
    if stage == "distill":
        found[f"{stage}/advantage_from_0.1_to_1/sort"] = 0.5
        found |= {f"{stage}/score/sort": step / 1200} if step % 50 == 0 else {}
    return found


def children(tracked: dict[str, Any]) -> dict[str, Any]:
    client, tracker = tracked["client"], tracked["tracker"]
    found = client.search_runs([tracker.writer.experiment], f"tags.`mlflow.parentRunId` = '{tracker.run_id}'")
    return {run.info.run_name: client.get_run(run.info.run_id) for run in found}


def models(tracked: dict[str, Any]) -> dict[str, Any]:
    found = tracked["client"].search_logged_models([tracked["tracker"].writer.experiment])
    return {model.tags["key"]: model for model in found}


def history(tracked: dict[str, Any], node_id: str, metric: str) -> list[tuple[int, float]]:
    run_id = children(tracked)[node_id].info.run_id
    found = tracked["client"].get_metric_history(run_id, metric)
    return [(point.step, point.value) for point in sorted(found, key=lambda point: (point.step, point.timestamp))]


def test_final_metrics_stand_at_the_last_step_of_a_curve_and_not_at_its_first(tracked):
    for node_id, stage in (("experts/sort@0", "rl"), ("experts/caesar@0", "sft"), ("student@0", "distill")):
        points = history(tracked, node_id, f"{stage}/loss")
        assert [step for step, _ in points] == [*range(1, 1201), 1200]
        assert points[-1] == (1200, 0.25)
        model = models(tracked)[tracked["graph"].node(node_id).key]
        assert {(m.key, m.step) for m in model.metrics} >= {
            (f"{stage}/loss", 1200),
            ("eval/sort/held_out/greedy", 1200),
        }
        assert history(tracked, node_id, "eval/sort/held_out/greedy") == [(1200, 0.75)]


def test_start_and_teacher_stand_beside_the_students_score_over_time(tracked):
    points = history(tracked, "student@0", "curve/sort/student")
    assert [step for step, _ in points] == list(range(50, 1201, 50))
    # Of the monitor's six examples, not of the evaluation's eight.
    for role in ("teacher", "start"):
        for domain in ("sort", "caesar"):
            assert history(tracked, "student@0", f"curve/{domain}/{role}") == [(0, pytest.approx(5 / 6)), (5000, 5 / 6)]
    run = children(tracked)["student@0"]
    assert "plot_metric_keys" in run.data.tags[NOTE] and "curve%2Fsort%2Fteacher" in run.data.tags[NOTE]
    assert not [name for run in children(tracked).values() for name in run.data.metrics if "advantage_from" in name]


def test_a_child_run_for_each_stage_that_trained_and_none_for_cached_or_evaluations(tracked):
    runs = children(tracked)
    assert set(runs) == {"experts/sort@0", "experts/caesar@0", "student@0"}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert runs["experts/sort@0"].data.tags["key"] == tracked["graph"].node("experts/sort@0").key
    parent = tracked["client"].get_run(tracked["tracker"].run_id)
    assert parent.info.status == "FINISHED"
    assert parent.data.params["seeds"] == "[0]"
    assert "student" in parent.data.tags["mlflow.note.content"]


def test_the_whole_journal_arrives_with_its_steps_and_times(tracked):
    run = children(tracked)["experts/sort@0"]
    history = tracked["client"].get_metric_history(run.info.run_id, "rl/loss/sort")
    assert len(history) == 1200
    assert (history[-1].step, history[-1].timestamp) == (1200, 2_200_000)
    assert "samples.json" in {file.path for file in tracked["client"].list_artifacts(run.info.run_id)}


def test_a_checkpoint_names_its_parents_data_and_files(tracked):
    graph, known = tracked["graph"], models(tracked)
    student = graph.node("student@0")
    run = children(tracked)["student@0"]
    parents = {graph.node(parent).key for parent in student.parents.values()}
    assert {i.model_id for i in run.inputs.model_inputs} == {known[key].model_id for key in parents}
    assert [o.model_id for o in run.outputs.model_outputs] == [known[student.key].model_id]
    assert {d.dataset.name for d in run.inputs.dataset_inputs} >= {"sort/train", "caesar/train"}
    model = known[student.key]
    artifact = tracked["store"].find(student.key)
    assert model.params["uri"] == artifact.uri
    assert model.params["digest"] == artifact.digest
    for key in parents:
        assert (
            f"/#/experiments/{model.experiment_id}/models/{known[key].model_id}?workflowType="
            in model.tags["mlflow.note.content"]
        )


def test_descriptions_end_with_the_scores_of_the_checkpoint(tracked):
    graph, known, runs = tracked["graph"], models(tracked), children(tracked)
    model = known[graph.node("student@0").key]
    (version,) = tracked["client"].search_model_versions("name = 'lab-student'")
    for note in (model.tags[NOTE], version.description, runs["student@0"].data.tags[NOTE]):
        assert "| sort | held_out | 75.0 |" in note and "Made from:" in note
    assert "champion" in tracked["client"].get_registered_model("lab-student").description


def test_some_of_the_data_is_a_table_beside_the_samples(tracked):
    run = children(tracked)["experts/sort@0"]
    tables = json.loads(run.data.tags["mlflow.loggedArtifacts"])
    assert [table["path"] for table in tables] == ["samples.json", "data.json"]
    path = tracked["client"].download_artifacts(run.info.run_id, "data.json")
    assert json.loads(Path(path).read_text())["data"] == [["sort", "sort cab:", "abc"]]


def test_an_early_stop_and_its_reason_are_tags_of_a_finished_run(tracked):
    runs = children(tracked)
    tags = runs["student@0"].data.tags
    assert tags["stopped_early"] == "step 1200 of 5000"
    assert tags["notes"] == "step 1200: stopped early: no domain improved"
    assert "stopped_early" not in runs["experts/sort@0"].data.tags
    assert "notes" not in runs["experts/sort@0"].data.tags


def test_an_evaluation_puts_its_metrics_with_their_dataset_on_the_checkpoint(tracked):
    model = models(tracked)[tracked["graph"].node("student@0").key]
    scores = {(m.key, m.dataset_name): m.value for m in model.metrics if m.key.startswith("eval/")}
    assert scores["eval/sort/held_out/greedy", "sort/held_out"] == pytest.approx(0.75)


def test_cached_checkpoints_are_inputs_of_the_parent_run(tracked):
    graph, known = tracked["graph"], models(tracked)
    parent = tracked["client"].get_run(tracked["tracker"].run_id)
    linked = {i.model_id for i in parent.inputs.model_inputs}
    assert linked == {known[graph.node(id).key].model_id for id in ("base@0", "cold_start@0")}
    assert {"report.html", "report.json", "scores.csv", "lineage.html", "run.yaml", "lock.json"} <= {
        file.path for file in tracked["client"].list_artifacts(parent.info.run_id)
    }


def test_the_student_is_candidate_and_champion(tracked):
    client = tracked["client"]
    key = tracked["graph"].node("student@0").key
    for alias in ("candidate", "champion"):
        version = client.get_model_version_by_alias("lab-student", alias)
        assert version.tags["key"] == key
        assert version.run_id == children(tracked)["student@0"].info.run_id


def test_a_second_run_with_everything_cached_repeats_nothing(tracked):
    home, graph, store = tracked["home"], tracked["graph"], tracked["store"]
    before = models(tracked)
    tracker = Tracker.start(graph, home, run_file(home))
    for node in graph.nodes:
        tracker.stage_cached(node, store.find(node.key))
    tracker.finish("FINISHED", None, None)
    assert set(models(tracked)) == set(before)
    assert len(tracked["client"].search_model_versions("name = 'lab-student'")) == 1
    parent = tracked["client"].get_run(tracker.run_id)
    assert len(parent.inputs.model_inputs) == len(graph.checkpoints)


def test_a_server_that_does_not_answer_stops_nothing_and_hears_it_all_later(tracked, tmp_path, monkeypatch):
    home, graph = with_databases(tmp_path / "home"), tracked["graph"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{probe.getsockname()[1]}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracker = Tracker.start(graph, home, run_file(home))
    for node in graph.nodes:
        play(tracker, tracker.store, graph, node)
    tracker.finish("FAILED", None, None)
    assert tracker.run_id == ""
    assert tracker.unsent > len(graph.nodes)
    kept = list((home / "runs" / "lab" / "unsent").glob("*.jsonl"))
    assert len(kept) == 1

    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracked["tracker"].writer.uri)
    later = Tracker.start(graph, home, run_file(home))
    later.finish("FINISHED", None, None)
    client = later.writer.client
    runs = {run.info.run_name: run.info for run in client.search_runs(["1"], f"tags.token = '{tracker.token}'")}
    assert len(client.get_metric_history(runs["experts/sort@0"].run_id, "rl/loss/sort")) == 1200
    assert {name: info.status for name, info in runs.items()} == {
        "lab": "FAILED",
        **{node.id: "FINISHED" for node in graph.checkpoints},
    }
    assert not list((home / "runs" / "lab" / "unsent").glob("*.jsonl"))


def test_a_second_home_of_one_process_has_a_store_of_its_own(tracked, tmp_path):
    graph, home = tracked["graph"], with_databases(tmp_path / "home")
    tracker = Tracker.start(graph, home, run_file(home))
    commit(tracker.store, graph, graph.node("base@0"))
    play(tracker, tracker.store, graph, graph.node("cold_start@0"))
    tracker.finish("FINISHED", None, None)
    assert tracker.writer.uri == f"sqlite:///{home / 'mlflow.db'}"
    assert (home / "mlflow.db").exists()
    names = {model.tags["key"] for model in tracker.writer.client.search_logged_models(["1"])}
    assert names == {graph.node(id).key for id in ("base@0", "cold_start@0")}


def test_a_run_whose_process_died_is_marked_killed_at_the_next_start(tracked):
    home, graph = tracked["home"], tracked["graph"]
    dead = Tracker.start(graph, home, run_file(home))
    dead.outbox._owned.release()
    after = Tracker.start(graph, home, run_file(home))
    after.finish("FINISHED", None, None)
    assert tracked["client"].get_run(dead.run_id).info.status == "KILLED"


def test_a_run_of_another_host_whose_home_has_the_same_path_is_let_be(tracked, monkeypatch):
    home, graph = tracked["home"], tracked["graph"]
    here = os.uname()
    elsewhere = os.uname_result((here.sysname, "elsewhere", here.release, here.version, here.machine))
    with monkeypatch.context() as patch:
        patch.setattr(os, "uname", lambda: elsewhere)
        distant = Tracker.start(graph, home, run_file(home))
    # Its locks are on the other host's disk.
    distant.outbox._owned.release()
    Tracker.start(graph, home, run_file(home)).finish("FINISHED", None, None)
    assert tracked["client"].get_run(distant.run_id).info.status == "RUNNING"


def test_what_an_error_of_the_server_means_for_an_operation(tracked):
    writer: Writer = tracked["tracker"].writer
    ids = dict(tracked["tracker"].outbox.ids)
    for operation, kind in (
        ({"op": "tag", "ref": "run", "name": "", "value": "x"}, Rejected),
        ({"op": "tag", "ref": "gone", "name": "a", "value": "x"}, Rejected),
        # Of a later version of this program, or an artifact store's own error.
        ({"op": "unheard_of"}, Doubtful),
        ({"op": "text", "ref": "run", "file": "a/../../b", "text": 3}, Doubtful),
    ):
        with pytest.raises((Rejected, Unreachable)) as caught:
            writer(operation, ids)
        assert caught.type is kind, operation


def test_what_never_was_a_tracking_server_is_waited_for(tracked, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "htp://nowhere")
    with pytest.raises(Unreachable) as caught:
        Writer(Store(tmp_path))({"op": "tag", "ref": "run", "name": "a", "value": "x"}, {"run": "1"})
    assert caught.type is Unreachable


def test_the_run_in_mlflow_leads_to_the_flow_run(tracked):
    tracker = Tracker.start(
        tracked["graph"], tracked["home"], run_file(tracked["home"]), "http://prefect/runs/flow-run/7"
    )
    tracker.finish("FINISHED", None, None)
    assert tracked["client"].get_run(tracker.run_id).data.tags["prefect"] == "http://prefect/runs/flow-run/7"


def test_stages_may_speak_from_several_threads(tracked):
    home, graph = tracked["home"], tracked["graph"]
    tracker = Tracker.start(graph, home, run_file(home))
    runs = [tracker.stage_started(node) for node in graph.checkpoints]

    def speak(run):
        for step in range(20):
            run.forward([{"time": float(step), "step": step, "kind": "metrics", "values": {"loss": float(step)}}])
        run.finish("KILLED", None)

    with ThreadPoolExecutor(len(runs)) as pool:
        list(pool.map(speak, runs))
    tracker.finish("KILLED", None, None)
    for node in graph.checkpoints:
        run_id = tracker.outbox.ids[node.id]
        assert len(tracked["client"].get_metric_history(run_id, "loss")) == 20
        assert tracked["client"].get_run(run_id).info.status == "KILLED"


def test_the_addresses_lead_to_the_run(tracked):
    tracker: Tracker = tracked["tracker"]
    assert f"/runs/{tracker.run_id}" in tracker.url
    assert (Path(tracked["home"]) / "mlflow.db").exists()
