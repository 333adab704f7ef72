"""The client's side of the fork server: one `ForkServer` process, one `Child` per job."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from flows.engines.forkserver import MESSAGE_BYTES, PRELOAD


class ServerDiedError(Exception):
    """The fork server ended before the child's exit code was known."""


class Child:
    """The client's hold on one job: closing it ends the job."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.pid: int | None = None
        self.exit_code: int | None = None

    def wait(self, timeout: float) -> int | None:
        """Wait up to `timeout` seconds for the end.

        Returns:
            The exit code, negative for a signal; None while the child runs.

        Raises:
            ServerDiedError: the server is gone, and the child with it.
        """
        deadline = time.monotonic() + timeout
        while self.exit_code is None and (left := deadline - time.monotonic()) > 0:
            self._connection.settimeout(left)
            try:
                message = self._connection.recv(MESSAGE_BYTES)
            except TimeoutError:
                break
            except ConnectionResetError:
                message = b""
            if not message:
                raise ServerDiedError
            report = json.loads(message)
            self.pid = report.get("pid", self.pid)
            self.exit_code = report.get("exit_code")
        return self.exit_code

    def end(self, grace: float) -> None:
        """Ask for SIGTERM to the child's group now and SIGKILL after `grace` seconds; returns at once."""
        # The other end is closed once the child has ended, which is what is asked for.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._connection.send(json.dumps({"grace": grace}).encode())

    def close(self) -> None:
        """Let go of the job; if it still runs, its group is ended."""
        self._connection.close()


class ForkServer:
    """The client's side of one server process."""

    def __init__(self, log: Path, environment: Mapping[str, str], preload: Sequence[str] = PRELOAD) -> None:
        """Start the server.

        Args:
            log: File its own messages are appended to.
            environment: The environment of the server and of every child.
            preload: Modules it imports before the first fork.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, log.open("ab") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "flows.engines.forkserver", *preload],
                stdin=theirs.fileno(),
                stdout=file,
                stderr=file,
                env=dict(environment),
                start_new_session=True,
            )

    @property
    def alive(self) -> bool:
        """Whether the server runs."""
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        """Process id of the server."""
        return self._process.pid

    def start(
        self,
        log: Path,
        *,
        spec: Path | None = None,
        command: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        descriptors: Sequence[int] = (),
    ) -> Child:
        """Start a child in a process group of its own.

        Args:
            log: File its stdout and stderr are appended to.
            spec: What `flows.engines.worker.run_spec` runs in the forked child, or
            command: a program to run in its place.
            environment: Variables to add to the server's.
            descriptors: Open files for the child to hold until it ends (device locks).
        """
        request = {
            "log": str(log),
            "spec": str(spec) if spec else None,
            "command": list(command),
            "environment": dict(environment or {}),
        }
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                socket.send_fds(self._control, [json.dumps(request).encode()], [theirs.fileno(), *descriptors])
            except (BrokenPipeError, ConnectionResetError) as error:
                ours.close()
                raise ServerDiedError from error
        return Child(ours)

    def close(self) -> None:
        """End the server, and with it what it still runs."""
        self._control.close()
        self._process.terminate()
        self._process.wait()


def child_environment(threads: int) -> dict[str, str]:
    """The environment of node processes: this one's, with thread counts set and no telemetry.

    A library that starts a thread pool while it is imported would make the fork server unfit to fork.
    """
    return dict(os.environ) | {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # Looking for devices must not initialise CUDA in the fork server, for its children could not use it then.
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        # A folder of the caller's that is named like one of our packages must not take its place.
        "PYTHONSAFEPATH": "1",
        "DO_NOT_TRACK": "1",
        "PYTHONUNBUFFERED": "1",
    }
