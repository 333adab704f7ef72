"""Leases of one host's devices. Each device is a file lock whose descriptor the child inherits. Free of torch.

A stage leases its whole allocation at once, so two stages cannot each hold half of what both need. A device becomes
free when the last process that holds its lock ends, for whatever reason. The locks belong to the host and the user,
not to a home, and are named by the devices' UUIDs: two runs over two homes, one configured with indices and one with
UUIDs, never lease the same device. A child is given UUIDs too, because an index means another device to nvidia-smi (by
bus) than to CUDA (by speed) on a machine whose devices differ.
"""

import contextlib
import fcntl
import itertools
import os
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from base.errors import UserError
from base.nvidia import ask
from base.store.energy import VISIBLE

POLL_SECONDS = 0.5
# Overrides the folder of the locks, which by default is the user's own below the host's temporary folder.
FOLDER_VARIABLE = "MOPD_DEVICE_LOCKS"
# An index that no UUID is known for counts as nvidia-smi counts.
ORDER = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
_LISTED = re.compile(
    r"^\s*(?:GPU (?P<index>\d+): (?P<name>.+?)|MIG (?P<profile>\S+)\s+Device\s+\d+:)\s*\(UUID: (?P<uuid>[^)]+)\)"
)


class WaitCancelledError(Exception):
    """The run is being stopped, so the wait is abandoned and nothing more is started."""


@dataclass(frozen=True)
class Lease:
    """Devices and the locks that hold them.

    Attributes:
        devices: UUIDs, for `CUDA_VISIBLE_DEVICES`; a device that nvidia-smi does not list keeps its given name.
        descriptors: The open locks. A child that inherits them keeps the devices after `close`.
    """

    devices: tuple[str, ...] = ()
    descriptors: tuple[int, ...] = ()

    @property
    def environment(self) -> dict[str, str]:
        """The variables that make exactly these devices visible to a child, or none if the lease is empty."""
        return {VISIBLE: ",".join(self.devices)} | (ORDER if self.devices else {})

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
        devices = list(dict.fromkeys(host_devices()))
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

    def _try(self, devices: Sequence[str], count: int) -> Lease | None:
        """Lock the first `count` free devices. None, with nothing locked, if fewer are free."""
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


@dataclass(frozen=True)
class Device:
    """A device that nvidia-smi lists, or a MIG slice of one.

    Attributes:
        uuid: Its UUID.
        name: Its model.
        profile: The profile of a slice, such as `1g.10gb`; empty for a whole device.
        parent: UUID of the divided device; empty for a whole device.
    """

    uuid: str
    name: str
    profile: str = ""
    parent: str = ""


def host_devices() -> list[str]:
    """UUIDs of the devices this process may use: those of `CUDA_VISIBLE_DEVICES`, else all that `nvidia-smi -L` lists.

    A divided device (MIG) is replaced by its slices, because a process sees at most one of them through CUDA. A device
    that is not listed keeps its given name. A repeated device is returned once.
    """
    visible, listed = os.environ.get(VISIBLE), _listed()
    if visible is None:
        return listed.leasable(listed.uuids)
    found = [device.strip() for device in visible.split(",") if device.strip() not in ("", "-1")]
    return list(dict.fromkeys(part for name in found for part in listed.named(name)))


def known_devices() -> dict[str, Device]:
    """What nvidia-smi lists of this host, by UUID: whole devices and slices."""
    return {device.uuid: device for device in _listed().devices}


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
        devices: Whole devices and slices, in order.
        uuids: UUIDs of whole devices, by index.
        fault: Why nothing is listed; empty if the driver answers.
    """

    devices: Sequence[Device]
    uuids: Sequence[str]
    fault: str

    def named(self, name: str) -> list[str]:
        """The leasable devices that a name in `CUDA_VISIBLE_DEVICES` refers to.

        As in CUDA, the beginning of a UUID is accepted in place of the whole.
        """
        if name.isdigit() and int(name) < len(self.uuids):
            return self.leasable([self.uuids[int(name)]])
        known = [device.uuid for device in self.devices if device.uuid.startswith(name)]
        return self.leasable(known[:1]) or [name]

    def leasable(self, uuids: Sequence[str]) -> list[str]:
        """These devices, with the slices of each in place of a divided one."""
        slices = {uuid: [device.uuid for device in self.devices if device.parent == uuid] for uuid in uuids}
        return [part for uuid in uuids for part in (slices[uuid] or [uuid])]


def _listed() -> _Listing:
    answer, fault = ask("-L")
    devices: list[Device] = []
    whole: list[Device] = []
    for match in filter(None, map(_LISTED.match, answer.splitlines())):
        if match["index"]:
            whole.append(Device(match["uuid"], match["name"]))
            devices.append(whole[-1])
        elif whole:
            devices.append(Device(match["uuid"], whole[-1].name, match["profile"], whole[-1].uuid))
    return _Listing(devices, [device.uuid for device in whole], fault)
