"""Starts of a run: their numbers and names, and those that were killed."""

import json
import subprocess
from pathlib import Path

import pytest

from flows.champion import champion
from flows.plan.lock import write_lock
from flows.run import starts
from flows.run.starts import begin, close_killed, killed_starts, planned_experts, run_title
from flows.run_file.load import load_run_file
from flows.tracking.checkout import COMMIT, DIRTY, git_tags
from tests.support.scored_home import graph_of, run_file


def test_starts_are_numbered_and_a_closed_one_was_not_killed(tmp_path):
    first, second = begin(tmp_path, "lab"), begin(tmp_path, "lab")
    assert (first.number, second.number) == (1, 2)
    first.close()
    first.close()
    assert killed_starts(tmp_path, "lab") == []
    assert begin(tmp_path, "lab").number == 3 and begin(tmp_path, "other").number == 1


@pytest.mark.parametrize("kept", ['{"host": "HOST", "pid": 1, "start": 7}', "", '["x"]'])
def test_a_start_whose_process_is_gone_was_killed(tmp_path, kept, monkeypatch):
    start = begin(tmp_path, "lab")
    path = tmp_path / "runs" / "lab" / "starts" / "1.open"
    here = json.loads(path.read_text())["host"]
    path.write_text(kept.replace("HOST", here))
    assert [each.number for each in killed_starts(tmp_path, "lab")] == [1]
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "start": 7}))
    assert killed_starts(tmp_path, "lab") == []
    start.close()


def test_closing_asks_no_server_where_nothing_was_killed(tmp_path, monkeypatch):
    begin(tmp_path, "lab")
    monkeypatch.setattr(champion, "send_operations", lambda *_: pytest.fail("MLflow was asked"))
    close_killed(tmp_path, "lab")


def test_a_title_tells_what_differs(tmp_path):
    file = run_file(tmp_path)
    config = load_run_file(file)
    assert run_title(1, config, [], []) == "tiny #1"
    assert run_title(3, config, ["sort"], []) == "tiny #3, + reverse"
    assert run_title(4, config, ["sort", "reverse", "digits"], ["evaluate.examples=9"]) == (
        "tiny #4, - digits, evaluate.examples=9"
    )
    incremental = load_run_file(file, ["merge.start_from=champion"])
    assert run_title(3, incremental, ["sort"], ["merge.start_from=champion"]) == "tiny #3, + reverse, from champion"
    assert len(run_title(1, config, [], ["x=" + "y" * 500])) == starts.NAME_LENGTH


def test_the_last_lock_tells_the_experts_of_before(tmp_path):
    graph = graph_of(run_file(tmp_path), tmp_path / "home")
    assert planned_experts(tmp_path / "home", "tiny") == []
    write_lock(graph, tmp_path / "home")
    assert sorted(planned_experts(tmp_path / "home", "tiny")) == ["reverse", "sort"]


def test_a_run_has_the_commit_of_its_files_and_whether_they_differ(tmp_path):
    assert git_tags(tmp_path) == {}

    def git(*words: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    git("init")
    assert git_tags(tmp_path) == {}
    (tmp_path / "run.yaml").write_text("name: a\n")
    git("add", ".")
    git("commit", "-m", "a")
    (tmp_path / "untracked").write_text("")
    below = tmp_path / "below"
    below.mkdir()
    assert git_tags(below) == {COMMIT: git("rev-parse", "HEAD"), DIRTY: "false"}
    Path(tmp_path / "run.yaml").write_text("name: b\n")
    assert git_tags(tmp_path)[DIRTY] == "true"
