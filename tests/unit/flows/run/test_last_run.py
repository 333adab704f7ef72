"""A run remembers its overrides: `report`, `status`, `plan` and `promote` speak of it; a gap replaces nothing."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from base.store.checkpoint import Store
from flows.champion import champion
from flows.cli.app import app
from flows.plan.champion_history import read_history
from flows.plan.nodes import StageGraph
from flows.run.last_run import last_run, newest_of, remember
from tests.support.scored_home import finish, graph_of, run_file

pytestmark = pytest.mark.slow

OVERRIDES = ("merge.max_steps=9", "gate.non_inferiority_margin=0.3")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home in which a run with overrides is made; of the run file as it is the student is missing."""
    folder = tmp_path_factory.mktemp("made")
    finish(graph_of(run_file(folder), folder / "home", *OVERRIDES), folder / "home")
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(champion, "update_aliases", lambda store, run, candidate=None: None)
    return Path(shutil.copytree(made, tmp_path / "made"))


def mopd(folder: Path, command: str, *arguments: str) -> Result:
    return CliRunner().invoke(app, [command, str(folder / "run.yaml"), *arguments, "--home", str(folder / "home")])


def report_json(folder: Path, place: str = "runs/tiny") -> dict[str, Any]:
    return json.loads((folder / "home" / place / "report.json").read_text())


def graph(folder: Path, *overrides: str) -> StageGraph:
    return graph_of(folder / "run.yaml", folder / "home", *overrides)


def test_what_follows_a_run_with_overrides_speaks_of_that_run(folder: Path) -> None:
    assert mopd(folder, "run", *OVERRIDES).exit_code == 0
    before = (folder / "home/runs/tiny/report.html").read_text()
    told = mopd(folder, "report")
    assert told.exit_code == 0 and "Already champion, since" in told.stdout
    assert (
        f"with the overrides of the last run of {folder / 'run.yaml'}: {' '.join(OVERRIDES)} (--as-written"
        in told.stderr
    )
    assert report_json(folder)["missing"] == [] and "already champion" in report_json(folder)["verdict"]["conclusion"]
    assert before != "" and all(row["status"] == "done" for row in json.loads(mopd(folder, "status", "--json").stdout))
    assert all(node["cached"] for node in json.loads(mopd(folder, "plan", "--json").stdout))
    assert not all(node["cached"] for node in json.loads(mopd(folder, "plan", "--json", "--as-written").stdout))
    assert not all(node["cached"] for node in json.loads(mopd(folder, "plan", "merge.max_steps=8", "--json").stdout))


def test_a_person_promotes_a_merge_of_the_last_run(folder: Path) -> None:
    mopd(folder, "run", *OVERRIDES)
    assert mopd(folder, "promote", "student", "--reason", "it reads better").exit_code == 0
    (now,) = read_history(Store(folder / "home"), "tiny")[1:]
    assert now.student == graph(folder, *OVERRIDES).node("student@0").key


def test_a_report_with_gaps_does_not_replace_a_whole_one(folder: Path) -> None:
    mopd(folder, "run", *OVERRIDES)
    runs = folder / "home/runs/tiny"
    files = {path: path.read_bytes() for path in runs.glob("*.*") if path.suffix in (".html", ".json", ".csv")}
    told = mopd(folder, "report", "--as-written")
    assert told.exit_code == 0 and "Not judged yet, 8 of" in told.stdout and "partial/report.html" in told.stdout
    assert {path: path.read_bytes() for path in files} == files
    partial = report_json(folder, "runs/tiny/partial")
    assert "student@0" in partial["missing"] and partial["verdict"]["promoted"] is False
    assert partial["verdict"]["conclusion"].startswith("student: not judged yet, 8 of")
    # Once it is whole it takes the place, and what was partial goes.
    finish(graph(folder), folder / "home")
    mopd(folder, "report", "--as-written")
    assert report_json(folder)["missing"] == [] and not (runs / "partial").exists()


def test_where_no_whole_report_stands_one_with_gaps_is_written_in_its_place(folder: Path) -> None:
    told = mopd(folder, "report")
    assert "Not judged yet" in told.stdout and report_json(folder)["missing"]
    finish(graph(folder), folder / "home")
    mopd(folder, "report")
    assert report_json(folder)["missing"] == []


def test_the_newest_run_of_a_file_counts_whatever_its_name(tmp_path: Path) -> None:
    file, other = tmp_path / "run.yaml", tmp_path / "other.yaml"
    assert last_run(tmp_path, file) is None and newest_of(tmp_path, "a") is None
    remember(tmp_path, "a", file, ["seeds=[1]"], None)
    remember(tmp_path, "a", other, ["seeds=[2]"], 3)
    remember(tmp_path, "b", file, ["name=b"], 5)
    found = last_run(tmp_path, file)
    assert found is not None and (found.overrides, found.max_steps) == (("name=b",), 5)
    newest = newest_of(tmp_path, "a")
    assert newest is not None and newest[0] == other.resolve() and newest[1].overrides == ("seeds=[2]",)
    remember(tmp_path, "a", file, [], None)
    found = last_run(tmp_path, file)
    assert found is not None and found.overrides == ()


def test_a_run_that_is_not_promoted_ends_with_three_where_that_is_asked(folder: Path) -> None:
    strict = ("gate.max_forgetting=0.0", "merge.baselines=[]", *OVERRIDES, "merge.max_steps=10")
    shares = {name: 0.4 for name in ("base", "cold_start", "experts/sort", "experts/reverse", "student")}
    finish(graph(folder, *strict), folder / "home", shares)
    assert mopd(folder, "run", *strict).exit_code == 0
    refused = mopd(folder, "run", *strict, "--require-promotion")
    assert refused.exit_code == 3 and "Not promoted" in refused.stdout
    for _ in range(2):
        # Promoted just now, and the champion already.
        assert mopd(folder, "run", *OVERRIDES, "--require-promotion").exit_code == 0
    alone = mopd(folder, "run", "merge=null", "--require-promotion")
    assert alone.exit_code == 2 and "--require-promotion" in alone.stderr and "has no merge" in alone.stderr


def test_verdict_and_table_as_json(folder: Path) -> None:
    ran = json.loads(mopd(folder, "run", *OVERRIDES, "--json").stdout)
    assert ran["verdict"]["promoted"] and ran["candidate_is_champion"] and ran["missing"] == []
    assert ran["candidate"] == "baselines/ties@0" and ran["champion"]["node"] == "baselines/ties@0"
    reported = json.loads(mopd(folder, "report", "--json").stdout)
    assert reported["verdict"]["promoted"] is False and reported["verdict"]["reigns"].endswith("UTC, by the gate")
    lines = {line["domain"]: line for line in reported["summary"]["lines"]}
    assert lines["sort"]["teacher"] == pytest.approx(0.8) and lines["sort"]["student"] == pytest.approx(0.95)
    assert set(lines["sort"]["gap"]) == {"mean", "low", "high"} and reported["report"].endswith("report.html")


def test_the_terminal_is_short_and_the_rest_stands_behind_full(folder: Path) -> None:
    short = mopd(folder, "run", *OVERRIDES)
    assert len(short.stdout.splitlines()) <= 30 and "Merges of the same experts" not in short.stdout
    assert short.stdout.index("Promoted to champion") < short.stdout.index("weakest") < short.stdout.index("Report:")
    full = mopd(folder, "report", "--full")
    assert "Merges of the same experts" in full.stdout and "gate: met: non-inferior to" in full.stdout
