"""Metering of a stage: seconds, device seconds, and joules if NVIDIA's management library reports them.

Free of torch.
"""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

from base.store.checkpoint import write_whole

VISIBLE = "CUDA_VISIBLE_DEVICES"
JOULES = 1e-3


def device_names() -> list[str]:
    """The devices of this process, as named in `CUDA_VISIBLE_DEVICES`; empty on a CPU."""
    return [name.strip() for name in os.environ.get(VISIBLE, "").split(",") if name.strip() not in ("", "-1")]


def joules_so_far() -> float | None:
    """The energy in joules that this process's devices have used since their driver was loaded.

    A stage has its devices exclusively, so the difference of two readings is its own consumption. The counter is
    `nvmlDeviceGetTotalEnergyConsumption`, in millijoules, available on Volta and later.

    Returns:
        None if there is no device, no library, or no such counter.
    """
    names = device_names()
    if not names:
        return None
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        handles = [
            pynvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdigit() else pynvml.nvmlDeviceGetHandleByUUID(name)
            for name in names
        ]
        return JOULES * sum(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in handles)
    except pynvml.NVMLError:
        return None


class Meter:
    """The consumption of a node, in this attempt and in all earlier attempts that were killed, failed or stopped.

    Earlier attempts are read from a file that `keep` writes. So work that is repeated after a kill counts each time.
    The consumption of an attempt after its last `keep` is lost.
    """

    def __init__(self, file: Path) -> None:
        """Start metering.

        Args:
            file: The consumption of earlier attempts; need not exist.
        """
        self._file = file
        self._before: Mapping[str, float] = json.loads(file.read_text()) if file.exists() else {}
        self._started, self._joules = time.monotonic(), joules_so_far()

    def used(self) -> dict[str, float]:
        """The consumption so far: `seconds`; `device_seconds`, summed over all devices (on a CPU the process's); and
        `joules`, if all attempts could measure them."""
        seconds = time.monotonic() - self._started
        used = {"seconds": seconds, "device_seconds": seconds * max(1, len(device_names()))}
        now = joules_so_far()
        if now is not None and self._joules is not None and (not self._before or "joules" in self._before):
            used["joules"] = now - self._joules
        return {name: round(value + self._before.get(name, 0.0), 3) for name, value in used.items()}

    def keep(self) -> None:
        """Save the consumption so far for the next attempt, in case this one is killed."""
        write_whole(self._file, json.dumps(self.used()))

    def close(self) -> None:
        """Remove the file once the node is made."""
        self._file.unlink(missing_ok=True)
