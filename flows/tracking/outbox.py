"""A queue of operations for a tracking server: sent in order, and kept on disk while the server is unreachable.

An operation is a JSON-serialisable mapping with an `op`. The function that applies it raises `Unreachable` when the
server may accept it later. The operation then stays at the head of the queue, everything behind it waits, and a file
beside the run holds them all, so that neither a dead server nor a killed run loses anything. An operation that can
never be sent must not block the rest: it is set aside in a separate file. Free of mlflow.
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

from base.store.checkpoint import write_whole

RETRY_SECONDS = 30.0
# After so many failures against a server that answers, an operation counts as refused.
DOUBTFUL_TRIES = 3
ASIDE = ".aside"
Operation = Mapping[str, Any]
Apply = Callable[[Operation, dict[str, str]], None]
logger = logging.getLogger(__name__)


class Unreachable(Exception):
    """The server did not accept an operation but may accept it later."""


class Doubtful(Unreachable):
    """The server answers but did not accept an operation, for a reason that may be permanent."""


class Rejected(Exception):
    """The server will never accept an operation."""


class Outbox:
    """A queue of operations, safe to use from several threads.

    Attributes:
        ids: The server's ids for the references in operations; filled by `apply`, saved with the unsent operations.
    """

    def __init__(self, path: Path, apply: Apply) -> None:
        """Open and lock the queue at `path`, with the operations that an earlier process could not send.

        Raises:
            Timeout: a live process owns the queue.
        """
        self.path = path
        self.ids: dict[str, str] = {}
        self._apply = apply
        self._waiting: deque[Operation] = deque()
        self._mutex = threading.RLock()
        self._not_before = 0.0
        self._warned = False
        self._unkept = False
        self._doubts = 0
        self._torn = False
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not thread-local, because another thread may finish the run and release the lock.
        self._owned = FileLock(self._owned_path, thread_local=False)
        self._owned.acquire(timeout=0)
        if path.exists():
            self._read()

    @property
    def unsent(self) -> int:
        """The number of operations the server has not accepted."""
        return len(self._waiting)

    def submit(self, operation: Operation) -> None:
        """Send an operation after all earlier ones, or keep it for later."""
        with self._mutex:
            self._waiting.append(operation)
            if time.monotonic() >= self._not_before:
                self.flush()
            elif self._torn:
                self._keep()
            else:
                with self._disk_may_be_full(), self.path.open("a") as file:
                    file.write(json.dumps(operation) + "\n")

    def flush(self) -> int:
        """Try to send everything now.

        Returns:
            The number of operations that are still unsent and kept in the file.
        """
        with self._mutex:
            while self._waiting:
                try:
                    self._apply(self._waiting[0], self.ids)
                except Unreachable as error:
                    self._doubts = self._doubts + 1 if isinstance(error, Doubtful) else 0
                    if self._doubts < DOUBTFUL_TRIES:
                        self._not_before = time.monotonic() + RETRY_SECONDS
                        self._warn(error)
                        self._keep()
                        return len(self._waiting)
                    self._refused(error)
                except Rejected as error:
                    self._refused(error)
                self._waiting.popleft()
                self._doubts = 0
            self._not_before = 0.0
            self.path.unlink(missing_ok=True)
            return 0

    def close(self) -> int:
        """Send what can be sent, release the file for the next start, and return the number of unsent operations."""
        unsent = self.flush()
        self._owned.release()
        if not unsent:
            self._owned_path.unlink(missing_ok=True)
        return unsent

    @property
    def _owned_path(self) -> Path:
        return self.path.with_suffix(".lock")

    def _read(self) -> None:
        """Load the operations that an earlier process could not send."""
        # A process killed while it wrote leaves a last line without a line break, which is skipped.
        text = self.path.read_text(errors="replace")
        for line in (line for line in text.splitlines(keepends=True) if line.endswith("\n")):
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if isinstance(record, dict) and "op" in record:
                self._waiting.append(record)
            elif isinstance(record, dict) and "ids" in record:
                self.ids.update(record["ids"])
            else:
                aside = self._set_aside(line)
                logger.warning("%s: a line cannot be read, so it is not sent; it is kept in %s", self.path, aside)

    def _refused(self, error: Exception) -> None:
        operation = self._waiting[0]
        aside = self._set_aside(json.dumps(operation) + "\n")
        logger.warning("the tracking server refused '%s': %s; it is kept in %s", operation["op"], error, aside)

    def _set_aside(self, line: str) -> Path:
        """Save a line that cannot be sent, for inspection, and return the file's path."""
        path = self.path.with_suffix(ASIDE)
        with self._disk_may_be_full(), path.open("a") as file:
            file.write(line)
        return path

    def _warn(self, error: Unreachable) -> None:
        if not self._warned:
            what = "accepts nothing at present" if isinstance(error, Doubtful) else "does not answer"
            logger.warning(
                "the tracking server %s; the run goes on and its records are kept in %s: %s", what, self.path, error
            )
        self._warned = True

    def _keep(self) -> None:
        lines = [json.dumps({"ids": self.ids}), *(json.dumps(operation) for operation in self._waiting)]
        with self._disk_may_be_full():
            write_whole(self.path, "".join(line + "\n" for line in lines))
            self._torn = False

    @contextlib.contextmanager
    def _disk_may_be_full(self) -> Iterator[None]:
        """Turn a failed write into a warning; the data stay in memory.

        Tracking must not end a run that could still finish on a full disk.
        """
        try:
            yield
        except OSError as error:
            if not self._unkept:
                logger.warning(
                    "records that the tracking server did not take cannot be saved in %s: %s", self.path, error
                )
            self._unkept = True
            # The file may end in half a line, to which the next line would be appended.
            self._torn = True


def send_left_over(folder: Path, apply: Apply) -> int:
    """Send the operations that dead processes left unsent in a folder. Stops when the server does not answer.

    Returns:
        The number of operations still unsent in the file it stopped at; 0 if all files were sent.
    """
    for path in sorted(folder.glob("*.jsonl")):
        try:
            outbox = Outbox(path, apply)
        except Timeout:
            continue
        if unsent := outbox.close():
            return unsent
    return 0
