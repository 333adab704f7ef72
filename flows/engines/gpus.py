"""Compares the devices that nvidia-smi lists with those that torch can use and those that a run requests.

torch is imported in a separate process, so that this one stays free of torch and of a CUDA context.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from base.nvidia import driver
from flows.engines.devices import VISIBLE, host_devices, why_no_more
from flows.run_file.resources import ResourcesConfig

SECONDS = 300


@dataclass(frozen=True)
class Usable:
    """The devices that torch can use on this machine.

    Attributes:
        torch: Version and build.
        devices: Names of the devices.
        fault: torch's own message on why there are no more; empty if it has none.
    """

    torch: str
    devices: tuple[str, ...]
    fault: str = ""


def ask_torch() -> Usable:
    """Initialise CUDA in a new process and return the devices it found."""
    command = [sys.executable, "-P", "-m", "stages.learner.device"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return Usable("torch", (), f"no answer in {SECONDS} s")
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines()
        return Usable("torch", (), lines[-1] if lines else f"exit code {error.returncode}")
    found = json.loads(done.stdout)
    return Usable(f"torch {found['torch']} ({found['build']})", tuple(found["devices"]), found["fault"])


def gpu_problems(resources: ResourcesConfig) -> Iterator[str]:
    """Yield an error if a run requests devices that are not here or that torch cannot use."""
    asked = resources.gpus
    if not asked:
        return
    devices = host_devices()
    shown = len(devices)
    if asked > 1 and (slices := [device for device in devices[:asked] if is_slice(device)]):
        yield (
            f"resources.gpus: {asked} devices asked for, and {slices[0]} is a slice of a divided device (MIG), of "
            f"which CUDA shows one to a process; take resources.gpus: 1"
        )
        return
    if shown < asked:
        yield f"resources.gpus: {asked} devices are needed, but this machine has {shown}{why_no_more()}"
        return
    usable = ask_torch()
    if len(usable.devices) < asked:
        yield f"resources.gpus: {asked} devices are needed, {disagreement(shown, usable)}"


def shown_to_one(devices: Sequence[str]) -> int:
    """The number of these devices that one process sees through CUDA: only one if they are MIG slices."""
    return min(1, len(devices)) if any(map(is_slice, devices)) else len(devices)


def is_slice(device: str) -> bool:
    """Whether a UUID is that of a MIG slice."""
    return device.startswith("MIG-")


def gpu_warnings(resources: ResourcesConfig) -> Iterator[str]:
    """Yield a warning if the run file sets more parallel nodes than the machine has devices for."""
    side_by_side = resources.gpus * resources.parallel_experts
    if "parallel_experts" in resources.model_fields_set and side_by_side > (shown := len(host_devices())):
        yield (
            f"resources.parallel_experts: {resources.parallel_experts} nodes of {resources.gpus} devices take "
            f"{side_by_side}, this machine has {shown}; they take turns"
        )


def disagreement(shown: int, usable: Usable) -> str:
    """The two differing device counts, with the driver's version and torch's build, for a message."""
    counted = f"{VISIBLE} names" if VISIBLE in os.environ else "nvidia-smi lists"
    fault = f": {usable.fault}" if usable.fault else ""
    return f"{counted} {shown} and {usable.torch} can use {len(usable.devices)}{fault}; {driver()}"
