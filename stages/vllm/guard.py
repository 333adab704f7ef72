"""ASGI middleware of a rollout server (`--middleware`): no completions or scores without verified weights.

A rollout server starts with random weights, and a failed load leaves part of one version and part of another. vLLM 0.32
keeps answering requests in both cases. With the guard a server has no version from the moment its weights are changed
until a client sets one (`/update_weight_version`), which it does after a successful probe. Without a version,
completions and scores are refused with 503. A failed load cannot be repaired in place: `/health` then answers 503 with
the reason, so that the server's supervisor restarts it. Free of torch and vLLM.
"""

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from stages.vllm.settings import FAULT, NO_VERSION, PROBE_HEADER

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

# Paths that change weights, and whether a failure leaves the engine with parts of two versions.
CHANGES = {
    "/collective_rpc": True,
    "/start_weight_update": True,
    "/start_draft_weight_update": True,
    "/update_weights": True,
    "/finish_weight_update": True,
    "/v1/load_lora_adapter": True,
    "/v1/unload_lora_adapter": False,
    "/sleep": False,
    "/wake_up": False,
    "/weight_checker": False,
}
VERSION, HEALTH, NAMED = "/weight_info", ("/health", "/ping"), "/update_weight_version"
# POST requests whose answers do not depend on the weights.
HARMLESS = {
    "/reset_prefix_cache",
    "/reset_mm_cache",
    "/reset_encoder_cache",
    "/init_weight_transfer_engine",
    "/shutdown_weight_transfer_engine",
    "/abort_requests",
    "/pause",
    "/resume",
    "/tokenize",
    "/detokenize",
}


class Guard:
    """Wraps vLLM's application.

    Args:
        app: The application; it gets the requests that may pass.
    """

    def __init__(self, app: App) -> None:
        self.app = app
        self.verified = False
        self.fault: str | None = None
        # Number of weight changes begun, and of those ended.
        self._begun = self._ended = 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one connection."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path, reads = str(scope["path"]), scope["method"] in ("GET", "HEAD", "OPTIONS")
        if self.fault is not None and (path in HEALTH or path == VERSION or not reads):
            await answer(send, 503, {FAULT: self.fault, "error": {"message": self.fault}})
        elif path == VERSION and not self.verified:
            await answer(send, 200, {"weight_version": NO_VERSION})
        elif path in CHANGES:
            await self._change(path, scope, receive, send)
        elif path == NAMED:
            await self._name(scope, receive, send)
        elif reads or path in HARMLESS or self.verified or _is_probe(scope):
            await self.app(scope, receive, send)
        else:
            reason = "the server has no verified weights: none were handed over yet, or a hand-over has not ended"
            await answer(send, 503, {"error": {"message": reason}})

    async def _change(self, path: str, scope: Message, receive: Receive, send: Send) -> None:
        """Forward a request that changes weights; the previous version is invalid from here on, even if it fails."""
        self.verified = False
        self._begun += 1
        answered: list[int] = []
        body = bytearray()

        async def observe(message: Message) -> None:
            if message["type"] == "http.response.start":
                answered.append(int(message["status"]))
            elif message["type"] == "http.response.body":
                body.extend(message.get("body", b""))
            await send(message)

        try:
            await self.app(scope, receive, observe)
        except BaseException as error:
            if CHANGES[path]:
                self.fault = f"{path} failed: {str(error) or type(error).__name__}"
            raise
        finally:
            self._ended += 1
        if CHANGES[path] and (not answered or answered[0] >= 500):
            self.fault = f"{path} failed: {_message(bytes(body))}"

    async def _name(self, scope: Message, receive: Receive, send: Send) -> None:
        """Forward the request of a client that has verified the weights and sets their version."""
        begun = self._begun
        if begun != self._ended:
            await answer(send, 409, {"error": {"message": "weights are being changed"}})
            return

        async def observe(message: Message) -> None:
            if message["type"] == "http.response.start" and int(message["status"]) < 300 and begun == self._begun:
                self.verified = True
            await send(message)

        await self.app(scope, receive, observe)


def _is_probe(scope: Message) -> bool:
    return any(name == PROBE_HEADER.encode() for name, _ in scope["headers"])


def _message(body: bytes) -> str:
    """The message of an error in vLLM's format; else the beginning of the body."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace")[:1000]


async def answer(send: Send, status: int, values: Message) -> None:
    """Send a JSON answer."""
    body = json.dumps(values).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
