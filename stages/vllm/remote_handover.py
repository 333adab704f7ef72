"""The student's weights on their way to vLLM servers: written down once a version, taken by each server that lacks it.

A server has a version once it has scored the version's probe as the trainer does. One that fails to load reports it
(`stages.vllm.guard`) and is started anew by its supervisor; the second failure is no accident.
"""

import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock
from peft import PeftModel
from safetensors.torch import save_file

from base.errors import UserError
from base.hashing import stable_hash
from base.store.checkpoint import write_whole
from stages.config.on_policy import OnPolicyConfig
from stages.model.policy import Policy
from stages.vllm.handover import Probe, check_shapes, full_weights, shapes_of_config, weight_shapes
from stages.vllm.server import ServerFailedError, VllmServer
from stages.vllm.settings import NO_VERSION
from stages.vllm.weight_transfer import NcclTransfer, takes_transfers

CURRENT = "current.json"
WEIGHTS = "model.safetensors"
# Loads of one server that fail before the stage does.
MOST_FAILURES = 2


class RemoteHandOver:
    """Hands a stage's student over to servers; several processes may share its folder.

    Args:
        policy: The student; its shape decides which servers can take it.
        config: Number type, adapter and log-probabilities.
        key: Of the stage: part of every version's name.
        folder: Where servers read weights.
        mode: The `--logprobs-mode` that the servers must have.
    """

    def __init__(self, policy: Policy, config: OnPolicyConfig, key: str, folder: Path, mode: str) -> None:
        self.config = config
        self.key = key
        self.folder = folder
        self.mode = mode
        self._shapes = weight_shapes(policy)
        self._transfers: dict[str, NcclTransfer] = {}
        self._checked: set[str] = set()
        self._failures: dict[str, int] = {}

    def publish(self, policy: Policy, version: int, probe: Probe) -> None:
        """Write a version down; servers have none of it yet.

        Args:
            policy: The student.
            version: Batches it has been updated on.
            probe: Drawn with the same weights.
        """
        folder = self.folder / f"version-{version}"
        shutil.rmtree(folder, ignore_errors=True)
        self._write(policy, folder)
        # Unlike another attempt's at the same step.
        name = f"{self.key}:{version}:{time.time_ns():x}"
        before = self.current() if (self.folder / CURRENT).exists() else None
        current = {"name": name, "folder": folder.name, "probe": probe.written()}
        write_whole(self.folder / CURRENT, json.dumps(current))
        if before is not None and before["folder"] != folder.name:
            shutil.rmtree(self.folder / before["folder"])

    def current(self) -> Mapping[str, Any]:
        """Name, folder and probe of the version written down last."""
        current: dict[str, Any] = json.loads((self.folder / CURRENT).read_text())
        return current

    def served_name(self, model: str) -> str:
        """What requests call the student: an adapter's name, or that of the server's model."""
        return model if self.config.lora is None else str(self.current()["name"])

    def bring_up_to_date(self, server: VllmServer, policy: Policy | None = None) -> None:
        """Hand the current version over unless the server has it.

        Args:
            server: One that answers.
            policy: The same weights where they lie in memory, for a transfer between devices.

        Raises:
            UserError: the server was started for something else, scores the probe otherwise than the trainer does, or
                has failed to load the weights twice.
            ServerLostError: it is lost, or has failed to load them.
        """
        # Of several processes that see a new server, one hands over.
        with FileLock(self.folder / f"{stable_hash(server.url)[:12]}.lock"):
            current, has = self.current(), server.weight_version()
            if has == NO_VERSION:
                # It may be another server at the same address.
                self._checked.discard(server.url)
            self.check(server)
            if has == current["name"]:
                return
            try:
                self._hand_over(server, current, has, policy)
            except ServerFailedError as error:
                self._count_failure(server, error)
                raise
            self._prove(server, current)
            server.set_weight_version(current["name"])
            self._failures.pop(server.url, None)

    def is_current(self, server: VllmServer) -> bool:
        """Whether a server has the version written down last.

        Raises:
            ServerLostError: it does not answer.
        """
        return server.weight_version() == str(self.current()["name"])

    def check(self, server: VllmServer) -> None:
        """See, once, that a server was started for what this stage asks of it.

        Raises:
            UserError: it was not; names what differs.
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
        taken = shapes_of_config(Path(server.setting("model_config", "model")))
        check_shapes(self._shapes, taken, f"the vLLM server {server.url}")
        self._checked.add(server.url)

    def close(self) -> None:
        """Leave the groups in which weights are transferred."""
        for transfer in self._transfers.values():
            transfer.close()

    def _write(self, policy: Policy, folder: Path) -> None:
        """What a server reads of this version: an adapter, or all weights. Of an adapter's base once."""
        if self.config.lora is None:
            save_weights(policy, folder)
            return
        if not (base := self.folder / "base").exists():
            save_weights(policy, base)
        assert isinstance(policy.model, PeftModel)
        policy.model.save_pretrained(folder, save_embedding_layers=False, selected_adapters=["default"])

    def _hand_over(self, server: VllmServer, current: Mapping[str, Any], has: str, policy: Policy | None) -> None:
        folder = self.folder / current["folder"]
        if self.config.lora is None:
            self._give(server, folder, has, policy)
            return
        for name, entry in server.models().items():
            if entry.get("parent"):
                server.unload_adapter(name)
        if not has.startswith(f"{self.key}:"):
            self._give(server, self.folder / "base", has, policy)
        server.load_adapter(current["name"], folder)

    def _give(self, server: VllmServer, folder: Path, has: str, policy: Policy | None) -> None:
        """Full weights, from a folder or over NCCL."""
        # A server that was started anew is no longer in the group it was in.
        known = self._transfers.pop(server.url, None)
        if known is not None and (policy is None or has == NO_VERSION):
            known.close()
            known = None
        if policy is None or not takes_transfers(server):
            server.load_weights(folder)
            return
        known = known or NcclTransfer(server, policy)
        try:
            known.send()
        except BaseException:
            known.close()
            raise
        self._transfers[server.url] = known

    def _prove(self, server: VllmServer, current: Mapping[str, Any]) -> None:
        """Have the server score the version's probe."""
        probe = Probe.read(current["probe"])
        name = self.served_name(server.base_model())
        scored = server.score(name, probe.tokens, probe.start, 0, probe=True)
        by_id = zip(scored, probe.tokens[probe.start :], strict=True)
        probe.check([known[token] for known, token in by_id], f"the vLLM server {server.url}")

    def _count_failure(self, server: VllmServer, error: ServerFailedError) -> None:
        """A server that was lost on the way may come back; one that fails to load what it is given will again."""
        self._failures[server.url] = self._failures.get(server.url, 0) + 1
        if self._failures[server.url] >= MOST_FAILURES:
            raise UserError(
                f"the vLLM server {server.url} cannot load the student's weights, nor could it after a new start "
                f"({error}); sample with sampler.backend: transformers"
            ) from error


def save_weights(policy: Policy, folder: Path) -> None:
    """Full weights as a server reads them; of an adapter its base's."""
    folder.mkdir(parents=True)
    # A tied head is written a second time, under its own name.
    save_file({name: tensor.contiguous().clone() for name, tensor in full_weights(policy)}, folder / WEIGHTS)
