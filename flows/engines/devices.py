"""Leases of one host's devices. Each device is a file lock whose descriptor the child inherits. Free of torch.

A stage leases its whole allocation at once, so two stages cannot each hold half of what both need. A device becomes
free when the last process that holds its lock ends, for whatever reason. The locks belong to the host and the user,
not to a home, and are named by the devices' UUIDs: two runs over two homes, one configured with indices and one with
UUIDs, never lease the same device.
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
# Overrides the folder of the locks, which by default is the user's own below the host's temporary folder.
FOLDER_VARIABLE = "MOPD_DEVICE_LOCKS"
_LISTED = re.compile(r"^\s*(?:GPU (?P<index>\d+):|MIG ).*\(UUID: (?P<uuid>[^)]+)\)")


class WaitCancelledError(Exception):
    """The run is being stopped, so the wait is abandoned and nothing more is started."""


@dataclass(frozen=True)
class Lease:
    """Devices and the locks that hold them.

    Attributes:
        devices: Indices or UUIDs, for `CUDA_VISIBLE_DEVICES`.
        descriptors: The open locks. A child that inherits them keeps the devices after `close`.
    """

    devices: tuple[str, ...] = ()
    descriptors: tuple[int, ...] = ()

    @property
    def environment(self) -> dict[str, str]:
        """The variables that make exactly these devices visible to a child, or none if the lease is empty."""
        return {VISIBLE: ",".join(self.devices)}

    def split(self, counts: Sequence[int]) -> list["Lease"]:
        """Divide the devices, in order, into leases of `counts` devices. Close the parts, not the whole."""
        ends = list(itertools.accumulate(counts, initial=0))
        return [Lease(self.devices[start:end], self.descriptors[start:end]) for start, end in itertools.pairwise(ends)]

    def close(self) -> None:
        """Close this process's descriptors of the locks."""
        for descriptor in self.descriptors:
            os.close(descriptor)


class DeviceLeases:
    """Leases the host's devices through locks that all homes of a user share."""

    def __init__(self) -> None:
        """Nothing is locked before `acquire`."""
        self._folder = lock_folder()

    def acquire(self, count: int, cancelled: Callable[[], bool] = lambda: False) -> Lease:
        """Lease `count` devices, waiting while fewer are free.

        Args:
            count: Number of devices; 0 returns an empty lease.
            cancelled: Called at every poll; True abandons the wait.

        Raises:
            UserError: the host has fewer devices than requested.
            WaitCancelledError: `cancelled` returned True.
        """
        if count == 0:
            return Lease()
        devices = _distinct(host_devices(), _listed().uuids)
        if len(devices) < count:
            raise UserError(
                f"resources: {count} devices are needed, but this machine has {len(devices)}{why_no_more()}; a stage "
                f"needs its own devices and those of the vLLM servers that the run starts for it"
            )
        self._folder.mkdir(parents=True, exist_ok=True)
        while (lease := self._try(devices, count)) is None:
            if cancelled():
                raise WaitCancelledError
            time.sleep(POLL_SECONDS)
        return lease

    def _try(self, devices: Mapping[str, str], count: int) -> Lease | None:
        """Lock the first `count` free devices. None, with nothing locked, if fewer are free.

        Args:
            devices: identity -> name.
            count: Number of devices.
        """
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

    A divided device (MIG) is replaced by its slices, because a process sees at most one of them through CUDA.
    """
    visible = os.environ.get(VISIBLE)
    if visible is not None:
        return [device.strip() for device in visible.split(",") if device.strip() not in ("", "-1")]
    return list(_listed().leasable)


def why_no_more() -> str:
    """The limit on the number of `host_devices`, for a message: a space and brackets; empty if there is none."""
    if VISIBLE in os.environ:
        return f" ({VISIBLE}={os.environ[VISIBLE]})"
    fault = _listed().fault
    return f" ({fault})" if fault else ""


def lock_folder() -> Path:
    """The folder of this user's device locks on this host."""
    named = os.environ.get(FOLDER_VARIABLE)
    return Path(named) if named else Path(tempfile.gettempdir()) / f"mopd-{os.getuid()}" / "devices"


@dataclass(frozen=True)
class _Listing:
    """The devices that `nvidia-smi -L` lists.

    Attributes:
        uuids: Index -> UUID of every device, and UUID -> UUID of devices and of their MIG slices.
        leasable: Indices of whole devices and UUIDs of the slices of divided ones.
        fault: Why nothing is listed; empty if the driver answers.
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
    """Identity -> name, with each device once. The identity is the UUID, or the name of a device that is not listed.

    As in CUDA, the beginning of a UUID is accepted in place of the whole.
    """
    found: dict[str, str] = {}
    for name in names:
        uuid = listed.get(name) or next((uuid for uuid in listed.values() if uuid.startswith(name)), name)
        found.setdefault(uuid, name)
    return found
