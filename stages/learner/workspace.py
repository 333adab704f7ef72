"""What a stage is handed: its parents, its domains, a seed, and the places it may write to. Free of torch."""

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
    """One node at work.

    Attributes:
        parents: The artifacts it is made from, by role: `start`, `teacher/<domain>`, `checkpoint`, …
        domains: The domains it draws from, by name.
        seed: Seed of everything random in it.
        provenance: What the planner knows and the manifest records (stage, config, code fingerprint, …).
        servers: URLs of the vLLM servers it may ask, by what they do: `rollout`, `teachers`.
    """

    store: Store
    key: str
    name: str
    seed: int
    parents: Mapping[str, Artifact]
    domains: Mapping[str, Domain]
    provenance: Mapping[str, Any]
    servers: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._meter = Meter(self.folder / SPENT_FILE)

    @property
    def folder(self) -> Path:
        """Work in progress of this node: survives a kill, removed when the artifact is committed."""
        return self.store.work(self.key)

    @property
    def progress(self) -> Path:
        """Where saved steps are kept."""
        return self.folder / "progress"

    def journal(self, resume_step: int = 0) -> Journal:
        """Open the node's journal, dropping what lies after the step it resumes from.

        Under torchrun every rank but the first has a file of its own: opening a journal rewrites it.
        """
        rank = int(os.environ.get("RANK", "0"))
        if rank:
            return Journal(self.folder / f"journal-{rank}.jsonl", resume_step)
        return MeteredJournal(self.folder / JOURNAL_FILE, resume_step, self._meter)

    def commit(
        self, folder: Path, *, trained_on: TrainedOn | None, metrics: Mapping[str, float], **facts: Any
    ) -> Artifact:
        """Turn a staged folder into this node's artifact and drop its saved steps.

        Args:
            folder: Made by `store.staging(key)`, all files written.
            trained_on: What this node trained on; the parents' is added, so that an artifact records all that its
                weights have ever seen. None where there are no weights.
            metrics: Final metrics.
            facts: More to record (`tokens`, `adapter_base`, …).
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
            "metrics": dict(metrics),
            **({} if trained_on is None else trained_on.facts()),
            **facts,
        }
        artifact = self.store.commit(folder, self.key, manifest)
        shutil.rmtree(self.progress, ignore_errors=True)
        self._meter.close()
        return artifact


class MeteredJournal(Journal):
    """A journal that keeps what was spent with every record: a kill comes between two of them."""

    def __init__(self, path: Path, resume_step: int, meter: Meter) -> None:
        super().__init__(path, resume_step)
        self._meter = meter
        meter.keep()

    def _write(self, kind: str, step: int, **fields: Any) -> None:
        super()._write(kind, step, **fields)
        self._meter.keep()


def peak_memory() -> int:
    """The most bytes this process has held: resident, and on its devices where it has used any."""
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return resident
    return resident + sum(torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count()))
