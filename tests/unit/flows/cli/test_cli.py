"""The command line: exit codes, messages without tracebacks, and what it may not import to answer at once."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from base.store.checkpoint import Store
from flows.cli.app import app
from tests.unit.flows.run_file.test_config import MINIMAL

HEAVY = ("torch", "transformers", "datasets", "reasoning_gym", "prefect", "mlflow", "scipy", "matplotlib")


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(MINIMAL, sort_keys=False))
    return path


def mopd(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_plan_lists_every_checkpoint_with_its_evaluations_in_one_line(run_file: Path, tmp_path: Path) -> None:
    result = mopd("plan", run_file, "--home", tmp_path / "home")
    assert result.exit_code == 0
    assert "experts/sort@0" in result.stdout
    assert "3 of 3 to run" in result.stdout
    assert "0 of 20 nodes are cached, 20 to run." in result.stdout


def test_the_shell_completes_commands() -> None:
    asked = {"COMP_WORDS": "mopd re", "COMP_CWORD": "1", "_MOPD_COMPLETE": "complete_bash"}
    done = subprocess.run(
        [Path(sys.executable).with_name("mopd")], env=os.environ | asked, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["report", "remove-expert", "repin"]


def test_version_and_exit_codes_are_told() -> None:
    assert re.fullmatch(r"mopd \d+\.\d+\.\d+\n", mopd("--version").stdout)
    assert "3 finished but not promoted" in " ".join(mopd("--help").stdout.split())
    assert "--require-promotion" in mopd("run", "--help").stdout


def test_plan_as_json_has_every_node(run_file: Path, tmp_path: Path) -> None:
    result = mopd("plan", run_file, "merge.max_steps=7", "--home", tmp_path / "home", "--json")
    nodes = {entry["node"]: entry for entry in json.loads(result.stdout)}
    assert len(nodes) == 20
    assert nodes["student@0"]["parents"]["teacher/sort"] == "experts/sort@0"
    assert not nodes["student@0"]["cached"]


def test_plan_check_draws_the_data(run_file: Path, tmp_path: Path) -> None:
    small = "domains.sort.options={task: sort, min_length: 2, max_length: 2}"
    assert mopd("plan", run_file, "--home", tmp_path / "home", small).exit_code == 0
    result = mopd("plan", run_file, "--home", tmp_path / "home", small, "--check")
    assert result.exit_code == 2
    assert "sort" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("command", ["run", "plan", "status", "report"])
def test_a_mistake_is_one_message_and_exit_code_2(command: str, run_file: Path, tmp_path: Path) -> None:
    result = mopd(command, run_file, "merge.max_step=1", "--home", tmp_path / "home")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert "merge.max_step: unknown key — did you mean 'max_steps'?" in result.stderr
    assert "Traceback" not in result.stderr


def test_status_shows_the_last_word_of_a_failed_node(run_file: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    entries = json.loads(mopd("plan", run_file, "--home", home, "--json").stdout)
    key = next(entry["key"] for entry in entries if entry["node"] == "base@0")
    work = Store(home).work(key)
    (work / "journal.jsonl").write_text('{"time": 1, "step": 3, "kind": "progress", "total": 5}\n')
    (work / "error.json").write_text('{"message": "out of luck", "type": "E", "exit_code": 1}')
    result = mopd("status", run_file, "--home", home)
    assert "3/5" in result.stdout
    assert "out of luck" in result.stdout


def test_help_config_names_nested_keys_with_descriptions() -> None:
    result = mopd("run", "--help-config")
    assert result.exit_code == 0
    assert "experts.NAME.train.rl.group_size" in result.stdout
    assert "Completions sampled for each prompt." in result.stdout
    assert "merge.anchor.domains" in result.stdout


def test_the_home_comes_from_the_environment(run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOPD_HOME", str(tmp_path / "elsewhere"))
    assert mopd("plan", run_file).exit_code == 0
    assert (tmp_path / "elsewhere" / "store").is_dir()


def test_an_unknown_lineage_is_a_users_mistake(tmp_path: Path) -> None:
    result = mopd("lineage", "nobody", "--home", tmp_path)
    assert result.exit_code == 2
    assert "nobody" in result.stderr


def test_planning_imports_nothing_heavy(run_file: Path, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom flows.cli.app import app\n"
        f"result = CliRunner().invoke(app, ['plan', {str(run_file)!r}, '--home', {str(tmp_path / 'home')!r}])\n"
        f"assert result.exit_code == 0, result.output\nprint([name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
