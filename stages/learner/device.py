"""The devices of a stage or an evaluation: its leased GPUs, or the CPU.

`CUDA_VISIBLE_DEVICES` names the leased GPUs: `flows.engines.launch` sets it for every node, and empties it if
`resources.gpus` is 0. `python -m stages.learner.device` prints what CUDA shows a fresh process.
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
from stages.config.training import Float32Matmul
from stages.learner.ranks import collectives_limit

if TYPE_CHECKING:
    from accelerate import Accelerator

BOTH_BACKENDS = "cuda:nccl,cpu:gloo"


@dataclass(frozen=True)
class Shown:
    """The CUDA devices that are visible to a process.

    Attributes:
        torch: Version of torch.
        build: Kind of torch's build: `CUDA 13.0 build` or `CPU build`.
        devices: Names of the devices.
        fault: torch's own message if CUDA cannot be used; else empty.
    """

    torch: str
    build: str
    devices: tuple[str, ...]
    fault: str = ""


def look() -> Shown:
    """Initialise CUDA and return its devices; `torch.cuda.is_available` may be True even if that fails."""
    build = f"CUDA {torch.version.cuda} build" if torch.version.cuda else "CPU build"
    try:
        torch.cuda.init()
        names = tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    # A torch that was built without CUDA raises an AssertionError.
    except (RuntimeError, AssertionError) as error:
        return Shown(torch.__version__, build, (), str(error).splitlines()[0])
    return Shown(torch.__version__, build, names)


def accelerator(
    dtype: Literal["float32", "bfloat16"] = "float32",
    float32_matmul: Float32Matmul = "highest",
    host_tensors: bool = False,
) -> "Accelerator":
    """Accelerate on the stage's device; no other code chooses a device.

    Process groups get the time-out of `stages.learner.ranks.collectives_limited`. DDP's gradients are views of its
    buckets, which saves a copy of all gradients.

    Args:
        dtype: The autocast type.
        float32_matmul: How this process's products of float32 are computed on a GPU, from now on.
        host_tensors: Whether processes on GPUs also exchange tensors on the host, by gloo beside NCCL.

    Raises:
        UserError: CUDA shows fewer devices than the stage leased.
    """
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, KwargsHandler

    _require_lease()
    # The setting is torch's for CPUs too, and a CPU's float32 stays exact.
    torch.set_float32_matmul_precision(float32_matmul if torch.cuda.is_available() else "highest")
    mixed = "bf16" if dtype == "bfloat16" else "no"
    handlers: list[KwargsHandler] = [DistributedDataParallelKwargs(gradient_as_bucket_view=True)]
    backend = BOTH_BACKENDS if host_tensors and torch.cuda.is_available() else None
    if (limit := collectives_limit()) is not None or backend:
        handlers.append(InitProcessGroupKwargs(backend=backend or "nccl", timeout=limit))
    return Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=mixed, kwargs_handlers=handlers)


def _require_lease() -> None:
    leased = device_names()
    if not leased:
        return
    shown = look()
    if len(shown.devices) < len(leased):
        fault = f" ({shown.fault})" if shown.fault else ""
        raise UserError(
            f"resources.gpus: the stage leased {len(leased)} of the machine's devices ({VISIBLE}="
            f"{os.environ[VISIBLE]}), CUDA shows {len(shown.devices)}{fault}; torch {shown.torch} is a "
            f"{shown.build}, {driver()}. `mopd doctor` compares the two; resources.gpus=0 trains on the CPU"
        )


if __name__ == "__main__":
    json.dump(dataclasses.asdict(look()), sys.stdout)
