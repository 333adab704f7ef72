"""Weights, gradients and optimizer state sharded over the processes of torchrun: FSDP2.

Through accelerate a run on a CPU silently becomes DDP; here `fully_shard` is applied directly, on CUDA (NCCL) and CPU
(gloo) alike. Each decoder layer is a group of its own, gathered for its forward and backward; embeddings, last norm
and output head belong to the root's, which stays gathered from its forward to the end of the backward pass, for the
head is read outside of it, chunk by chunk.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from stages.model.policy import HiddenStates, causal_lm

# Of an adapter the base need not be written at every save.
_WHOLE = StateDictOptions(ignore_frozen_params=True, full_state_dict=True, cpu_offload=True)
_SPREAD = StateDictOptions(ignore_frozen_params=True, full_state_dict=True, strict=False)


def shard(module: HiddenStates, device: torch.device, processes: int, pad_id: int) -> None:
    """Replace the module's parameters by shards (`DTensor`) in place.

    Layer by layer they move to the device, so that it never holds the whole model.

    Args:
        module: The policy without its head, on the CPU.
        device: Where this process's shards go.
        processes: How many share them.
        pad_id: A token to run once, for the module that is run first counts as the root.
    """
    mesh = init_device_mesh(device.type, (processes,))
    for layer in causal_lm(module.model).get_decoder().layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh, reshard_after_forward=False)
    with torch.no_grad():
        module(torch.full((1, 2), pad_id, device=device))
    for part in _parts(module):
        part.reshard()


@contextlib.contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Whole weights on every process for as long as it lasts; forward passes inside exchange nothing, so that
    processes may make different numbers of them."""
    parts = _parts(module)
    for part in parts:
        part.unshard()
        part.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not module, recurse=False)
            part.reshard()


def set_exchange(module: nn.Module, exchange: bool) -> None:
    """Whether the next backward pass sums gradients over the processes, or lets them wait for one that does."""
    assert isinstance(module, FSDPModule)
    module.set_requires_gradient_sync(exchange)


def clip_gradient(module: nn.Module, max_norm: float) -> Tensor:
    """Clip to a global norm over all shards; returns the norm before."""
    norm = nn.utils.clip_grad_norm_(module.parameters(), max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def whole_parameters(module: HiddenStates, keep: bool) -> dict[str, Tensor]:
    """Every parameter gathered, on the CPU, a tied one once; all processes take part.

    Args:
        module: What was sharded.
        keep: Whether this process wants them: a host has room for them once, not once a device.
    """
    kept: dict[str, Tensor] = {}
    for name, parameter in module.model.named_parameters():
        whole = _whole(parameter.detach())
        if keep:
            kept[name] = whole.cpu()
    return kept


def state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What is trained and the optimizer's state, whole, on the CPU of the leading process; on others nothing. All
    processes take part."""
    weights, optimizers = get_state_dict(module, optimizer, options=_WHOLE)
    return {"weights": weights, "optimizer": optimizers}


def restore(module: nn.Module, optimizer: torch.optim.Optimizer, kept: dict[str, Any]) -> None:
    """Put back what `state` returned, also with another number of processes. Each of them takes its shards from a file
    that all map into memory."""
    set_state_dict(
        module,
        optimizer,
        model_state_dict=kept["weights"],
        optim_state_dict=kept["optimizer"],
        options=_SPREAD,
    )


def _parts(module: nn.Module) -> list[FSDPModule]:
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def _whole(parameter: Tensor) -> Tensor:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
