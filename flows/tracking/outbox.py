"""Operations on their way to a tracking server: sent in order, kept on disk while it cannot be reached.

An operation is a JSON-serialisable mapping with an `op`. Whoever applies it raises `Unreachable` when the server may
take it later; it then stays at the head of the queue, everything behind it waits, and the file beside the run
holds all of it, so that neither a dead server nor a killed run loses anything. What can never be sent must not hold up
the rest: it is set aside in a file of its own. Nothing here knows MLflow.
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
# A server that answers, and does not take an operation so often, will not take it.
DOUBTFUL_TRIES = 3
ASIDE = ".aside"
Operation = Mapping[str, Any]
Apply = Callable[[Operation, dict[str, str]], None]
logger = logging.getLogger(__name__)


class Unreachable(Exception):
    """The server did not take an operation but may take it later."""


class Doubtful(Unreachable):
    """The server answers but did not take an operation, for a reason that may pass or not."""


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
        self._doubts = 0
        self._torn = False
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not thread-local: whichever thread finishes a run gives its file up.
        self._owned = FileLock(self._owned_path, thread_local=False)
        self._owned.acquire(timeout=0)
        if path.exists():
            self._read()

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
            elif self._torn:
                self._keep()
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
        """Send what can be sent and give the file up to the next start."""
        unsent = self.flush()
        self._owned.release()
        if not unsent:
            self._owned_path.unlink(missing_ok=True)
        return unsent

    @property
    def _owned_path(self) -> Path:
        return self.path.with_suffix(".lock")

    def _read(self) -> None:
        """Take up what an earlier process could not send."""
        # A process killed while it wrote leaves a last line without an end.
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
        """Keep what cannot be sent for a person to look at."""
        path = self.path.with_suffix(ASIDE)
        with self._disk_may_be_full(), path.open("a") as file:
            file.write(line)
        return path

    def _warn(self, error: Unreachable) -> None:
        if not self._warned:
            what = "takes nothing just now" if isinstance(error, Doubtful) else "does not answer"
            logger.warning(
                "the tracking server %s; the run goes on and what it says is kept in %s: %s", what, self.path, error
            )
        self._warned = True

    def _keep(self) -> None:
        lines = [json.dumps({"ids": self.ids}), *(json.dumps(operation) for operation in self._waiting)]
        with self._disk_may_be_full():
            write_whole(self.path, "".join(line + "\n" for line in lines))
            self._torn = False

    @contextlib.contextmanager
    def _disk_may_be_full(self) -> Iterator[None]:
        """What cannot be written stays in memory: tracking must not end a run that the disk would still let finish."""
        try:
            yield
        except OSError as error:
            if not self._unkept:
                logger.warning("what the tracking server has not taken cannot be kept in %s: %s", self.path, error)
            self._unkept = True
            # Half a line may stand at the end, to which the next would be joined.
            self._torn = True


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
