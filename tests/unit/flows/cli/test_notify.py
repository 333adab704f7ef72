"""The webhook hears of every champion once: at the end of a run, or at the next start of one that was killed."""

import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from base.exit_codes import DONE
from base.store.checkpoint import Store
from evals.promotion.criterion import Criterion
from evals.promotion.gate import GateVerdict
from flows.champion import notify
from flows.champion.champion import promote_by_gate
from flows.champion.notify import queue_notifications, send_notifications
from flows.cli import runs as commands
from flows.plan.champion_history import champion_path, read_history
from flows.plan.nodes import StageGraph
from flows.run.finish import finish_run
from flows.run.run_request import RunRequest
from flows.run_file.notify import NotifyConfig
from flows.tracking.writer import unsent_folder
from tests.support.homes import with_databases
from tests.support.scored_home import finish, graph_of, run_file

pytestmark = pytest.mark.slow

PASSED = GateVerdict("student", "because", (Criterion("all", True, ""),))


class Hook(BaseHTTPRequestHandler):
    """A chat service's webhook; it may have a fault."""

    heard: ClassVar[list[dict[str, Any]]] = []
    status = 200

    def do_POST(self) -> None:
        """Keep what is said."""
        told = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if Hook.status == 200:
            self.heard.append(told)
        self.send_response(Hook.status)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@pytest.fixture(autouse=True)
def hook(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hook]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hook)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in [name for name in os.environ if name.startswith(("PREFECT_", "MLFLOW_", "MOPD_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MOPD_WEBHOOK", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setattr(notify, "WAIT_SECONDS", 0.0)
    Hook.heard.clear()
    Hook.status = 200
    yield Hook
    server.shutdown()


@pytest.fixture
def asked(tmp_path: Path) -> RunRequest:
    """A run of which everything is made."""
    file = run_file(tmp_path)
    file.write_text(file.read_text() + "notify: {events: [promotion]}\n")
    asked = RunRequest(file, (), None, with_databases(tmp_path / "home", ["prefect/prefect.db"]))
    finish(graph_of(file, asked.home), asked.home)
    return asked


@pytest.fixture
def graph(asked: RunRequest) -> StageGraph:
    return asked.graph()


def test_a_run_that_was_killed_after_its_promotion_is_told_of_at_the_next_start_and_once(graph, asked, hook):
    store = Store(asked.home)
    queue_notifications(store, graph.config, {"flow_run": "http://prefect/1"})
    assert promote_by_gate(graph, store, PASSED)
    # Killed here; another start is killed before its gate.
    queue_notifications(store, graph.config, {"flow_run": "http://prefect/2"})
    assert hook.heard == []
    for _ in range(2):
        send_notifications(store, graph.config)
    (told,) = hook.heard
    assert told["flow_run"] == "http://prefect/1" and "student@0" in told["text"] and told["event"] == "promotion"
    assert told["champion"] == read_history(store, "tiny")[-1].student


def test_what_the_webhook_does_not_take_stays_owed(graph, asked, hook):
    store = Store(asked.home)
    queue_notifications(store, graph.config, {})
    promote_by_gate(graph, store, PASSED)
    hook.status = 503
    send_notifications(store, graph.config, {"report": "here"})
    hook.status = 200
    send_notifications(store, graph.config)
    assert [told["champion"] for told in hook.heard] == [read_history(store, "tiny")[-1].student]


@pytest.mark.parametrize("config", [None, NotifyConfig(events=["failure"])])
def test_nothing_is_owed_to_who_did_not_ask(graph, asked, config):
    store = Store(asked.home)
    queue_notifications(store, graph.config.model_copy(update={"notify": config}), {})
    assert not champion_path(store, "tiny").with_name(notify.PENDING_FILE).exists()


def test_a_champion_of_before_or_by_a_person_is_not_news(graph, asked, hook):
    from flows.champion.champion import promote

    store = Store(asked.home)
    promote_by_gate(graph, store, PASSED)
    queue_notifications(store, graph.config, {})
    promote(graph, store, "baselines/mix_sft", "shorter answers")
    send_notifications(store, graph.config)
    assert hook.heard == [] and not champion_path(store, "tiny").with_name(notify.PENDING_FILE).exists()


def test_a_run_in_which_everything_is_cached_tells_of_its_champion_once(asked, hook):
    for _ in range(2):
        assert commands.run(asked, discard_corrupted=False, plain=True, verbose=False) == DONE
    assert [told["event"] for told in hook.heard] == ["promotion"]


def test_a_run_in_which_everything_is_cached_sends_what_mlflow_has_not_taken(asked):
    store, folder = Store(asked.home), unsent_folder(asked.home, "tiny")
    finish_run(asked.graph(), store, promote=True)
    assert commands.run(asked, discard_corrupted=False, plain=True, verbose=False) == DONE
    assert not (asked.home / "mlflow.db").exists(), "nothing is kept: MLflow is not asked"
    folder.mkdir(parents=True)
    (folder / "a.jsonl").write_text('{"op": "champion", "run": "tiny"}\n')
    assert commands.run(asked, discard_corrupted=False, plain=True, verbose=False) == DONE
    assert (asked.home / "mlflow.db").exists() and not list(folder.glob("*.jsonl"))


def test_a_finished_run_does_not_fail_because_prefect_is_away(graph, asked, capsys):
    from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    from flows.run import pipeline

    outcome = finish_run(graph, Store(asked.home), promote=True)
    away = {PREFECT_API_URL: "http://me:password@127.0.0.1:9/api", PREFECT_CLIENT_MAX_RETRIES: 0}
    with temporary_settings(away):
        tracker = SimpleNamespace(url="http://mlflow/#/1")
        pipeline._publish(SimpleNamespace(graph=graph, store=Store(asked.home), tracker=tracker), outcome)
    said = capsys.readouterr().err
    assert "warning: scores and report of tiny are not on Prefect's page" in said and "password" not in said
