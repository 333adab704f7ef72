"""Comparison of the machine's devices, as nvidia-smi lists them, with what torch can use and what a run asks for.

torch is asked in a process of its own, so that this one stays free of torch and of a CUDA context.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from base.nvidia import driver
from flows.engines.devices import VISIBLE, host_devices, why_no_more
from flows.run_file.schema import ResourcesConfig

SECONDS = 300


@dataclass(frozen=True)
class Usable:
    """What torch can use here.

    Attributes:
        torch: Version and build.
        devices: Names of the devices.
        fault: Why there are no more, in torch's own words; empty where it has none.
    """

    torch: str
    devices: tuple[str, ...]
    fault: str = ""


def ask_torch() -> Usable:
    """Let a fresh process initialise CUDA."""
    command = [sys.executable, "-P", "-m", "stages.learner.device"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return Usable("torch", (), f"no answer in {SECONDS} s")
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines()
        return Usable("torch", (), lines[-1] if lines else f"exit code {error.returncode}")
    told = json.loads(done.stdout)
    return Usable(f"torch {told['torch']} ({told['build']})", tuple(told["devices"]), told["fault"])


def gpu_problems(resources: ResourcesConfig) -> Iterator[str]:
    """A run that asks for devices which are not here, or which torch cannot use."""
    asked = resources.gpus
    if not asked:
        return
    shown = len(host_devices())
    if shown < asked:
        yield f"resources.gpus: {asked} devices asked for, this machine shows {shown}{why_no_more()}"
        return
    usable = ask_torch()
    if len(usable.devices) < asked:
        yield f"resources.gpus: {asked} devices asked for, {disagreement(shown, usable)}"


def shown_to_one(devices: Sequence[str]) -> int:
    """How many of these devices CUDA shows one process: of MIG slices a single one."""
    return min(1, len(devices)) if any(device.startswith("MIG-") for device in devices) else len(devices)


def gpu_warnings(resources: ResourcesConfig) -> Iterator[str]:
    """More nodes side by side than the machine has devices for, where the run file asks for so many."""
    side_by_side = resources.gpus * resources.parallel_experts
    if "parallel_experts" in resources.model_fields_set and side_by_side > (shown := len(host_devices())):
        yield (
            f"resources.parallel_experts: {resources.parallel_experts} nodes of {resources.gpus} devices take "
            f"{side_by_side}, this machine shows {shown}; they take turns"
        )


def disagreement(shown: int, usable: Usable) -> str:
    """Who counts how many devices, with the driver's version and torch's build."""
    counted = f"{VISIBLE} names" if VISIBLE in os.environ else "nvidia-smi lists"
    fault = f": {usable.fault}" if usable.fault else ""
    return f"{counted} {shown} and {usable.torch} can use {len(usable.devices)}{fault}; {driver()}"
