"""Locks held by somebody else: a start of a server goes on, or says which file keeps it, within a bound."""

import logging
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from filelock import FileLock

from base.errors import UserError
from flows.servers import start as servers

HOST = "127.0.0.1"


@pytest.fixture(autouse=True)
def short(monkeypatch, tmp_path):
    monkeypatch.setattr(servers, "LOCK_SECONDS", 0.2)
    monkeypatch.setattr(servers, "START_SECONDS", 0.4)
    monkeypatch.setattr(servers.tempfile, "gettempdir", lambda: str(tmp_path))


def test_a_start_does_not_choose_the_port_that_another_is_about_to_listen_on(tmp_path):
    port = servers.choose_port(HOST, 23450, "Test")
    with servers.one_start_at_a_time(tmp_path / "one") as one, servers.one_start_at_a_time(tmp_path / "two") as two:
        assert servers.choose_port(HOST, port, "Test", held=one) == port
        with pytest.raises(UserError, match=f"Test: port {port} on {HOST} is taken"):
            servers.choose_port(HOST, port, "Test", exact=True, held=two)
        assert servers.choose_port(HOST, port, "Test", held=two) > port
        one.close()
        assert servers.choose_port(HOST, port, "Test", held=two) == port


@pytest.mark.parametrize("kind", ["file", "link", "foreign"])
def test_a_folder_of_locks_that_is_somebody_elses_is_not_used(tmp_path, caplog, monkeypatch, kind):
    folder, elsewhere = tmp_path / f"mopd-{servers.os.getuid()}", tmp_path / "elsewhere"
    elsewhere.mkdir()
    if kind == "file":
        folder.write_text("")
    elif kind == "link":
        folder.symlink_to(elsewhere)
    else:
        folder.mkdir()
        mine = servers.os.getuid()
        monkeypatch.setattr(servers.os, "getuid", lambda: mine + 1)
        folder.rename(folder.with_name(f"mopd-{mine + 1}"))
    with caplog.at_level(logging.WARNING), servers.one_start_at_a_time(tmp_path / "home") as held:
        assert servers.choose_port(HOST, 23450, "Test", held=held) >= 23450
        assert "belongs to another user" in caplog.text
    assert list(elsewhere.iterdir()) == []


def test_a_held_lock_of_the_home_is_named_and_bounded(tmp_path, caplog):
    lock = tmp_path / "home" / "locks" / "servers.lock"
    lock.parent.mkdir(parents=True)
    refused = pytest.raises(UserError, match=r"servers\.lock: another program has held this")
    with FileLock(lock), caplog.at_level(logging.WARNING), refused, servers.one_start_at_a_time(tmp_path / "home"):
        pass
    assert "another process is starting a server of this home" in caplog.text


class Stranger(BaseHTTPRequestHandler):
    """Answers everything with 200."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        """Print nothing."""


def test_a_stranger_on_the_port_is_not_taken_for_the_server(tmp_path):
    stranger = ThreadingHTTPServer(("127.0.0.1", 0), Stranger)
    Thread(target=stranger.serve_forever, daemon=True).start()
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], stdout=output)
    url = f"http://127.0.0.1:{stranger.server_address[1]}"
    try:
        assert servers.answers(url)
        with pytest.raises(UserError, match="did not answer"):
            servers.wait_until_ready(servers.Server("Prefect", process, url, url, log), 1)
    finally:
        process.kill()
        process.wait()
        stranger.shutdown()
