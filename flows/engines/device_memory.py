"""The memory that a stage may use: this machine's, or that of one of its devices. Free of torch."""

import re
from dataclasses import dataclass

import psutil

from base.nvidia import ask
from flows.engines.devices import Device, host_devices, known_devices

# A slice has a little less than its profile's round figure: 4864 MiB of 1g.5gb, 9728 of 1g.10gb, 19968 of 3g.20gb.
SLICE_SHARE = 0.95
_GIGABYTES = re.compile(r"(\d+)gb")


@dataclass(frozen=True)
class Memory:
    """The memory of one place.

    Attributes:
        total: Bytes; 0 if they are unknown.
        free: Bytes that are free now. All of a device counts as free: it is leased to one stage at a time.
        place: Its owner, for a message.
        kind: Name of the device, as a stage's manifest records it; `cpu` on a host.
    """

    total: int
    free: int
    place: str
    kind: str


def available(gpus: int) -> Memory:
    """The memory of one process of a stage: the smallest of the devices that it may lease, or the host's."""
    if not gpus:
        memory = psutil.virtual_memory()
        return Memory(memory.total, memory.available, "this machine", "cpu")
    known, sizes = known_devices(), _sizes()
    found = [(size, known[uuid]) for uuid in host_devices() if (size := _size(uuid, known, sizes))]
    if not found:
        return Memory(0, 0, "", "")
    total, device = min(found, key=lambda each: each[0])
    place = f"a slice ({device.profile})" if device.profile else "a GPU"
    return Memory(total, total, place, f"{device.name} MIG {device.profile}" if device.profile else device.name)


def _sizes() -> dict[str, int]:
    """UUID -> bytes of whole devices; empty if nvidia-smi does not answer."""
    answer, _ = ask("--query-gpu=uuid,memory.total", "--format=csv,noheader,nounits")
    rows = [[part.strip() for part in line.split(",")] for line in answer.splitlines()]
    return {row[0]: int(row[1]) * 2**20 for row in rows if len(row) == 2 and row[1].isdigit()}


def _size(uuid: str, known: dict[str, Device], sizes: dict[str, int]) -> int:
    """Bytes of a device or slice; 0 if they are unknown."""
    device = known.get(uuid)
    if device is not None and device.profile:
        gigabytes = _GIGABYTES.search(device.profile)
        return int(int(gigabytes[1]) * 2**30 * SLICE_SHARE) if gigabytes else 0
    return sizes.get(uuid, 0)


def gib(size: int) -> str:
    """Bytes as GiB with two digits, for messages."""
    return f"{size / 2**30:.2f}"
