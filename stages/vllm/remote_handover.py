"""Hands the student's weights over to vLLM servers, in the servers' number type.

Over NCCL they go from device to device. Otherwise each version is written once, and loaded by each server without it.
In both cases one tensor after another is gathered, converted and sent or moved to the host.

A server has a version once it has scored the version's probe as the trainer does. A server that fails to load reports
this (`stages.vllm.guard`), and its supervisor restarts it; a second failure ends the stage.
"""

import collections
import contextlib
import itertools
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from base.errors import UserError
from base.hashing import stable_hash
from base.store.checkpoint import write_whole
from stages.config.on_policy import OnPolicyConfig
from stages.learner.sharding import is_sharded
from stages.model.policy import Policy
from stages.vllm.handover import (
    Probe,
    adapter_weights,
    check_shapes,
    full_weights,
    shapes_of_config,
    weight_shapes,
)
from stages.vllm.server import ServerFailedError, VllmServer
from stages.vllm.settings import NO_VERSION
from stages.vllm.weight_transfer import NcclTransfer, takes_transfers

CURRENT = "current.json"
# The files of full weights; none is larger than `FILE_BYTES` and one tensor.
WEIGHTS, FILES = "model-{:05d}.safetensors", "model-*.safetensors"
FILE_BYTES = 2**30
# The folder of an adapter's base.
BASE = "base"
# Failed loads of one server after which the stage fails.
MOST_FAILURES = 2


class RemoteHandOver:
    """Hands a stage's student over to servers; several processes may share its folder.

    Args:
        policy: The student; its shape decides which servers can load it.
        config: Number type, adapter and log-probabilities.
        key: The stage's content key, part of every version's name.
        folder: The folder from which servers read weights.
        mode: The `--logprobs-mode` that the servers must have.
    """

    def __init__(self, policy: Policy, config: OnPolicyConfig, key: str, folder: Path, mode: str) -> None:
        self.config = config
        self.key = key
        self.folder = folder
        self.mode = mode
        self._shapes = weight_shapes(policy)
        self._device = policy.device
        self._remote_code = policy.remote_code
        self._dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
        self._source: Policy | Path = policy
        # Whether an adapter's base is written.
        self._has_base = False
        self._transfers: dict[str, NcclTransfer] = {}
        self._checked: set[str] = set()
        self._failures: dict[str, int] = {}

    def publish(self, policy: Policy, version: int, probe: Probe, direct: bool = False) -> None:
        """Write a version's files; servers load them later. If the policy is sharded, the other processes call
        `take_part` meanwhile.

        Args:
            policy: The student.
            version: Batches it has been updated on.
            probe: Drawn with the same weights.
            direct: Whether every server takes full weights over NCCL, so that no file of them is written; never for a
                student that is sharded at times, of which one process has only a part.
        """
        folder = self.folder / f"version-{version}"
        shutil.rmtree(folder, ignore_errors=True)
        full = None if direct else self._unwritten(folder)
        if full is not None:
            save_weights(policy, full, self._dtype)
        self._has_base = self._has_base or not direct
        if self.config.lora is not None:
            weights = adapter_weights(policy)
            assert isinstance(policy.model, PeftModel)
            policy.model.save_pretrained(
                folder, save_embedding_layers=False, selected_adapters=["default"], state_dict=weights
            )
        # The time makes the name differ from that of another attempt at the same step.
        name = f"{self.key}:{version}:{time.time_ns():x}"
        previous = self.current() if (self.folder / CURRENT).exists() else None
        current = {"name": name, "folder": folder.name, "probe": probe.to_json()}
        write_whole(self.folder / CURRENT, json.dumps(current))
        if previous is not None and previous["folder"] != folder.name:
            # Absent if its weights went over NCCL.
            shutil.rmtree(self.folder / previous["folder"], ignore_errors=True)

    def take_part(self, policy: Policy) -> None:
        """Take part in the gathering of a sharded policy that the main process publishes."""
        if is_sharded(policy.model):
            if self._unwritten(self.folder) is not None:
                collections.deque(full_weights(policy, self._dtype), maxlen=0)
            if self.config.lora is not None:
                adapter_weights(policy)
        self._has_base = True

    def current(self) -> Mapping[str, Any]:
        """Name, folder and probe of the version that was written last."""
        current: dict[str, Any] = json.loads((self.folder / CURRENT).read_text())
        return current

    def served_name(self, model: str) -> str:
        """The student's model name in requests: the adapter's name, or that of the server's model."""
        return model if self.config.lora is None else str(self.current()["name"])

    def bring_up_to_date(self, server: VllmServer, policy: Policy, over_nccl: bool = False) -> None:
        """Hand the current version over unless the server has it.

        Args:
            server: A server that answers.
            policy: The student. If the version has no files, it has that version's weights, and they are written.
            over_nccl: Whether full weights go from device to device to a server that takes them so.

        Raises:
            UserError: the server was started with other settings, scores the probe differently from the trainer, or
                has failed to load the weights twice.
            ServerLostError: it does not answer, or has failed to load the weights.
        """
        # If several processes see a new server, one of them hands over.
        with FileLock(self.folder / f"{stable_hash(server.url)[:12]}.lock"):
            current, served = self.current(), server.weight_version()
            if served == NO_VERSION:
                # It may be another server at the same address.
                self._checked.discard(server.url)
            self.check(server)
            if served == current["name"]:
                return
            try:
                self._hand_over(server, current, served, policy, over_nccl)
            except ServerFailedError as error:
                self._count_failure(server, error)
                raise
            self._prove(server, current)
            server.set_weight_version(current["name"])
            self._failures.pop(server.url, None)

    def is_current(self, server: VllmServer) -> bool:
        """Whether a server has the version that was written last.

        Raises:
            ServerLostError: it does not answer.
        """
        return server.weight_version() == str(self.current()["name"])

    def check(self, server: VllmServer) -> None:
        """Check, once per server, that it was started with the settings that this stage needs.

        Raises:
            UserError: it was not; the message names the setting.
            ServerLostError: it does not answer.
        """
        if server.url in self._checked:
            return
        dtype = str(server.setting("model_config", "dtype")).removeprefix("torch.")
        if dtype != self.config.dtype:
            raise UserError(f"the vLLM server {server.url} computes in {dtype}, this stage in {self.config.dtype}")
        mode = server.setting("model_config", "logprobs_mode")
        if mode != self.mode:
            raise UserError(
                f"the vLLM server {server.url} has --logprobs-mode {mode}; temperature {self.config.temperature} needs "
                f"--logprobs-mode {self.mode}, as `mopd serve rollout` sets it"
            )
        lora = self.config.lora
        if lora is not None and (server.setting("lora_config", "max_lora_rank") or 0) < lora.rank:
            raise UserError(
                f"the vLLM server {server.url} has no room for adapters of rank {lora.rank}; it needs --enable-lora "
                f"--max-lora-rank, as `mopd serve rollout` sets them"
            )
        served = shapes_of_config(Path(server.setting("model_config", "model")), self._remote_code)
        check_shapes(self._shapes, served, f"the vLLM server {server.url}")
        self._checked.add(server.url)

    def close(self) -> None:
        """Leave the process groups of the weight transfers."""
        for transfer in self._transfers.values():
            transfer.close()

    def _unwritten(self, folder: Path) -> Path | None:
        """Where full weights have to be written for a version in a folder; None if they are written already."""
        if self.config.lora is None:
            return folder
        return None if self._has_base else self.folder / BASE

    def _hand_over(
        self, server: VllmServer, current: Mapping[str, Any], served: str, policy: Policy, over_nccl: bool
    ) -> None:
        folder = self.folder / current["folder"]
        if self.config.lora is None:
            self._send_full(server, folder, served, policy, over_nccl)
            return
        for name, entry in server.models().items():
            if entry.get("parent"):
                server.unload_adapter(name)
        if not served.startswith(f"{self.key}:"):
            self._send_full(server, self.folder / BASE, served, policy, over_nccl)
        server.load_adapter(current["name"], folder)

    def _send_full(self, server: VllmServer, folder: Path, served: str, policy: Policy, over_nccl: bool) -> None:
        """Send full weights to a server, from a folder or over NCCL."""
        # A restarted server is no longer a member of its process group.
        transfer = self._transfers.pop(server.url, None)
        if transfer is not None and (not over_nccl or served == NO_VERSION):
            transfer.close()
            transfer = None
        if not over_nccl or not takes_transfers(server):
            self._complete(folder, policy)
            server.load_weights(folder)
            return
        # A sharded policy cannot be gathered by one process, so its files are read.
        self._source = folder if is_sharded(policy.model) else policy
        transfer = transfer or NcclTransfer(server, self._shapes, self._dtype, self._tensors)
        try:
            transfer.send()
        except BaseException:
            transfer.close()
            raise
        self._transfers[server.url] = transfer

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The weights to send, in the order of their shapes."""
        if isinstance(self._source, Path):
            return read_weights(self._source, list(self._shapes), self._device)
        return full_weights(self._source, self._dtype)

    def _complete(self, folder: Path, policy: Policy) -> None:
        """Write full weights that only went over NCCL before, for a server that has lost them."""
        with FileLock(self.folder / "files.lock"):
            if not any(folder.glob(FILES)):
                save_weights(policy, folder, self._dtype)

    def _prove(self, server: VllmServer, current: Mapping[str, Any]) -> None:
        """Check the server's score of the version's probe.

        Raises:
            UserError: it differs from the trainer's.
        """
        probe = Probe.read(current["probe"])
        name = self.served_name(server.base_model())
        scored = server.score(name, probe.tokens, probe.start, 0, probe=True)
        pairs = zip(scored, probe.tokens[probe.start :], strict=True)
        probe.check([by_id[token] for by_id, token in pairs], f"the vLLM server {server.url}")

    def _count_failure(self, server: VllmServer, error: ServerFailedError) -> None:
        """Count a failed load; a server that is lost may recover, one that fails to load these weights twice will not.

        Raises:
            UserError: it has failed `MOST_FAILURES` times.
        """
        self._failures[server.url] = self._failures.get(server.url, 0) + 1
        if self._failures[server.url] >= MOST_FAILURES:
            raise UserError(
                f"the vLLM server {server.url} cannot load the student's weights, not even after a restart "
                f"({error}); sample with sampler.backend: transformers"
            ) from error


def save_weights(policy: Policy, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write full weights in the format that a server reads; for an adapter its base's.

    The folder appears when it is complete. The host holds the tensors of one file at a time, the device one tensor.

    Args:
        policy: The student; if it is sharded, the other processes iterate over `full_weights` meanwhile.
        folder: The folder to make.
        dtype: The server's number type; the tensors' own if absent.
    """
    unfinished = folder.with_name(f".{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    held: dict[str, Tensor] = {}
    files = itertools.count()
    for name, tensor in full_weights(policy, dtype):
        # Copied: a tied head is written a second time, under its own name.
        held[name] = tensor.to("cpu", copy=True).contiguous()
        if sum(each.nbytes for each in held.values()) >= FILE_BYTES:
            save_file(held, unfinished / WEIGHTS.format(next(files)))
            held = {}
    if held:
        save_file(held, unfinished / WEIGHTS.format(next(files)))
    unfinished.rename(folder)


def read_weights(folder: Path, names: Sequence[str], device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """The tensors that `save_weights` wrote, one after another, on a device and in the order of their names."""
    with contextlib.ExitStack() as opened:
        files = [opened.enter_context(safe_open(file, "pt", str(device))) for file in sorted(folder.glob(FILES))]
        holder = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - not iterable itself
        for name in names:
            yield name, holder[name].get_tensor(name)
