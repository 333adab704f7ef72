"""Waiting for vLLM servers: the first that answers is enough, and who does not is told."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

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


@pytest.fixture
def url(monkeypatch):
    monkeypatch.setattr(Healthy, "left", 2)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Healthy)
    threading.Thread(target=server.serve_forever).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


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
