"""Devices of one host: each is a file lock whose descriptor the child inherits. Free of torch.

A stage leases its whole allocation at once, so two stages cannot each hold half of what both need. A device is free
the moment the last process that holds its lock is gone, however it died. Locks are those of the host and the user, not
of a home, and are named by the devices' UUIDs: two runs over two homes, one that was given indices and one that was
given UUIDs, never lease the same device.
"""

import contextlib
import fcntl
import itertools
import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from base.errors import UserError
from base.nvidia import ask
from base.store.energy import VISIBLE

POLL_SECONDS = 0.5
# Where the locks lie, in place of the user's own folder under the host's temporary one.
FOLDER_VARIABLE = "MOPD_DEVICE_LOCKS"
_LISTED = re.compile(r"^\s*(?:GPU (?P<index>\d+):|MIG ).*\(UUID: (?P<uuid>[^)]+)\)")


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
        return {VISIBLE: ",".join(self.devices)}

    def split(self, counts: Sequence[int]) -> list["Lease"]:
        """Share the devices out, in order; the shares are closed in place of the whole."""
        ends = list(itertools.accumulate(counts, initial=0))
        return [Lease(self.devices[start:end], self.descriptors[start:end]) for start, end in itertools.pairwise(ends)]

    def close(self) -> None:
        """Let go of this process's hold."""
        for descriptor in self.descriptors:
            os.close(descriptor)


class DeviceLeases:
    """Leases of the host's devices, by locks that all homes of a user share."""

    def __init__(self) -> None:
        """Nothing is locked before `acquire`."""
        self._folder = lock_folder()

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
        devices = _distinct(host_devices(), _listed().uuids)
        if len(devices) < count:
            raise UserError(
                f"resources: {count} devices asked for, this machine shows {len(devices)}{why_no_more()}; a stage "
                f"holds its own and those of the vLLM servers that are started for it"
            )
        self._folder.mkdir(parents=True, exist_ok=True)
        while (lease := self._try(devices, count)) is None:
            if cancelled():
                raise WaitCancelledError
            time.sleep(POLL_SECONDS)
        return lease

    def _try(self, devices: Mapping[str, str], count: int) -> Lease | None:
        """Lock the first `count` free devices, or none at all; `devices` is identity -> name."""
        with contextlib.ExitStack() as undo:
            held: dict[str, int] = {}
            for identity, device in devices.items():
                descriptor = os.open(self._folder / f"gpu-{identity}.lock", os.O_RDWR | os.O_CREAT, 0o644)
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
    """The devices this process may use: those of `CUDA_VISIBLE_DEVICES`, else all that `nvidia-smi -L` lists.

    Of a device that is divided (MIG) those are its slices, for CUDA shows a process no more than one of them.
    """
    visible = os.environ.get(VISIBLE)
    if visible is not None:
        return [device.strip() for device in visible.split(",") if device.strip() not in ("", "-1")]
    return list(_listed().leasable)


def why_no_more() -> str:
    """What bounds the number of `host_devices`, in brackets behind a space."""
    if VISIBLE in os.environ:
        return f" ({VISIBLE}={os.environ[VISIBLE]})"
    fault = _listed().fault
    return f" ({fault})" if fault else ""


def lock_folder() -> Path:
    """Where the locks of this user's devices on this host lie."""
    named = os.environ.get(FOLDER_VARIABLE)
    return Path(named) if named else Path(tempfile.gettempdir()) / f"mopd-{os.getuid()}" / "devices"


@dataclass(frozen=True)
class _Listing:
    """What `nvidia-smi -L` lists.

    Attributes:
        uuids: Index -> UUID of every device, and UUID -> UUID of those and of their MIG slices.
        leasable: Indices of whole devices, UUIDs of the slices of divided ones.
        fault: Why nothing is listed; empty where the driver answers.
    """

    uuids: Mapping[str, str]
    leasable: Sequence[str]
    fault: str


def _listed() -> _Listing:
    answer, fault = ask("-L")
    uuids: dict[str, str] = {}
    parts: dict[str, list[str]] = {}
    index = ""
    for match in filter(None, map(_LISTED.match, answer.splitlines())):
        uuids[match["uuid"]] = match["uuid"]
        if match["index"]:
            index = match["index"]
            uuids[index] = match["uuid"]
            parts[index] = []
        else:
            parts.setdefault(index, []).append(match["uuid"])
    leasable = [name for index, slices in parts.items() for name in (slices or [index])]
    return _Listing(uuids, leasable, fault)


def _distinct(names: Sequence[str], listed: Mapping[str, str]) -> dict[str, str]:
    """Identity -> name of each device once; one of which nothing is told is known by its name.

    Like CUDA, this takes the start of a UUID for the whole.
    """
    found: dict[str, str] = {}
    for name in names:
        uuid = listed.get(name) or next((uuid for uuid in listed.values() if uuid.startswith(name)), name)
        found.setdefault(uuid, name)
    return found
