"""The training core of all stages: one optimizer step over accelerate, saved and resumed exactly.

All randomness in a stage is a function of its seed and the step. So a saved state needs only model, optimizer, schedule
and step, and a resumed stage takes the same steps as an uninterrupted one.
"""

import contextlib
import itertools
import json
import math
import os
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import get_scheduler

from base.errors import UserError
from base.hashing import stable_hash
from base.store.checkpoint import sync_to_disk
from stages.config.training import TrainConfig
from stages.learner import sharding
from stages.learner.device import accelerator
from stages.learner.optimizer import adamw, load_state
from stages.learner.ranks import while_others_wait
from stages.learner.state import is_state, read_state, write_state
from stages.model.policy import HiddenStates, Policy, causal_lm
from stages.rows.packing import Packed

Item = TypeVar("Item")
STATE = "state"
SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


class Learner:
    """A policy being trained: accelerate, AdamW, schedule, clipping, save and resume.

    Args:
        policy: The student; trained in place.
        config: The stage's config.
        updates: Total number of optimizer updates of the stage: the length of the schedule.
        progress: Folder of saved states.
        seed: Seed of the stage; with the step it determines dropout in adapters.

    Attributes:
        module: The module of the forward pass: the policy without its head, in its data-parallel wrapper.
        tokens: Tokens that the loss was computed on so far, in all processes.
        memory: JSON-serialisable values that a stage keeps between steps; saved and restored with the state.

    Raises:
        UserError: `sharding: fsdp` with one process, CUDA shows fewer devices than the stage leased, or bitsandbytes
            is not installed.
    """

    def __init__(self, policy: Policy, config: TrainConfig, updates: int, progress: Path, seed: int) -> None:
        self.policy = policy
        self.config = config
        self.progress = progress
        self.seed = seed
        self.tokens = 0
        self.memory: dict[str, Any] = {}
        self.accelerator = accelerator(config.dtype, config.float32_matmul, host_tensors=config.cpu_offload)
        if self.sharded and self.world_size == 1:
            raise UserError("sharding: fsdp needs 2 devices or more, and this stage has one; see resources.gpus")
        if config.gradient_checkpointing:
            causal_lm(policy.model).gradient_checkpointing_enable({"use_reentrant": False})
        policy.compute_in(config.dtype)
        module = HiddenStates(policy.model, config.dtype)
        if self.sharded:
            sharding.shard(module, self.device, self.world_size, policy.pad_id, config.dtype, config.cpu_offload)
        adam = adamw(config.optimizer, policy.model, self.device)
        self.schedule = get_scheduler(
            SCHEDULES[config.optimizer.schedule],
            adam,
            num_warmup_steps=config.optimizer.warmup_steps,
            num_training_steps=updates,
        )
        if self.sharded:
            self.module, self.optimizer = module, adam
        else:
            self.module, self.optimizer = self.accelerator.prepare(module, adam)

    @property
    def sharded(self) -> bool:
        """Whether weights, gradients and optimizer state are sharded over the processes."""
        return self.config.sharding == "fsdp"

    @property
    def device(self) -> torch.device:
        """The student's device."""
        return self.accelerator.device

    def seed_step(self, step: int) -> None:
        """Seed torch for a step: its random numbers depend on the stage's seed and the step alone."""
        torch.manual_seed(step_seed(self.seed, step, "torch"))

    def hidden(self, packed: Packed) -> Tensor:
        """Run the student; returns the hidden states [N, H] that predict the scored tokens, with gradients attached."""
        with self.accelerator.autocast():
            return packed.scored(self.module(*packed.inputs))

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of one micro-batch; over processes gradients are summed, not averaged."""
        self.accelerator.backward(loss * self.world_size)

    @contextlib.contextmanager
    def synchronised(self, last: bool) -> Iterator[None]:
        """A context in which whole copies exchange gradients only with the last micro-batch of an update.

        Sharded ones reduce and scatter them with every micro-batch, so that no process keeps whole gradients between
        micro-batches.
        """
        with contextlib.nullcontext() if last or self.sharded else self.accelerator.no_sync(self.module):
            yield

    @contextlib.contextmanager
    def gathered_weights(self) -> Iterator[None]:
        """A context in which the policy's model may be used directly; sharded weights are gathered, in the autocast
        type."""
        if not self.sharded:
            yield
            return
        with sharding.gathered(self.module), self.accelerator.autocast():
            yield

    @contextlib.contextmanager
    def layers_gathered_in_turn(self) -> Iterator[None]:
        """A context in which every process makes the same forward passes of the policy's model; of sharded weights, one
        layer at a time is gathered."""
        if not sharding.is_sharded(self.policy.model):
            yield
            return
        with sharding.root_gathered(self.module), self.accelerator.autocast():
            yield

    def num_micro_batches(self, batches: int) -> int:
        """The number of micro-batches of an update. With sharded weights it is the largest of all processes, because
        every process takes part in each forward pass."""
        if not self.sharded:
            return max(1, batches)
        return max(1, *gather_object([batches]))

    def whole_parameters(self) -> dict[str, Tensor] | None:
        """All parameters of a sharded policy by name, in the main process; empty in others. None if they are not
        sharded. All processes must call it."""
        return sharding.whole_parameters(self.module, self.accelerator.is_main_process) if self.sharded else None

    def empty_backward(self) -> None:
        """Run a forward and backward pass with zero gradient, to take part in the exchange of gradients."""
        if self.world_size > 1:
            hidden_BTH = self.module(torch.full((1, 2), self.policy.pad_id, device=self.device))
            self.backward((hidden_BTH.sum() + self.policy.head_VH.sum()) * 0.0)

    def update(self) -> dict[str, float]:
        """Clip, step the optimizer and the schedule, clear gradients.

        Returns:
            `grad_norm`, before clipping, and `learning_rate`.

        Raises:
            FloatingPointError: the gradient is not finite; the weights are unchanged.
        """
        limit = self.config.optimizer.max_grad_norm
        if self.sharded:
            norm = sharding.clip_gradient(self.module, limit)
        else:
            norm = self.accelerator.clip_grad_norm_(self.module.parameters(), limit)
        if norm is None or not math.isfinite(norm):
            raise FloatingPointError(f"the gradient's norm is {norm}; lower the learning rate or use dtype float32")
        rate = self.schedule.get_last_lr()[0]
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return {"grad_norm": float(norm), "learning_rate": rate}

    def skip_update(self) -> None:
        """Advance the schedule without an update, for a step without any signal."""
        self.schedule.step()

    def averages(self, sums: Mapping[str, tuple[float, float]]) -> dict[str, float]:
        """Means over all processes, from the sums and counts of each."""
        pooled: dict[str, list[float]] = {}
        for part in gather_object([dict(sums)]):
            for name, (total, count) in part.items():
                pool = pooled.setdefault(name, [0.0, 0.0])
                pool[0] += total
                pool[1] += count
        return {name: total / count for name, (total, count) in pooled.items() if count}

    def global_sum(self, value: float) -> float:
        """The sum of the processes' values."""
        total: Tensor = self.accelerator.reduce(torch.tensor(value, device=self.device), "sum")
        return float(total)

    def largest(self, value: float) -> float:
        """The largest of the processes' values."""
        return max(gather_object([value]))

    @property
    def rank(self) -> int:
        """Index of this process."""
        return int(self.accelerator.process_index)

    @property
    def world_size(self) -> int:
        """Number of processes that train together."""
        return int(self.accelerator.num_processes)

    def shard(self, items: Sequence[Item]) -> list[Item]:
        """This process's share of a batch."""
        return list(items[self.rank :: self.world_size])

    def save(self, step: int) -> None:
        """Save the state after `step` steps, atomically; only the newest state is kept."""
        state = self._state()

        def write() -> None:
            temporary = self.progress / f".tmp-{step}"
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            write_state(state, temporary, STATE)
            (temporary / "stage.json").write_text(json.dumps({"tokens": self.tokens, "memory": self.memory}))
            for path in (temporary, *temporary.rglob("*")):
                sync_to_disk(path)
            # A state in the format of an earlier version, which `resume` did not read.
            shutil.rmtree(self.progress / f"step-{step}", ignore_errors=True)
            os.rename(temporary, self.progress / f"step-{step}")
            sync_to_disk(self.progress)
            for _, old in self._saved()[:-1]:
                shutil.rmtree(old)

        while_others_wait(write)

    def resume(self) -> int:
        """Load the newest saved state, if any; returns the number of steps done."""
        saved = [(step, folder) for step, folder in self._saved() if is_state(folder, STATE)]
        if not saved:
            return 0
        step, folder = saved[-1]
        self._restore(folder)
        kept = json.loads((folder / "stage.json").read_text())
        self.tokens, self.memory = kept["tokens"], kept.get("memory", {})
        return step

    def _state(self) -> dict[str, Any]:
        """Everything that later steps depend on; if sharded, only in the main process. All processes must call it."""
        schedule = self.schedule.state_dict()
        if self.sharded:
            return sharding.state(self.module, self.optimizer) | {"schedule": schedule}
        # Only trainable parameters: an adapter's base need not be written in every save.
        weights = _trainable(self.policy.model)
        return {"weights": weights, "optimizer": self.optimizer.state_dict(), "schedule": schedule}

    def _restore(self, folder: Path) -> None:
        kept = read_state(folder, STATE)
        self.schedule.load_state_dict(kept["schedule"])
        if self.sharded:
            sharding.restore(self.module, self.optimizer, kept)
            return
        current = _trainable(self.policy.model)
        for name, tensor in kept["weights"].items():
            current[name].copy_(tensor)
        load_state(self.optimizer, kept["optimizer"])

    def _saved(self) -> list[tuple[int, Path]]:
        return sorted((int(path.name.removeprefix("step-")), path) for path in self.progress.glob("step-*"))


def step_seed(seed: int, step: int, purpose: str) -> int:
    """The seed of one purpose in one step: a hash, so that neighbouring steps are unrelated."""
    return int(stable_hash([seed, step, purpose])[:15], 16)


def epochs(items: Sequence[Item], seed: int, first: int = 0) -> Iterator[Item]:
    """An endless stream of the items from epoch `first` on; the seed determines the order of each epoch."""
    for epoch in itertools.count(first):
        order = list(items)
        random.Random(step_seed(seed, epoch, "epoch")).shuffle(order)
        yield from order


def _trainable(model: nn.Module) -> dict[str, Tensor]:
    """Trainable parameters by name; a tied tensor once."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
