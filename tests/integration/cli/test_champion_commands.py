"""`mopd promote` and `mopd rollback` on a finished run, with the alias in a real MLflow store."""

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from base.store.checkpoint import Store
from flows.cli.app import app
from flows.plan.champion_history import read_history
from flows.plan.nodes import StageGraph
from flows.tracking.tracker import Tracker
from tests.support.homes import with_databases
from tests.support.scored_home import finish, graph_of, run_file


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A finished run that MLflow has not heard of."""
    folder = tmp_path_factory.mktemp("finished")
    graph = graph_of(run_file(folder), with_databases(folder / "home"))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        yield {
            "file": folder / "run.yaml",
            "home": folder / "home",
            "graph": graph,
            "store": finish(graph, folder / "home"),
        }


def mopd(finished: dict[str, Any], command: str, *arguments: str) -> Result:
    return CliRunner().invoke(app, [command, str(finished["file"]), *arguments, "--home", str(finished["home"])])


def aliases(home: Path, graph: StageGraph) -> dict[str, str]:
    """alias -> node of the version that has it."""
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{home / 'mlflow.db'}")
    nodes = {node.key: node.id for node in graph.checkpoints}
    model = client.get_registered_model("tiny-student")
    versions = {alias: client.get_model_version(model.name, number) for alias, number in model.aliases.items()}
    return {alias: nodes[version.tags["key"]] for alias, version in versions.items()}


def champions(store: Store) -> list[str]:
    return [reign.node for reign in read_history(store, "tiny")]


def test_the_alias_follows_the_run_and_the_person(finished: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    home, graph, store = finished["home"], finished["graph"], finished["store"]
    ran = mopd(finished, "run")
    assert ran.exit_code == 0 and "Promoted to champion: baselines/ties has 95.0 %" in ran.stdout
    assert aliases(home, graph) == {"candidate": "baselines/ties@0", "champion": "baselines/ties@0"}
    assert mopd(finished, "rollback").exit_code == 2

    promoted = mopd(finished, "promote", "student", "seeds=[0]", "--reason", "it reads better")
    assert promoted.exit_code == 0 and champions(store) == ["baselines/ties@0", "student@0"]
    assert aliases(home, graph) == {"candidate": "baselines/ties@0", "champion": "student@0"}

    for _ in range(2):
        assert mopd(finished, "rollback").exit_code == 0
        assert champions(store) == ["baselines/ties@0", "student@0", "baselines/ties@0"]
        assert aliases(home, graph)["champion"] == "baselines/ties@0"

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{probe.getsockname()[1]}")
    cut_off = mopd(finished, "promote", "baselines/mix_sft", "--reason", "cheaper")
    assert cut_off.exit_code == 0 and champions(store)[-1] == "baselines/mix_sft@0"
    assert "warning: MLflow at http://127.0.0.1:" in cut_off.stderr and "could not be reached" in cut_off.stderr
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert aliases(home, graph)["champion"] == "baselines/ties@0"
    Tracker.start(graph, home, finished["file"]).finish("FINISHED", None, None)
    assert aliases(home, graph)["champion"] == "baselines/mix_sft@0"


def test_a_cached_run_leaves_a_persons_choice_alone(finished: dict[str, Any]) -> None:
    home, graph, store = finished["home"], finished["graph"], finished["store"]
    mopd(finished, "promote", "baselines/mix_sft", "--reason", "cheaper")
    before = champions(store)
    ran = mopd(finished, "run")
    assert ran.exit_code == 0 and "a person chose baselines/mix_sft@0 instead" in " ".join(ran.stdout.split())
    assert champions(store) == before and aliases(home, graph)["champion"] == "baselines/mix_sft@0"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("baselines/tie", "--reason", "x"), "did you mean 'baselines/ties'?"),
        (("student", "baselines/ties", "--reason", "x"), "name one merge, not 2"),
        (("student",), "--reason"),
        (("student", "merge.max_steps=9", "--reason", "x"), "student@0"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(
    finished: dict[str, Any], arguments: tuple[str, ...], said: str
) -> None:
    before = champions(finished["store"])
    result = mopd(finished, "promote", *arguments)
    assert result.exit_code == 2 and said in result.stderr and "Traceback" not in result.stderr
    assert champions(finished["store"]) == before
