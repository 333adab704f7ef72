"""Weights, gradients and optimizer state sharded over the processes of torchrun: FSDP2.

With accelerate a run on a CPU would silently become DDP; here `fully_shard` is applied directly, on CUDA (NCCL) and CPU
(gloo) alike. Each decoder layer is its own group, gathered for its forward and backward pass. Embeddings, last norm and
output head belong to the root's group. It stays gathered from its forward to the end of the backward pass, because the
head is read outside of the module, chunk by chunk.

Shards, optimizer state and the reduction of gradients are float32. Under bfloat16 the gathered weights are bfloat16, so
half as much is sent and held. Offloaded shards are on the CPU, gradients and optimizer state too; they are copied to
the device when they are gathered.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from stages.model.policy import HiddenStates, causal_lm

# Frozen parameters are ignored: an adapter's base need not be written in every save.
_WHOLE = StateDictOptions(ignore_frozen_params=True, full_state_dict=True, cpu_offload=True)
_SPREAD = StateDictOptions(ignore_frozen_params=True, full_state_dict=True, strict=False)


def shard(
    module: HiddenStates,
    device: torch.device,
    processes: int,
    pad_id: int,
    dtype: Literal["float32", "bfloat16"] = "float32",
    offload: bool = False,
) -> None:
    """Replace the module's parameters by shards (`DTensor`) in place.

    The parameters move to the device layer by layer, so that the device never holds the whole model.

    Args:
        module: The policy without its head, on the CPU.
        device: The device of this process's shards.
        processes: Number of processes.
        pad_id: A token for one forward pass: the module that runs first becomes FSDP's root.
        dtype: Number type of gathered weights.
        offload: Whether shards are kept on the CPU, in pinned memory if the device is a GPU.
    """
    mesh = init_device_mesh(device.type, (processes,))
    narrow = torch.bfloat16 if dtype == "bfloat16" else None
    policy = MixedPrecisionPolicy(param_dtype=narrow, reduce_dtype=narrow and torch.float32, cast_forward_inputs=False)
    place = CPUOffloadPolicy(pin_memory=device.type != "cpu") if offload else OffloadPolicy()
    for layer in causal_lm(module.model).get_decoder().layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy, offload_policy=place)
    fully_shard(module, mesh=mesh, mp_policy=policy, offload_policy=place, reshard_after_forward=False)
    with torch.no_grad():
        module(torch.full((1, 2), pad_id, device=device))
    for part in _parts(module):
        part.reshard()


@contextlib.contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """A context with full weights in every process. Forward passes inside communicate nothing, so that processes may
    run different numbers of them."""
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


@contextlib.contextmanager
def root_gathered(module: nn.Module) -> Iterator[None]:
    """A context in which the policy's own forward pass gathers one layer at a time; embeddings, last norm and head stay
    gathered. All processes must make the same forward passes inside."""
    assert isinstance(module, FSDPModule)
    module.unshard()
    try:
        yield
    finally:
        module.reshard()


def clip_gradient(module: nn.Module, max_norm: float) -> Tensor:
    """Clip the gradient to a global norm over all shards; returns the norm before clipping."""
    norm = nn.utils.clip_grad_norm_(module.parameters(), max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def whole_parameters(module: HiddenStates, keep: bool) -> dict[str, Tensor]:
    """All parameters, gathered on the CPU, a tied one once; all processes must call it.

    Args:
        module: The sharded module.
        keep: Whether this process keeps them; a host has memory for one copy, not for one per device.

    Returns:
        Parameters by name; empty unless `keep`.
    """
    kept: dict[str, Tensor] = {}
    for name, parameter in module.model.named_parameters():
        tensor = whole(parameter.detach())
        if keep:
            kept[name] = tensor.cpu()
    return kept


def is_sharded(model: nn.Module) -> bool:
    """Whether a model's parameters are shards at present: not if they are gathered."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be sharded, gathered in every process on its device; all processes must call it."""
    if not isinstance(tensor, DTensor):
        return tensor
    placed = tensor.to(tensor.device_mesh.device_type)
    assert isinstance(placed, DTensor)
    return placed.full_tensor()


def state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The full trained weights and optimizer state on the CPU of the main process; empty in other processes. All
    processes must call it."""
    weights, optimizers = get_state_dict(module, optimizer, options=_WHOLE)
    return {"weights": weights, "optimizer": optimizers}


def restore(module: nn.Module, optimizer: torch.optim.Optimizer, kept: dict[str, Any]) -> None:
    """Restore what `state` returned, also with another number of processes. All processes map the same file into
    memory, and each takes its shards from it."""
    set_state_dict(
        module,
        optimizer,
        model_state_dict=kept["weights"],
        optim_state_dict=kept["optimizer"],
        options=_SPREAD,
    )


def _parts(module: nn.Module) -> list[FSDPModule]:
    return [part for part in module.modules() if isinstance(part, FSDPModule)]
