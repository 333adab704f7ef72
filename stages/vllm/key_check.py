"""ASGI middleware of a vLLM server (`--middleware`): no answer without the server's key.

vLLM 0.32's own `--api-key` covers the paths below `/v1` alone. Without a key any user of the machine could hand weights
over (`/collective_rpc`) or end a server. Health checks need no key. Free of torch and vLLM.
"""

import hmac
import os

from stages.vllm.guard import HEALTH, App, Message, Receive, Send, answer
from stages.vllm.settings import KEY_VARIABLE

UNAUTHORIZED = 401
REFUSAL = f"this server needs the key of its `{KEY_VARIABLE}`, as a bearer token"


class KeyCheck:
    """Wraps vLLM's application, as the outermost middleware.

    Args:
        app: The application; it gets the requests that have the key.

    Raises:
        RuntimeError: the environment has no key.
    """

    def __init__(self, app: App) -> None:
        key = os.environ.get(KEY_VARIABLE)
        if not key:
            raise RuntimeError(f"{KEY_VARIABLE} is not set")
        self.app = app
        self._expected = f"Bearer {key}".encode()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one connection."""
        if scope["type"] not in ("http", "websocket") or str(scope["path"]) in HEALTH or self._has_key(scope):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await answer(send, UNAUTHORIZED, {"error": {"message": REFUSAL}})

    def _has_key(self, scope: Message) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        return len(given) == 1 and hmac.compare_digest(given[0], self._expected)
