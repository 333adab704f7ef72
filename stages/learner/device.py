"""The device of a stage or an evaluation: those it leased, or the CPU.

A stage's lease is what `CUDA_VISIBLE_DEVICES` names: `flows.engines.launch` sets it for every node, and to nothing
where `resources.gpus` is 0. `python -m stages.learner.device` prints what CUDA shows a fresh process.
"""

import dataclasses
import json
import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from base.errors import UserError
from base.nvidia import driver
from base.store.energy import VISIBLE, device_names

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Shown:
    """What CUDA shows a process.

    Attributes:
        torch: Version of torch.
        build: What torch was built for: `CUDA 13.0 build` or `CPU build`.
        devices: Names of the devices.
        fault: torch's own message where CUDA cannot be used; else empty.
    """

    torch: str
    build: str
    devices: tuple[str, ...]
    fault: str = ""


def look() -> Shown:
    """Initialise CUDA and count its devices: `torch.cuda.is_available` may be True where that fails."""
    build = f"CUDA {torch.version.cuda} build" if torch.version.cuda else "CPU build"
    try:
        torch.cuda.init()
        names = tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    # An assertion of torch's where it was built without CUDA.
    except (RuntimeError, AssertionError) as error:
        return Shown(torch.__version__, build, (), str(error).splitlines()[0])
    return Shown(torch.__version__, build, names)


def accelerator(dtype: Literal["float32", "bfloat16"] = "float32") -> "Accelerator":
    """Accelerate on the stage's device; nothing else chooses one.

    Args:
        dtype: The autocast type.

    Raises:
        UserError: CUDA shows fewer devices than the stage leased.
    """
    from accelerate import Accelerator

    _require_lease()
    mixed = "bf16" if dtype == "bfloat16" else "no"
    return Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=mixed)


def _require_lease() -> None:
    leased = device_names()
    if not leased:
        return
    shown = look()
    if len(shown.devices) < len(leased):
        fault = f" ({shown.fault})" if shown.fault else ""
        raise UserError(
            f"resources.gpus: the stage leased {len(leased)} of the machine's devices ({VISIBLE}="
            f"{os.environ[VISIBLE]}), CUDA shows it {len(shown.devices)}{fault}; torch {shown.torch} is a "
            f"{shown.build}, {driver()}. `mopd doctor` compares the two; resources.gpus=0 trains on the CPU"
        )


if __name__ == "__main__":
    json.dump(dataclasses.asdict(look()), sys.stdout)
