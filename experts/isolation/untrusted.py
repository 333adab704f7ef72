"""Runs third-party verifiers, which may evaluate a model's text, in child processes that can be ended.

Each process that scores has a few workers of its own (`experts.isolation.untrusted_worker` lists their restrictions).
The first completion that needs a worker starts it, which takes the one or two seconds of importing its library. The
worker is kept, and a completion then costs about 0.07 ms besides the verifier's own time (1,000 of `chain_sum` took
0.074 s). A worker that exceeds its time, ends or answers out of turn is replaced at the next completion. `Losses`
counts such a completion, which scores 0 without having been judged. A forbidden action raises inside the worker and has
no other effect.
"""

import contextlib
import json
import logging
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from experts.isolation.untrusted_worker import CPU_SECONDS

# Wall-clock limit of one completion; honest answers take milliseconds, the slowest of 80 integrals 0.7 s.
SECONDS = 5.0
# Importing a library and making a task's data set are trusted, and slow on a busy machine.
START_SECONDS = 120.0
WORKERS = 2

logger = logging.getLogger(__name__)

_LONGEST_REPLY = 64 * 1024
# reasoning-gym imports matplotlib, which caches its list of fonts in the home directory and would otherwise rebuild it.
_KEPT_VARIABLES = ("HOME", "LD_LIBRARY_PATH", "MPLCONFIGDIR", "TMPDIR", "TZ")


class VerifierError(Exception):
    """A verifier gave no value for a text: it raised, or see `VerifierLostError`."""


class VerifierLostError(VerifierError):
    """The verifier's process ended, took too long or answered out of turn, so the text was not judged."""


class Losses:
    """Counts a domain's completions that scored 0 because their verifier was lost."""

    def __init__(self, domain: str) -> None:
        self._domain = domain
        self._lock = threading.Lock()
        self._count, self._logged, self._last = 0, 0, ""

    def add(self, error: VerifierLostError) -> None:
        """Count one loss; thread-safe."""
        with self._lock:
            self._count, self._last = self._count + 1, str(error)

    def facts(self) -> dict[str, float]:
        """`verifier_lost`, if it is above 0."""
        return {"verifier_lost": float(self._count)} if self._count else {}

    def news(self) -> list[str]:
        """One line on the losses since the last call."""
        with self._lock:
            new, self._logged = self._count - self._logged, self._count
        if not new:
            return []
        return [
            f"domains.{self._domain}: {new} completion(s) scored 0 because the verifier was lost; the last time: "
            f"{self._last}"
        ]


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    channel: socket.socket
    prepared: set[str] = field(default_factory=set)
    cpu_seconds: float = 0.0
    settled: bool = True

    def ask(self, verifier: str, arguments: Mapping[str, Any], seconds: float) -> Any:
        """The value of one call.

        Raises:
            VerifierError: the verifier raised.
            VerifierLostError: the worker cannot be used again.
        """
        self.settled = False
        token = secrets.token_hex(8)
        question = {"token": token, "verifier": verifier, "arguments": arguments}
        try:
            self.channel.settimeout(seconds)
            self.channel.sendall(json.dumps(question).encode() + b"\n")
            reply = self.hear(seconds)
        except TimeoutError:
            raise VerifierLostError(f"no answer within {seconds:g} s") from None
        except (OSError, ValueError) as error:
            self.end(patience=1.0)
            raise VerifierLostError(f"its process ended ({self.process.returncode}): {error}") from None
        if reply.get("token") != token:
            raise VerifierLostError("it answered with another token")
        self.settled = True
        self.cpu_seconds = reply["cpu_seconds"]
        for action in reply["actions_refused"]:
            logger.debug("a verifier was refused an action: %s", action)
        if "refused" in reply:
            raise VerifierError(reply["refused"])
        return reply["value"]

    def hear(self, seconds: float) -> dict[str, Any]:
        """One line from the worker as an object."""
        deadline = time.monotonic() + seconds
        line = b""
        while not line.endswith(b"\n"):
            self.channel.settimeout(max(deadline - time.monotonic(), 1e-3))
            part = self.channel.recv(_LONGEST_REPLY)
            if not part or len(line) > _LONGEST_REPLY:
                raise ConnectionError("no whole answer")
            line += part
        reply = json.loads(line)
        if not isinstance(reply, dict):
            raise ValueError("not an object")
        return reply

    def end(self, patience: float = 0.0) -> None:
        """Wait for the worker to end, and kill it if it does not end by itself within `patience` seconds."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(patience)
        self.process.kill()
        self.process.wait()
        self.channel.close()


class Workers:
    """The workers of this process for one library; thread-safe.

    A forked process has none and starts its own, because its parent's workers serve the parent only.
    """

    def __init__(self, library: str) -> None:
        self.library = library
        self.forget()
        os.register_at_fork(after_in_child=self.forget)

    def forget(self) -> None:
        """Drop all workers, as needed in a process that has just been forked."""
        self._idle: list[_Worker] = []
        self._free = threading.BoundedSemaphore(WORKERS)
        # PR_SET_PDEATHSIG refers to the thread that started the child, so a permanent thread starts all of them.
        self._starter = ThreadPoolExecutor(1, thread_name_prefix=f"untrusted-{self.library}")

    def ask(self, verifier: str, arguments: Mapping[str, Any], preparation: Mapping[str, Any] | None = None) -> Any:
        """The value that a verifier gives a text.

        Args:
            verifier: A function of the library, by its name in `experts.isolation.untrusted_worker`.
            arguments: Its keyword arguments, JSON-serialisable.
            preparation: Arguments of the library's `prepare`, among them a `key`; each worker is prepared once per key.

        Raises:
            VerifierError: the verifier raised.
            VerifierLostError: it exceeded `SECONDS`, or its process ended.
            RuntimeError: no worker could be started or prepared; the host is at fault, not the text.
        """
        with self._free:
            worker = self._take()
            try:
                if preparation is not None and preparation["key"] not in worker.prepared:
                    self._prepare(worker, preparation)
                return worker.ask(verifier, arguments, SECONDS)
            except VerifierLostError as error:
                logger.warning("a worker for %s is replaced: %s", self.library, error)
                raise
            finally:
                self._give_back(worker)

    def _take(self) -> _Worker:
        while self._idle:
            # Another thread may have taken the last one.
            with contextlib.suppress(IndexError):
                worker = self._idle.pop()
                if worker.process.poll() is None:
                    return worker
                worker.end()
        return self._starter.submit(_start, self.library).result()

    def _give_back(self, worker: _Worker) -> None:
        # An interrupted request leaves a worker unsettled too.
        if not worker.settled or worker.cpu_seconds > CPU_SECONDS / 2:
            worker.end()
        else:
            self._idle.append(worker)

    def _prepare(self, worker: _Worker, preparation: Mapping[str, Any]) -> None:
        try:
            worker.ask("prepare", preparation, START_SECONDS)
        except VerifierError as error:
            raise RuntimeError(f"the {self.library} worker cannot prepare {preparation['key']}: {error}") from None
        worker.prepared.add(preparation["key"])


def _start(library: str) -> _Worker:
    ours, theirs = socket.socketpair()
    environment = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    environment |= {
        "PYTHONPATH": os.pathsep.join(os.path.abspath(place) for place in sys.path),
        # A simplification may depend on the order of sets; the same text must score the same in every process.
        "PYTHONHASHSEED": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-s", "-P", "-m", "experts.isolation.untrusted_worker", library, str(os.getpid())],
            stdin=theirs.fileno(), stdout=subprocess.DEVNULL, cwd="/", env=environment,
        )  # fmt: skip
    worker = _Worker(process, ours)
    try:
        worker.hear(START_SECONDS)
    except (OSError, ValueError) as error:
        worker.end(patience=1.0)
        raise RuntimeError(f"the {library} worker did not start (exit code {process.returncode}): {error}") from None
    return worker


REASONING = Workers("reasoning")
VALUES = Workers("values")
PATTERNS = Workers("patterns")
