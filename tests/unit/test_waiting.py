"""Waiting for vLLM servers: the first that answers is enough, who does not is told, and none is lost for a pause."""

import contextlib
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest

from stages.on_policy.vllm_server import ServerLostError, VllmServer, wait_for_any


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
    """Ends a connection nobody has used for three seconds, in the moment somebody does."""

    protocol_version = "HTTP/1.1"
    used = 0.0
    told: ClassVar[list[bool]] = []

    def do_GET(self):
        now = time.monotonic()
        again = self.used > 0
        if again and now > self.used + 3:
            self.close_connection = True
            return
        self.used = now
        self.told.append(again)
        body = b'{"weight_version": "1"}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_a_connection_that_lay_idle_is_not_trusted(monkeypatch):
    monkeypatch.setattr(Impatient, "told", [])
    with listening(Impatient) as url, contextlib.closing(VllmServer(url, 5)) as server:
        for pause in (0.0, 0.0, 3.2):
            time.sleep(pause)
            assert server.weight_version() == "1"
    # Without a pause it is used again.
    assert Impatient.told == [False, True, False]
