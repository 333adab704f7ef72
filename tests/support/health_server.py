"""A server as its supervisor sees one: `python health_server.py --host H --port P [--fail]` answers `/health`.

What is posted to it is its answer from then on, with status 503.

Like vLLM it has a process below it that outlives it unless somebody ends the whole group; `--fail` ends at once.
"""

import argparse
import signal
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer

ENGINE = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"


class Answer(BaseHTTPRequestHandler):
    """200 to whatever is asked, until something is posted."""

    unwell: bytes | None = None

    def do_GET(self) -> None:
        """Say how it is."""
        self.answer(200 if self.unwell is None else 503, self.unwell or b"")

    def do_POST(self) -> None:
        """Be unwell from now on."""
        Answer.unwell = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(200, b"")

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    parser.add_argument("--fail", action="store_true")
    asked = parser.parse_args()
    if asked.fail:
        sys.exit("no such model")
    subprocess.Popen([sys.executable, "-c", ENGINE])
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    HTTPServer((asked.host, asked.port), Answer).serve_forever()


if __name__ == "__main__":
    main()
