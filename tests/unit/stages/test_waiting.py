"""Waiting for vLLM servers: the first that answers is enough, who does not is told, and none is lost for a pause."""

import contextlib
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest

from stages.config.distill import DistillConfig
from stages.config.on_policy import MOST_SECONDS, SamplerConfig
from stages.teachers.remote_teachers import RemoteTeachers
from stages.vllm import server as vllm_server
from stages.vllm.server import ServerLostError, VllmServer, wait_for_any


class Healthy(BaseHTTPRequestHandler):
    """Is well after it was asked a number of times."""

    left = 0

    def do_GET(self):
        type(self).left -= 1
        self.send_response(200 if type(self).left < 0 else 503)
        self.end_headers()

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def listening(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Its URL."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def url(monkeypatch):
    monkeypatch.setattr(Healthy, "left", 2)
    with listening(Healthy) as url:
        yield url


def test_a_server_that_is_away_is_told_of_once_and_waited_for(url):
    lost: list[ServerLostError] = []
    server = VllmServer(url, 5)
    assert wait_for_any([server], 30, lost.append) == [server]
    assert Healthy.left < 0
    assert [str(error) for error in lost] == [f"{url} does not answer"]
    assert wait_for_any([server], 30, lost.append) == [server]
    assert len(lost) == 1


def test_one_that_answers_is_not_kept_waiting_for_another(url):
    Healthy.left = 0
    lost: list[ServerLostError] = []
    up, down = VllmServer(url, 5), VllmServer("http://127.0.0.1:9", 5)
    assert wait_for_any([up, down], 30, lost.append) == [up]
    assert [str(error) for error in lost] == ["http://127.0.0.1:9 does not answer"]


def test_none_in_time_is_an_error():
    with pytest.raises(ServerLostError, match=r"no vLLM server answers in 0 s: http://127\.0\.0\.1:9"):
        wait_for_any([VllmServer("http://127.0.0.1:9", 5)], 0)


class Impatient(BaseHTTPRequestHandler):
    """Answers once on a connection, and ends it without an answer when it is used again."""

    protocol_version = "HTTP/1.1"
    served = False
    asked: ClassVar[list[str]] = []

    def do_GET(self):
        self.answer(b'{"weight_version": "1"}')

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(b"{}")

    def answer(self, body):
        self.asked.append(self.path)
        if self.served:
            self.close_connection = True
            return
        self.served = True
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_a_question_is_put_again_where_the_server_closed_the_connection(monkeypatch):
    monkeypatch.setattr(Impatient, "asked", [])
    with listening(Impatient) as url, contextlib.closing(VllmServer(url, 60)) as server:
        assert [server.weight_version() for _ in range(3)] == ["1", "1", "1"]
        assert [server.healthy() for _ in range(3)] == [True, True, True]


def test_a_request_that_changes_the_server_is_made_once(monkeypatch):
    monkeypatch.setattr(vllm_server, "IDLE_SECONDS", 600.0)
    monkeypatch.setattr(Impatient, "asked", [])
    with listening(Impatient) as url, contextlib.closing(VllmServer(url, 60)) as server:
        assert server.weight_version() == "1"
        with pytest.raises(ServerLostError, match="/update_weight_version: RemoteProtocolError"):
            server.set_weight_version("2")
        assert Impatient.asked[1:] == ["/update_weight_version"]


def test_the_time_for_a_start_is_not_the_time_for_an_answer(monkeypatch):
    monkeypatch.setattr(Healthy, "left", sys.maxsize)
    settings = SamplerConfig(backend="vllm_server", start_seconds=0.2, timeout_seconds=MOST_SECONDS)
    config = DistillConfig(sampler=settings, teacher_backend="vllm_server", objective={"type": "sampled_reverse_kl"})
    with listening(Healthy) as url, pytest.raises(ServerLostError):
        RemoteTeachers([url], {"a key": "experts/sort"}, config, vocabulary=10)
