"""Operations on their way to a tracking server: sent in order, kept on disk while it cannot be reached.

An operation is a JSON-serialisable mapping with an `op`. Whoever applies it raises `Unreachable` when the server may
take it later; it then stays at the head of the queue, everything behind it waits, and the file beside the run
holds all of it, so that neither a dead server nor a killed run loses anything. Nothing here knows MLflow.
"""

import contextlib
import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from stages.core.checkpoint import write_whole

RETRY_SECONDS = 30.0
Operation = Mapping[str, Any]
Apply = Callable[[Operation, dict[str, str]], None]
logger = logging.getLogger(__name__)


class Unreachable(Exception):
    """The server did not take an operation but may take it later."""


class Rejected(Exception):
    """The server will never take an operation."""


class Outbox:
    """A queue of operations, safe to use from several threads.

    Attributes:
        ids: The server's ids of things named by operations; filled by `apply`, kept with the unsent operations.
    """

    def __init__(self, path: Path, apply: Apply) -> None:
        """Open the queue kept at `path`, with what an earlier process could not send, and own it while alive."""
        self.path = path
        self.ids: dict[str, str] = {}
        self._apply = apply
        self._waiting: deque[Operation] = deque()
        self._mutex = threading.RLock()
        self._not_before = 0.0
        self._warned = False
        self._unkept = False
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not thread-local: whichever thread finishes a run gives its file up.
        self._owned = FileLock(self._owned_path, thread_local=False)
        self._owned.acquire(timeout=0)
        if path.exists():
            # A process killed while it wrote leaves a last line without an end.
            lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            records = [json.loads(line) for line in lines]
            # A full disk leaves an empty file, or one without its head.
            if records and "ids" in records[0]:
                self.ids.update(records.pop(0)["ids"])
            self._waiting.extend(records)

    @property
    def unsent(self) -> int:
        """Operations the server has not taken."""
        return len(self._waiting)

    def submit(self, operation: Operation) -> None:
        """Send an operation after all that were submitted before it, or keep it."""
        with self._mutex:
            self._waiting.append(operation)
            if time.monotonic() >= self._not_before:
                self.flush()
            else:
                with self._disk_may_be_full(), self.path.open("a") as file:
                    file.write(json.dumps(operation) + "\n")

    def flush(self) -> int:
        """Try to send everything now.

        Returns:
            How many operations are still unsent; they lie in the file.
        """
        with self._mutex:
            while self._waiting:
                try:
                    self._apply(self._waiting[0], self.ids)
                except Unreachable as error:
                    self._not_before = time.monotonic() + RETRY_SECONDS
                    self._warn(error)
                    self._keep()
                    return len(self._waiting)
                except Rejected as error:
                    logger.warning("the tracking server refused '%s': %s", self._waiting[0]["op"], error)
                self._waiting.popleft()
            self._not_before = 0.0
            self.path.unlink(missing_ok=True)
            return 0

    def close(self) -> int:
        """Send what can be sent and give the file up to the next start."""
        unsent = self.flush()
        self._owned.release()
        if not unsent:
            self._owned_path.unlink(missing_ok=True)
        return unsent

    @property
    def _owned_path(self) -> Path:
        return self.path.with_suffix(".lock")

    def _warn(self, error: Unreachable) -> None:
        if not self._warned:
            logger.warning(
                "the tracking server does not answer; the run goes on and what it says is kept in %s: %s",
                self.path,
                error,
            )
        self._warned = True

    def _keep(self) -> None:
        lines = [json.dumps({"ids": self.ids}), *(json.dumps(operation) for operation in self._waiting)]
        with self._disk_may_be_full():
            write_whole(self.path, "".join(line + "\n" for line in lines))

    @contextlib.contextmanager
    def _disk_may_be_full(self) -> Iterator[None]:
        """What cannot be written stays in memory: tracking must not end a run that the disk would still let finish."""
        try:
            yield
        except OSError as error:
            if not self._unkept:
                logger.warning("what the tracking server has not taken cannot be kept in %s: %s", self.path, error)
            self._unkept = True


def send_left_over(folder: Path, apply: Apply) -> int:
    """Send what earlier processes, no longer alive, left unsent in a folder; stop when the server does not answer.

    Returns:
        How many operations of the file it stopped at are still unsent.
    """
    for path in sorted(folder.glob("*.jsonl")):
        try:
            outbox = Outbox(path, apply)
        except Timeout:
            continue
        if unsent := outbox.close():
            return unsent
    return 0
