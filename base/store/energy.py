"""What a stage has used: seconds, its devices' seconds, and joules where NVIDIA's management library tells.

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
    """The devices this process was given, as `CUDA_VISIBLE_DEVICES` names them; empty on a CPU."""
    return [name.strip() for name in os.environ.get(VISIBLE, "").split(",") if name.strip() not in ("", "-1")]


def joules_so_far() -> float | None:
    """Energy that this process's devices have used since their driver was loaded.

    A stage holds its devices alone, so the difference of two readings is its own. The counter is that of
    `nvmlDeviceGetTotalEnergyConsumption`, in millijoules, of Volta and later.

    Returns:
        None where there is no device, no library, or no such counter.
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
    """What a node has used by now, in this attempt and in all before it that were killed, failed or were stopped.

    The attempts before are read from a file that `keep` writes, so work that is done again after a kill counts as often
    as it was done; what an attempt used after its last `keep` is not known.
    """

    def __init__(self, file: Path) -> None:
        """Start to count.

        Args:
            file: Where the attempts before have left what they used; need not exist.
        """
        self._file = file
        self._before: Mapping[str, float] = json.loads(file.read_text()) if file.exists() else {}
        self._started, self._joules = time.monotonic(), joules_so_far()

    def used(self) -> dict[str, float]:
        """`seconds`; `device_seconds`, of all devices together (of the process, on a CPU); and `joules`, where all
        attempts could tell."""
        seconds = time.monotonic() - self._started
        used = {"seconds": seconds, "device_seconds": seconds * max(1, len(device_names()))}
        now = joules_so_far()
        if now is not None and self._joules is not None and (not self._before or "joules" in self._before):
            used["joules"] = now - self._joules
        return {name: round(value + self._before.get(name, 0.0), 3) for name, value in used.items()}

    def keep(self) -> None:
        """Leave what was used for the attempt that comes after this one, should it be killed."""
        write_whole(self._file, json.dumps(self.used()))

    def close(self) -> None:
        """The node is made: forget the attempts."""
        self._file.unlink(missing_ok=True)
