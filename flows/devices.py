"""Devices of one host: each is a file lock whose descriptor the child inherits. Free of torch.

A stage leases its whole allocation at once, so two stages cannot each hold half of what both need. A device is free
the moment the last process that holds its lock is gone, however it died.
"""

import contextlib
import fcntl
import itertools
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from experts.errors import UserError

POLL_SECONDS = 0.5
_VISIBLE = "CUDA_VISIBLE_DEVICES"


class WaitCancelledError(Exception):
    """The run is being stopped: nothing is waited for or started any more."""


@dataclass(frozen=True)
class Lease:
    """Devices and the locks that hold them.

    Attributes:
        devices: What `CUDA_VISIBLE_DEVICES` is to name: indices or UUIDs.
        descriptors: The open locks; a child that inherits them keeps the devices after `close`.
    """

    devices: tuple[str, ...] = ()
    descriptors: tuple[int, ...] = ()

    @property
    def environment(self) -> dict[str, str]:
        """The variables that show a child exactly these devices, and none when the lease is empty."""
        return {_VISIBLE: ",".join(self.devices)}

    def split(self, counts: Sequence[int]) -> list["Lease"]:
        """Share the devices out, in order; the shares are closed in place of the whole."""
        ends = list(itertools.accumulate(counts, initial=0))
        return [Lease(self.devices[start:end], self.descriptors[start:end]) for start, end in itertools.pairwise(ends)]

    def close(self) -> None:
        """Let go of this process's hold."""
        for descriptor in self.descriptors:
            os.close(descriptor)


class DeviceLeases:
    """Leases of the host's devices, by locks under `home/devices`."""

    def __init__(self, home: Path) -> None:
        self._folder = home / "devices"

    def acquire(self, count: int, cancelled: Callable[[], bool] = lambda: False) -> Lease:
        """Lease `count` devices; waits while fewer are free.

        Args:
            count: How many; 0 gives an empty lease.
            cancelled: Asked while waiting; True gives the wait up.

        Raises:
            UserError: the host has fewer devices than asked for.
            WaitCancelledError: `cancelled` said so.
        """
        if count == 0:
            return Lease()
        devices = host_devices()
        if len(devices) < count:
            raise UserError(
                f"resources: {count} devices asked for, this machine shows {len(devices)}; a stage holds its own and "
                f"those of the vLLM servers that are started for it"
            )
        self._folder.mkdir(parents=True, exist_ok=True)
        while (lease := self._try(devices, count)) is None:
            if cancelled():
                raise WaitCancelledError
            time.sleep(POLL_SECONDS)
        return lease

    def _try(self, devices: Sequence[str], count: int) -> Lease | None:
        """Lock the first `count` free devices, or none at all."""
        with contextlib.ExitStack() as undo:
            held: dict[str, int] = {}
            for device in devices:
                descriptor = os.open(self._folder / f"gpu-{device}.lock", os.O_RDWR | os.O_CREAT, 0o644)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    os.close(descriptor)
                    continue
                held[device] = descriptor
                undo.callback(os.close, descriptor)
                if len(held) == count:
                    undo.pop_all()
                    return Lease(tuple(held), tuple(held.values()))
        return None


def host_devices() -> list[str]:
    """The devices this process may use: those of `CUDA_VISIBLE_DEVICES`, else all that `nvidia-smi -L` lists."""
    visible = os.environ.get(_VISIBLE)
    if visible is not None:
        return [device.strip() for device in visible.split(",") if device.strip() not in ("", "-1")]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return []
    return [str(index) for index, line in enumerate(listed.stdout.splitlines()) if line.startswith("GPU ")]
