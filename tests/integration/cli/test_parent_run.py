"""What the parent run and the champion's page in MLflow say of a finished run, on a real SQLite store."""

import json
from pathlib import Path
from typing import Any

import pytest

from evals.tables.markdown import plain
from flows.champion.champion import first_of, judge_run, promote_by_gate
from flows.champion.results import collect
from flows.servers.pages import saved_pages
from flows.tracking.curves import tracked_name
from flows.tracking.models import LONGEST_NOTE, NOTE, note_within
from flows.tracking.tracker import Tracker
from tests.support.homes import with_databases
from tests.support.scored_home import finish, graph_of, run_file

TITLE = "tiny #3, + reverse"


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run of which everything was in the store, told to MLflow."""
    folder = tmp_path_factory.mktemp("told")
    file, home = run_file(folder), with_databases(folder / "home")
    graph = graph_of(file, home)
    store = finish(graph, home)
    results = collect(graph, store)
    verdict = judge_run(graph, store, results)
    promote_by_gate(graph, store, verdict)
    report = folder / "report.html"
    for name in ("report.html", "report.json", "scores.csv"):
        (folder / name).write_text("{}")
    tracker = Tracker.start(graph, home, file, title=TITLE)
    for node in graph.nodes:
        tracker.stage_cached(node, store.get(node.key))
    candidate = first_of(graph, verdict.candidate)
    tracker.finish("FINISHED", results, report, candidate, verdict)
    client = tracker.writer.client
    found = client.search_logged_models([tracker.writer.experiment])
    models = {model.tags["key"]: model for model in found}
    return {"graph": graph, "tracker": tracker, "client": client, "models": models, "home": home, "verdict": verdict}


def note(told: dict[str, Any], node_id: str) -> str:
    return str(told["models"][told["graph"].node(node_id).key].tags[NOTE])


def test_the_parent_run_has_a_dozen_metrics_and_no_intervals(told: dict[str, Any]) -> None:
    run = told["client"].get_run(told["tracker"].run_id)
    own = {f"eval/{domain}/{role}" for domain in ("sort", "reverse") for role in ("student", "teacher", "gap")}
    mean = {f"eval/mean/{role}" for role in ("student", "teacher", "start")}
    assert set(run.data.metrics) == own | mean | {"eval/recovery"}
    assert run.data.metrics["eval/mean/student"] == pytest.approx(0.8)
    assert run.data.metrics["eval/sort/gap"] == pytest.approx(0)


def test_a_list_of_runs_tells_them_apart(told: dict[str, Any]) -> None:
    run = told["client"].get_run(told["tracker"].run_id)
    assert run.info.run_name == TITLE
    assert run.data.tags["mean"] == "80.0%" and run.data.tags["verdict"] == told["verdict"].conclusion


def test_the_champions_page_has_teacher_start_recovery_verdict_and_links(told: dict[str, Any]) -> None:
    version = told["client"].get_model_version_by_alias("tiny-student", "champion")
    assert version.tags["key"] == told["graph"].node("baselines/ties@0").key
    text, run_id = version.description, told["tracker"].run_id
    # 57 of 60 against 48 and 24: 33 of the 24 gained.
    assert "| sort | held_out | 95.0 | 80.0 | 40.0 | 137.5 |" in text
    assert told["verdict"].conclusion in text
    assert f"[{plain(TITLE)}](/#/experiments/1/runs/{run_id}?workflowType=machine_learning)" in text
    assert f"[report](/#/experiments/1/runs/{run_id}/artifacts/report.html?workflowType=machine_learning)" in text
    # The candidate's verdict is not that of another merge.
    assert "| sort | held_out | 80.0 | 80.0 | 40.0 | 100.0 |" in note(told, "student@0")
    assert told["verdict"].conclusion not in note(told, "student@0")


def test_checkpoints_link_forward_to_what_was_made_from_them(told: dict[str, Any]) -> None:
    graph, models = told["graph"], told["models"]
    for parent, child in (
        ("base@0", "cold_start@0"),
        ("cold_start@0", "experts/sort@0"),
        ("experts/sort@0", "student@0"),
        ("experts/sort@0", "baselines/ties@0"),
    ):
        page = f"/#/experiments/1/models/{models[graph.node(child).key].model_id}?workflowType=machine_learning"
        assert f"[{child}]({page})" in note(told, parent)


def test_the_home_knows_the_pages_of_its_runs(told: dict[str, Any]) -> None:
    version = told["client"].get_model_version_by_alias("tiny-student", "champion").version
    run, mode = f"/#/experiments/1/runs/{told['tracker'].run_id}", "?workflowType=machine_learning"
    assert saved_pages(told["home"], "tiny") == {
        "run": run + mode,
        "lineage": f"{run}/artifacts/lineage.html{mode}",
        "champion": f"/#/models/tiny-student/versions/{version}{mode}",
    }
    (told["home"] / "runs" / "tiny" / "mlflow.json").write_text('["broken')
    assert saved_pages(told["home"], "tiny") == {}


def test_every_link_that_is_written_opens_mlflow_where_models_are(told: dict[str, Any]) -> None:
    links = [
        link.partition(")")[0]
        for model in told["models"].values()
        for link in model.tags[NOTE].split("](")[1:]
        if link.startswith("/#/")
    ]
    assert len(links) > 20 and all("workflowType=machine_learning" in link for link in links)


def test_histograms_have_no_name_in_mlflow_and_scores_over_time_share_one() -> None:
    assert tracked_name("distill/advantage_from_-inf_to_-5/sort") is None
    assert tracked_name("distill/score/sort") == "curve/sort/student"
    assert tracked_name("rl/score/sort") == "curve/sort/expert"
    assert tracked_name("distill/reverse_kl/sort") == "distill/reverse_kl/sort"


def test_the_report_has_the_histograms(tmp_path: Path) -> None:
    from evals.report.page import Background, write_report
    from tests.support.scored import results

    records = [{"step": 1, "values": {"distill/advantage_from_1_to_5/sort": 0.25, "distill/loss": 1.0}}]
    write_report(tmp_path / "report.html", results(), None, Background(curves={"student@0": records}))
    kept = json.loads((tmp_path / "report.json").read_text())["histograms"]
    assert kept == {"student@0": [{"step": 1, "values": {"distill/advantage_from_1_to_5/sort": 0.25}}]}


def test_a_long_description_is_cut_at_a_paragraph_and_says_so():
    assert note_within("short") == "short"
    long = "\n\n".join(["a paragraph of the report " * 20] * 40)
    cut = note_within(long)
    assert len(cut) <= LONGEST_NOTE and cut.endswith("among the artifacts.")
    assert cut.partition("\n\n…")[0] == long[: len(cut.partition("\n\n…")[0])] and "report \n\n…" in cut
