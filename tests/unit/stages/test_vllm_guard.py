"""A rollout server's guard: no number without verified weights, and a failed load is final."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from stages.vllm.guard import CHANGES, Guard
from stages.vllm.settings import NO_VERSION, PROBE_HEADER

NUMBERS = ("/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/invocations", "/a/path/of/tomorrow")
FATAL = [path for path, fatal in CHANGES.items() if fatal]


class Vllm:
    """Stands in for vLLM's application: answers 200, or as `answer` says for a path; counts what reached it."""

    def __init__(self) -> None:
        self.reached: list[str] = []
        self.answer: dict[str, int | Exception] = {}
        self.during: Callable[[str], Awaitable[None]] | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope["path"]
        self.reached.append(path)
        if self.during is not None:
            await self.during(path)
        answer = self.answer.get(path, 200)
        if isinstance(answer, Exception):
            raise answer
        body = {"weight_version": "x"} if path == "/weight_info" else {"error": {"message": "no such tensor"}}
        await send({"type": "http.response.start", "status": answer, "headers": []})
        await send({"type": "http.response.body", "body": json.dumps(body).encode()})


class Client:
    """Asks through the guard."""

    def __init__(self) -> None:
        self.vllm = Vllm()
        self.guard = Guard(self.vllm)

    async def asks(self, path: str, method: str = "POST", probe: bool = False) -> tuple[int, Any]:
        headers = [(PROBE_HEADER.encode(), b"1")] if probe else []
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        async def receive() -> Any:
            return {"type": "http.request", "body": b"{}"}

        await self.guard({"type": "http", "path": path, "method": method, "headers": headers}, receive, send)
        return sent[0]["status"], json.loads(sent[1]["body"])

    def ask(self, path: str, method: str = "POST", probe: bool = False) -> tuple[int, Any]:
        return asyncio.run(self.asks(path, method, probe))

    def verified(self) -> "Client":
        assert self.ask("/collective_rpc")[0] == 200
        assert self.ask("/update_weight_version")[0] == 200
        return self


@pytest.fixture
def client() -> Client:
    return Client()


@pytest.mark.parametrize("path", NUMBERS)
def test_a_number_needs_verified_weights(client, path):
    status, body = client.ask(path)
    assert status == 503 and "no verified weights" in body["error"]["message"]
    assert client.ask("/weight_info", "GET") == (200, {"weight_version": NO_VERSION})
    client.ask("/collective_rpc")
    # Loaded, and not verified yet: a probe is answered, nothing else.
    assert client.ask(path)[0] == 503
    assert client.ask(path, probe=True)[0] == 200
    assert client.ask("/weight_info", "GET") == (200, {"weight_version": NO_VERSION})
    client.ask("/update_weight_version")
    assert client.ask(path)[0] == 200
    assert client.ask("/weight_info", "GET") == (200, {"weight_version": "x"})


@pytest.mark.parametrize("path", CHANGES)
def test_weights_that_are_touched_are_no_version_any_more(client, path):
    client.verified()
    assert client.ask(path)[0] == 200
    assert client.ask("/v1/completions")[0] == 503
    assert client.ask("/weight_info", "GET") == (200, {"weight_version": NO_VERSION})


@pytest.mark.parametrize("failure", [500, RuntimeError("no such tensor")], ids=["answered", "raised"])
@pytest.mark.parametrize("path", FATAL)
def test_after_a_failed_load_there_is_only_its_fault(client, path, failure):
    client.verified().vllm.answer[path] = failure
    if isinstance(failure, Exception):
        with pytest.raises(RuntimeError):
            client.ask(path)
    else:
        assert client.ask(path)[0] == 500
    reached = len(client.vllm.reached)
    fault = f"{path} failed: no such tensor"
    for method, other in [("GET", "/health"), ("GET", "/weight_info"), *(("POST", each) for each in NUMBERS)]:
        status, body = client.ask(other, method, probe=True)
        assert (status, body["fault"]) == (503, fault)
    for other in (path, "/update_weight_version", "/reset_prefix_cache"):
        assert client.ask(other)[0] == 503
    assert len(client.vllm.reached) == reached
    # What a person would look at.
    assert client.ask("/metrics", "GET")[0] == 200


def test_a_request_that_is_refused_before_the_engine_is_no_fault_but_no_version_either(client):
    client.verified().vllm.answer["/collective_rpc"] = 400
    assert client.ask("/collective_rpc")[0] == 400
    assert client.ask("/health", "GET")[0] == 200
    assert client.ask("/v1/completions")[0] == 503


def test_a_version_cannot_be_named_while_weights_change(client):
    named: list[int] = []

    async def during(path: str) -> None:
        if path == "/collective_rpc":
            named.append((await client.asks("/update_weight_version"))[0])
            named.append((await client.asks("/v1/completions"))[0])

    client.vllm.during = during
    assert client.ask("/collective_rpc")[0] == 200
    assert named == [409, 503]
    assert client.ask("/v1/completions")[0] == 503


def test_a_load_that_begins_while_a_version_is_named_leaves_none(client):
    async def during(path: str) -> None:
        if path == "/update_weight_version":
            client.vllm.during = None
            await client.asks("/collective_rpc")

    client.ask("/collective_rpc")
    client.vllm.during = during
    client.ask("/update_weight_version")
    assert client.ask("/v1/completions")[0] == 503


def test_a_load_that_is_cut_off_is_a_fault(client):
    client.verified()

    async def during(path: str) -> None:
        raise asyncio.CancelledError

    client.vllm.during = during
    with pytest.raises(asyncio.CancelledError):
        client.ask("/collective_rpc")
    client.vllm.during = None
    assert client.ask("/health", "GET")[1]["fault"] == "/collective_rpc failed: CancelledError"


def test_a_websocket_gets_no_number(client):
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    client.verified()
    asyncio.run(client.guard({"type": "websocket", "path": "/v1/realtime", "headers": []}, None, send))
    assert [message["type"] for message in sent] == ["websocket.close"] and client.vllm.reached[2:] == []
