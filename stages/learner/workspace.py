"""The workspace of a stage: its parents, its domains, a seed, and the folders it may write to. Free of torch."""

import importlib.metadata
import os
import resource
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from base.store.checkpoint import Artifact, Store
from base.store.energy import Meter
from base.store.journal import JOURNAL_FILE, Journal
from experts.domain import Domain
from stages.rows.trained_on import TrainedOn, together

SPENT_FILE = "spent.json"
PACKAGES = ("torch", "transformers", "peft", "accelerate", "safetensors", "tokenizers")


@dataclass
class Workspace:
    """The workspace of one running node.

    Attributes:
        store: The store of all artifacts.
        key: The node's content key.
        name: The node's name, for messages.
        seed: Seed of all randomness in the node.
        parents: The artifacts that the node is made from, by role: `start`, `teacher/<domain>`, `checkpoint`, …
        domains: The domains that the node draws from, by name.
        provenance: Entries of the manifest that come from the plan (stage, config, code fingerprint, …).
        servers: URLs of the vLLM servers that the node uses, by purpose: `rollout`, `teachers`.
        remote_code: Whether checkpoints may run Python code of their own.
    """

    store: Store
    key: str
    name: str
    seed: int
    parents: Mapping[str, Artifact]
    domains: Mapping[str, Domain]
    provenance: Mapping[str, Any]
    servers: Mapping[str, Sequence[str]] = field(default_factory=dict)
    remote_code: bool = False

    def __post_init__(self) -> None:
        self._meter = Meter(self.folder / SPENT_FILE)

    @property
    def folder(self) -> Path:
        """Folder of this node's work in progress; survives a kill, and is removed when the artifact is committed."""
        return self.store.work(self.key)

    @property
    def progress(self) -> Path:
        """Folder of the saved states."""
        return self.folder / "progress"

    def journal(self, resume_step: int = 0) -> Journal:
        """Open the node's journal without the records after the step it resumes from.

        Under torchrun every rank except the first has its own file, because opening a journal rewrites it.
        """
        rank = int(os.environ.get("RANK", "0"))
        if rank:
            return Journal(self.folder / f"journal-{rank}.jsonl", resume_step)
        return MeteredJournal(self.folder / JOURNAL_FILE, resume_step, self._meter)

    def commit(
        self, folder: Path, *, trained_on: TrainedOn | None, metrics: Mapping[str, float], **facts: Any
    ) -> Artifact:
        """Commit a staged folder as this node's artifact, and remove its saved states.

        Args:
            folder: Made by `store.staging(key)`, with all files written.
            trained_on: The training data of this node. The parents' is added, so that an artifact records all data that
                its weights were ever trained on. None if the artifact has no weights.
            metrics: Final metrics.
            facts: More entries of the manifest (`tokens`, `adapter_base`, …).

        Returns:
            The committed artifact.
        """
        if trained_on is not None:
            trained_on = together([trained_on, *map(TrainedOn.read, self.parents.values())])
            trained_on.write(folder)
        manifest = dict(self.provenance) | {
            "name": self.name,
            "seed": self.seed,
            "parents": {role: {"name": p.name, "key": p.key, "digest": p.digest} for role, p in self.parents.items()},
            "data": {name: domain.identity() for name, domain in self.domains.items()},
            "packages": {package: importlib.metadata.version(package) for package in PACKAGES},
            **self._meter.used(),
            "peak_memory": peak_memory(),
            "device": device_kind(),
            "metrics": dict(metrics),
            **({} if trained_on is None else trained_on.facts()),
            **facts,
        }
        artifact = self.store.commit(folder, self.key, manifest)
        shutil.rmtree(self.progress, ignore_errors=True)
        self._meter.close()
        return artifact


class MeteredJournal(Journal):
    """A journal that saves the meter with every record, so that a kill loses only the time since the last record."""

    def __init__(self, path: Path, resume_step: int, meter: Meter) -> None:
        super().__init__(path, resume_step)
        self._meter = meter
        meter.keep()

    def _write(self, kind: str, step: int, **fields: Any) -> None:
        super()._write(kind, step, **fields)
        self._meter.keep()


def peak_memory() -> int:
    """The peak memory of this process in bytes: of its devices if it has used any, else of the host.

    The two are not added: what is read on the host first does not compete for the device's memory.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return sum(torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count()))


def device_kind() -> str:
    """The name of this process's device; `cpu` if it has used none."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return "cpu"
    return str(torch.cuda.get_device_name(torch.cuda.current_device()))
