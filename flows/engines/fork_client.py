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

from flows.engines.fork_server import MESSAGE_BYTES
from flows.engines.preload import PRELOAD


class ServerDiedError(Exception):
    """The fork server ended before the child's exit code was known."""


class Child:
    """The client's handle on one job. Closing it ends the job."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.pid: int | None = None
        self.exit_code: int | None = None

    def wait(self, timeout: float) -> int | None:
        """Wait up to `timeout` seconds for the child to end.

        Returns:
            The exit code, negative for a signal; None while the child runs.

        Raises:
            ServerDiedError: the server is gone, and so is the child.
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
        """Request SIGTERM for the child's group now and SIGKILL after `grace` seconds. Returns at once."""
        # The server closes its end when the child has ended, so a broken pipe means that nothing is left to do.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._connection.send(json.dumps({"grace": grace}).encode())

    def close(self) -> None:
        """Close the connection. If the job still runs, the server ends its process group."""
        self._connection.close()


class ForkServer:
    """The client's side of one server process."""

    def __init__(self, log: Path, environment: Mapping[str, str], preload: Sequence[str] = PRELOAD) -> None:
        """Start the server.

        Args:
            log: File to which the server appends its own messages.
            environment: The environment of the server and of every child.
            preload: Modules that the server imports before the first fork.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, log.open("ab") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "flows.engines.fork_server", *preload],
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
            log: File to which the child's stdout and stderr are appended.
            spec: Spec file that `flows.engines.worker.run_spec` runs in the forked child; or
            command: a program that replaces the forked child.
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
        """End the server and the children that still run."""
        self._control.close()
        self._process.terminate()
        self._process.wait()


def child_environment(threads: int) -> dict[str, str]:
    """The environment of node processes: that of this process, with thread counts set and telemetry off.

    The thread counts matter before the first fork: a library that starts a thread pool on import would make the fork
    server unsafe to fork.

    Threads that wait for each other sleep instead of spinning: beside one other busy process a training step with two
    threads on two cores takes half as long, and alone a quarter longer. A policy that the user has set is kept.
    """
    own = {"OMP_WAIT_POLICY": "PASSIVE"} | dict(os.environ)
    return own | {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # Counting devices must not initialise CUDA in the fork server: its children could not use CUDA afterwards.
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        # A folder in the caller's directory must not shadow one of our packages that has the same name.
        "PYTHONSAFEPATH": "1",
        "DO_NOT_TRACK": "1",
        "PYTHONUNBUFFERED": "1",
    }
