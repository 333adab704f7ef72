"""A real HTTP server that plays the endpoint of a judge."""

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Judge(ThreadingHTTPServer):
    """An endpoint with one model, `tiny`, that replies as `reply(request, number of the request)` says.

    A number is an HTTP status, a pair a status and a body, None a silence of `patience` seconds.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply: Callable[[Any, int], str | int | tuple[int, Any] | None] = lambda request, number: "7"
        self.requests: list[Any] = []
        self.keys: list[str | None] = []
        self.looked = 0
        self.models = ["tiny"]
        self.lock = threading.Lock()
        self.busy = self.busiest = 0
        self.patience = 1.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Judge

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self.server.looked += 1
        self.server.keys.append(self.headers.get("Authorization"))
        self.send(200, {"data": [{"id": name} for name in self.server.models]})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        judge = self.server
        with judge.lock:
            judge.requests.append(request)
            judge.keys.append(self.headers.get("Authorization"))
            number = len(judge.requests)
            judge.busy += 1
            judge.busiest = max(judge.busiest, judge.busy)
        reply = judge.reply(request, number)
        with judge.lock:
            judge.busy -= 1
        if reply is None:
            time.sleep(judge.patience)
        elif isinstance(reply, tuple):
            self.send(*reply)
        elif isinstance(reply, int):
            self.send(reply, {"error": "no"})
        else:
            self.send(200, {"choices": [{"message": {"role": "assistant", "content": reply}}]})

    def send(self, status: int, body: Any) -> None:
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)
