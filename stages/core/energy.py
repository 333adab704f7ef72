"""What a stage's devices used, in joules, where NVIDIA's management library tells. Free of torch."""

import os

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
