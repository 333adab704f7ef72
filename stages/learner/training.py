"""The training core every stage stands on: one optimizer step over accelerate, saved and resumed exactly.

Everything random in a stage is a function of its seed and the step, so a saved state is model, optimizer, schedule
and step; a resumed stage takes the same steps an uninterrupted one would.
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
        updates: Optimizer updates the stage will make in all: the length of the schedule.
        progress: Folder of saved states.
        seed: Seed of the stage; dropout in adapters is decided by it and the step.

    Attributes:
        module: What the forward pass goes through: the policy without its head, in its data-parallel wrapper.
        tokens: Tokens the loss was computed on so far, in all processes.
        memory: JSON-serialisable facts a stage keeps between steps; saved and restored with the state.

    Raises:
        UserError: `sharding: fsdp` with one process, or CUDA shows fewer devices than the stage leased.
    """

    def __init__(self, policy: Policy, config: TrainConfig, updates: int, progress: Path, seed: int) -> None:
        self.policy = policy
        self.config = config
        self.progress = progress
        self.seed = seed
        self.tokens = 0
        self.memory: dict[str, Any] = {}
        self.accelerator = accelerator(config.dtype)
        if self.sharded and self.world_size == 1:
            raise UserError("sharding: fsdp shards over 2 devices or more, and this stage has one; see resources.gpus")
        if config.gradient_checkpointing:
            causal_lm(policy.model).gradient_checkpointing_enable({"use_reentrant": False})
        module = HiddenStates(policy.model)
        if self.sharded:
            sharding.shard(module, self.device, self.world_size, policy.pad_id)
        trainable = [p for p in policy.model.parameters() if p.requires_grad]
        adam = torch.optim.AdamW(
            trainable,
            lr=config.optimizer.learning_rate,
            betas=config.optimizer.betas,
            weight_decay=config.optimizer.weight_decay,
            fused=not self.sharded,
        )
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
        """Where the student is."""
        return self.accelerator.device

    def seed_step(self, step: int) -> None:
        """Start a step: whatever torch draws in it depends on the seed and the step alone."""
        torch.manual_seed(step_seed(self.seed, step, "torch"))

    def hidden(self, packed: Packed) -> Tensor:
        """Forward the student; hidden states [N, H] that predict the scored tokens, gradients attached."""
        with self.accelerator.autocast():
            return packed.scored(self.module(*packed.inputs))

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of one micro-batch; over processes gradients add up, not average."""
        self.accelerator.backward(loss * self.world_size)

    @contextlib.contextmanager
    def synchronised(self, last: bool) -> Iterator[None]:
        """Exchange gradients between processes only with the last micro-batch of an update."""
        if self.sharded:
            sharding.set_exchange(self.module, last)
            yield
            return
        with contextlib.nullcontext() if last else self.accelerator.no_sync(self.module):
            yield

    @contextlib.contextmanager
    def gathered_weights(self) -> Iterator[None]:
        """The policy's model may be used directly inside; sharded weights are gathered for it."""
        with sharding.gathered(self.module) if self.sharded else contextlib.nullcontext():
            yield

    def num_micro_batches(self, batches: int) -> int:
        """Micro-batches of an update: with sharded weights every process takes part in every forward of the others."""
        if not self.sharded:
            return max(1, batches)
        return max(1, *gather_object([batches]))

    def whole_parameters(self) -> dict[str, Tensor] | None:
        """All of the policy's parameters on the leading process, on others nothing; None where they are whole as they
        are. All processes take part."""
        return sharding.whole_parameters(self.module, self.accelerator.is_main_process) if self.sharded else None

    def empty_backward(self) -> None:
        """Take part in the exchange of gradients without a row to learn from."""
        if self.world_size > 1:
            hidden_BTH = self.module(torch.full((1, 2), self.policy.pad_id, device=self.device))
            self.backward((hidden_BTH.sum() + self.policy.head_VH.sum()) * 0.0)

    def update(self) -> dict[str, float]:
        """Clip, step the optimizer and the schedule, clear gradients; returns the gradient's norm and the rate.

        Raises:
            FloatingPointError: the gradient is not finite; the weights are left as they were.
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
        """Let the schedule advance where a step brought nothing to learn from."""
        self.schedule.step()

    def averages(self, sums: Mapping[str, tuple[float, float]]) -> dict[str, float]:
        """Means over all processes from each one's sums and counts."""
        pooled: dict[str, list[float]] = {}
        for part in gather_object([dict(sums)]):
            for name, (total, count) in part.items():
                pool = pooled.setdefault(name, [0.0, 0.0])
                pool[0] += total
                pool[1] += count
        return {name: total / count for name, (total, count) in pooled.items() if count}

    def global_sum(self, value: float) -> float:
        """A number summed over the processes that train together."""
        total: Tensor = self.accelerator.reduce(torch.tensor(value, device=self.device), "sum")
        return float(total)

    def largest(self, value: float) -> float:
        """The largest of the processes' values."""
        return max(gather_object([value]))

    @property
    def rank(self) -> int:
        """Which of the processes this is."""
        return int(self.accelerator.process_index)

    @property
    def world_size(self) -> int:
        """Processes that train together."""
        return int(self.accelerator.num_processes)

    def shard(self, items: Sequence[Item]) -> list[Item]:
        """This process's share of a batch."""
        return list(items[self.rank :: self.world_size])

    def save(self, step: int) -> None:
        """Save the state after `step` steps; a state is whole or absent, and only the newest is kept."""
        temporary = self.progress / f".tmp-{step}"
        if self.accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        state = self._state()
        if self.accelerator.is_main_process:
            write_state(state, temporary, STATE)
            (temporary / "stage.json").write_text(json.dumps({"tokens": self.tokens, "memory": self.memory}))
            for path in (temporary, *temporary.rglob("*")):
                sync_to_disk(path)
            # One of an earlier version, which was not read.
            shutil.rmtree(self.progress / f"step-{step}", ignore_errors=True)
            os.rename(temporary, self.progress / f"step-{step}")
            sync_to_disk(self.progress)
            for _, old in self._saved()[:-1]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

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
        """All that the next steps depend on; with shards the leading process has it alone. All processes take part."""
        schedule = self.schedule.state_dict()
        if self.sharded:
            return sharding.state(self.module, self.optimizer) | {"schedule": schedule}
        # For an adapter the base need not be written at every save.
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
        self.optimizer.load_state_dict(kept["optimizer"])

    def _saved(self) -> list[tuple[int, Path]]:
        return sorted((int(path.name.removeprefix("step-")), path) for path in self.progress.glob("step-*"))


def step_seed(seed: int, step: int, purpose: str) -> int:
    """The seed of one purpose in one step: a hash, so that neighbours share nothing."""
    return int(stable_hash([seed, step, purpose])[:15], 16)


def epochs(items: Sequence[Item], seed: int, first: int = 0) -> Iterator[Item]:
    """Items for ever from epoch `first` on, each epoch in an order of its own decided by the seed."""
    for epoch in itertools.count(first):
        order = list(items)
        random.Random(step_seed(seed, epoch, "epoch")).shuffle(order)
        yield from order


def _trainable(model: nn.Module) -> dict[str, Tensor]:
    """Parameters that are trained, by name; a tied tensor once."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
