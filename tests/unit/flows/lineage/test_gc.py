"""Garbage: what nobody refers to any more; nothing that a registered student descends from, and nothing in use."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from base.errors import UserError
from base.store import mirror
from base.store.checkpoint import Store
from flows.cli.app import app
from flows.plan.lock import status
from flows.plan.nodes import StageGraph
from flows.tracking.gc import find_garbage, plan_lock, registered_keys, remove
from tests.support.scored_home import SHARES, finish, graph_of
from tests.unit.flows.plan.test_champion_start import crown

OTHER = "cold_start.sft.max_steps=9"


@pytest.fixture
def former(file: Path, home: Path) -> StageGraph:
    """What the run was, before its cold start was changed; today's is made too."""
    graph = graph_of(file, home)
    finish(graph, home)
    finish(graph_of(file, home, OTHER), home, SHARES)
    return graph


def keys(garbage: list) -> set[str]:
    return {each.key for each in garbage}


def test_what_no_run_plans_any_more_can_go_and_all_of_today_stays(file: Path, home: Path, former: StageGraph) -> None:
    store, today = Store(home), graph_of(file, home, OTHER)
    garbage = find_garbage(store, [])
    planned = {node.key for node in today.nodes}
    assert keys(garbage) == {node.key for node in former.nodes} - planned
    assert former.node("base@0").key not in keys(garbage)
    freed, stayed = remove(store, garbage)
    assert freed == sum(each.size for each in garbage) > 0 and stayed == []
    assert all(entry.cached for entry in status(today, store))
    assert find_garbage(store, []) == [] and store.find(former.node("student@0").key) is None


def test_all_that_a_champion_descends_from_stays_with_its_scores(home: Path, former: StageGraph) -> None:
    store = Store(home)
    student = crown(former, store, "student")
    kept = {student, *(former.node(f"experts/{name}@0").key for name in ("sort", "reverse"))}
    kept |= {former.node(name).key for name in ("cold_start@0", "base@0")}
    kept |= {sheet.key for node in former.checkpoints if node.key in kept for sheet in former.evaluations(node.id)}
    garbage = find_garbage(store, [])
    assert not kept & keys(garbage)
    assert former.node("baselines/ties@0").key in keys(garbage)


def test_so_does_what_is_registered_and_what_mlflow_has_yet_to_be_told(home: Path, former: StageGraph) -> None:
    store, ties = Store(home), former.node("baselines/ties@0").key
    expert = former.node("experts/sort@0").key
    assert {ties, expert} <= keys(find_garbage(store, []))
    assert not {ties, expert} & keys(find_garbage(store, [ties]))
    (unsent := home / "runs" / "tiny" / "unsent").mkdir()
    operations = [{"ids": {}}, {"op": "version", "key": ties}]
    lines = "".join(json.dumps(each) + "\n" for each in operations)
    (unsent / "1.jsonl").write_text(lines + '{"op": "vers')
    assert not {ties, expert} & keys(find_garbage(store, []))


def test_what_is_being_made_from_it_stays(home: Path, former: StageGraph) -> None:
    store, start = Store(home), former.node("cold_start@0").key
    spec = {"nodes": [{"parents": {"start": start}}]}
    (store.work("a-new-stage") / "spec-1.json").write_text(json.dumps(spec))
    staged = store.staging("a-new-stage")
    assert start in keys(find_garbage(store, []))
    with store.lock("a-new-stage"):
        garbage = find_garbage(store, [])
        assert start not in keys(garbage)
        assert not any("a-new-stage" in each.name for each in garbage)
    kinds = {each.kind for each in find_garbage(store, []) if "a-new-stage" in each.name}
    assert kinds == {"work", "leftover"} and staged.exists()


def test_what_somebody_took_meanwhile_stays(home: Path, former: StageGraph) -> None:
    store = Store(home)
    garbage = find_garbage(store, [])
    with store.lock(garbage[0].key):
        freed, stayed = remove(store, garbage[:2])
    assert stayed == [f"{garbage[0].name}: in use"] and garbage[0].path.exists() and not garbage[1].path.exists()
    assert freed == garbage[1].size


@pytest.fixture
def mirrored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Path, former: StageGraph) -> Store:
    """The home with a mirror that has all of it."""
    monkeypatch.setenv("MOPD_STORE", f"file://{tmp_path / 'shared'}")
    monkeypatch.setattr(mirror, "FRESH_SECONDS", 0.0)
    mirror.mirror_of.cache_clear()
    store = Store(home)
    for artifact in list(store.artifacts()):
        store.mirror.send(artifact.path, artifact.manifest)
    return store


def test_ancestors_are_followed_through_what_stands_in_the_mirror_alone(mirrored: Store, former: StageGraph) -> None:
    student, expert, start = (former.node(name).key for name in ("student@0", "experts/sort@0", "cold_start@0"))
    assert start in keys(find_garbage(mirrored, []))
    for key in (student, *(former.node(f"experts/{name}@0").key for name in ("sort", "reverse"))):
        shutil.rmtree(mirrored.root / key)
    garbage = keys(find_garbage(mirrored, [student]))
    assert start not in garbage and former.node("baselines/ties@0").key in garbage
    assert not mirrored.is_here(mirrored.find(expert)), "a checkpoint was brought to be looked at"


def test_where_a_link_is_missing_every_artifact_stays_and_a_warning_says_so(
    home: Path, former: StageGraph, caplog: pytest.LogCaptureFixture
) -> None:
    store, student, expert = Store(home), crown(former, Store(home), "student"), former.node("experts/sort@0").key
    assert keys(find_garbage(store, [])) and caplog.text == ""
    shutil.rmtree(store.root / expert)
    (store.root / ".staging" / "left-by-a-kill").mkdir()
    assert [each.kind for each in find_garbage(store, [])] == ["leftover"]
    assert f"student ({student}) was made from {expert}" in caplog.text and "all artifacts are kept" in caplog.text


def test_a_planned_node_that_is_not_made_is_no_missing_link(file: Path, home: Path, former: StageGraph) -> None:
    store, today = Store(home), graph_of(file, home, OTHER)
    before = keys(find_garbage(store, []))
    shutil.rmtree(store.root / today.node("experts/sort@0").key)
    assert keys(find_garbage(store, [])) == before


def test_what_the_mirror_has_not_taken_stays_until_it_has(mirrored: Store, former: StageGraph) -> None:
    ties = former.node("baselines/ties@0").key
    assert ties in keys(find_garbage(mirrored, []))
    (unsent := mirrored.home / "unsent_to_store").mkdir(exist_ok=True)
    (unsent / ties).touch()
    assert ties not in keys(find_garbage(mirrored, []))
    assert mirrored.send_left_over() == [] and ties in keys(find_garbage(mirrored, []))
    # Without a mirror nobody will ever take it.
    (unsent / ties).touch()
    mirrored.mirror = None
    assert ties in keys(find_garbage(mirrored, []))


def test_a_download_is_left_over_once_its_process_is_gone(home: Path, former: StageGraph) -> None:
    store = Store(home)
    gone = subprocess.Popen(["true"])
    gone.wait()
    for process in (os.getpid(), gone.pid):
        (store.root / ".staging" / f"somekey.{process}.mirror").mkdir(parents=True)
    left = [each.name for each in find_garbage(store, []) if each.kind == "leftover"]
    assert left == [f"somekey.{gone.pid}.mirror"]


def test_what_is_young_or_set_aside_stays_unless_asked_for(home: Path, former: StageGraph) -> None:
    store = Store(home)
    assert find_garbage(store, [], days=1) == []
    aside = store.set_aside(former.node("student@0").key)
    assert aside not in [each.path for each in find_garbage(store, [])]
    assert aside in [each.path for each in find_garbage(store, [], corrupted=True)]


def test_a_run_that_writes_its_plan_waits_for_the_collector(home: Path, former: StageGraph) -> None:
    store = Store(home)
    from filelock import Timeout

    with plan_lock(store), pytest.raises(Timeout):
        Store(home).lock("gc").acquire(timeout=0)


def test_the_command_shows_first_and_removes_when_told(home: Path, former: StageGraph) -> None:
    ask = ["gc", "--home", str(home)]
    shown = CliRunner().invoke(app, ask)
    assert shown.exit_code == 0 and "can be removed; --yes removes them" in shown.output and "student" in shown.output
    assert Store(home).find(former.node("student@0").key) is not None
    told = json.loads(CliRunner().invoke(app, [*ask, "--json"]).output)
    assert told["freed"] == 0 and told["bytes"] == sum(each["size"] for each in told["found"])
    done = CliRunner().invoke(app, [*ask, "--yes"])
    assert " freed" in done.output and Store(home).find(former.node("student@0").key) is None
    assert CliRunner().invoke(app, ask).output == "nothing to remove\n"
    wrong = CliRunner().invoke(app, ["gc", "--home", str(home / "elsewhere")])
    assert wrong.exit_code == 2 and "there is no store in it" in wrong.output


def test_the_registry_is_read_and_one_that_cannot_be_read_stops_it(
    home: Path, former: StageGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(home)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert registered_keys(store) == set()
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{home.resolve() / 'mlflow.db'}")
    client.create_registered_model("tiny-student")
    for number in range(3):
        client.create_model_version("tiny-student", f"file:///nowhere/{number}", tags={"key": f"key{number}"})
    assert registered_keys(store) == {"key0", "key1", "key2"}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserError, match="MLflow's registry cannot be read"):
        registered_keys(store)
