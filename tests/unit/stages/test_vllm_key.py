"""The key of a vLLM server: asked for on every path but the health checks."""

import asyncio
from typing import Any

import pytest

from flows.servers.access import home_secret, server_key
from stages.vllm.key_check import KeyCheck
from stages.vllm.settings import KEY_VARIABLE

RIGHT = (b"authorization", b"Bearer the key")


def ask(path: str, *headers: tuple[bytes, bytes], kind: str = "http") -> tuple[list[str], list[Any]]:
    """The paths that reach the application, and what is sent back."""
    reached: list[str] = []
    sent: list[Any] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        reached.append(scope["path"])

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b""}

    scope = {"type": kind, "path": path, "method": "POST", "headers": list(headers)}
    asyncio.run(KeyCheck(application)(scope, receive, send))
    return reached, sent


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "the key")


@pytest.mark.parametrize("path", ["/v1/completions", "/collective_rpc", "/sleep", "/metrics", "/health/", "/v1/health"])
def test_a_request_passes_with_the_key_alone(path):
    assert ask(path, RIGHT) == ([path], [])
    wrong = [[], [(b"authorization", b"Bearer another")], [(b"authorization", b"the key")], [RIGHT, RIGHT]]
    for headers in [*wrong, [(b"authorization", b"Bearer the key\xff")]]:
        reached, sent = ask(path, *headers)
        assert reached == [] and sent[0]["status"] == 401


def test_health_is_open_and_a_web_socket_is_not():
    assert ask("/health") == (["/health"], [])
    assert ask("/ws", kind="websocket") == ([], [{"type": "websocket.close", "code": 1008}])
    assert ask("/ws", RIGHT, kind="websocket") == (["/ws"], [])


@pytest.mark.parametrize("value", [None, ""])
def test_a_server_without_a_key_does_not_start(monkeypatch, value):
    monkeypatch.delenv(KEY_VARIABLE) if value is None else monkeypatch.setenv(KEY_VARIABLE, value)
    with pytest.raises(RuntimeError, match=KEY_VARIABLE):
        KeyCheck(None)


def test_each_home_has_a_key_of_its_own_unless_the_environment_has_one(monkeypatch, tmp_path):
    assert server_key(tmp_path) == "the key"
    monkeypatch.delenv(KEY_VARIABLE)
    keys = {server_key(tmp_path / name) for name in ("one", "other", "one")}
    assert len(keys) == 2
    assert not any(part in key for key in keys for part in home_secret(tmp_path / "one").split(":"))
