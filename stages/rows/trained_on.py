"""What a checkpoint and all it was made from were trained on, kept as hashes: copies of a prompt can be found in it.

Each domain of each stage is one group of prompts, in the file `trained_on.npz` of the artifact; the manifest's
`trained_on` lists the groups, and the ancestors whose training is unknown. A long prompt has a sketch beside its hash:
the lowest hashes of its shingles, from which its likeness to another prompt is estimated (bottom-k sampling, Cohen and
Kaplan 2007). Free of torch.

Shape suffixes: `N` prompts, `S` hashes of all sketches laid end to end, `C` shingles of the template.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import numpy as np

from base.store.checkpoint import Artifact
from experts.data.normal_form import normal_form, numbers, short_hash
from experts.domain import Domain, Example
from stages.rows.shingles import FEWEST_SHINGLES, shingles, template_shingles, without

FILE, FACT = "trained_on.npz", "trained_on"
# Hashes of one sketch.
SKETCH = 32
WHOLE = 2**32 - 1


@dataclass(frozen=True)
class Prompts:
    """The prompts of one domain as hashes.

    Attributes:
        forms_N: Of their normal forms, 64 bits.
        answers_N: Of their gold answers: as they are in the low 32 bits, without case in the high ones.
        units_N: Of what the domain splits by, 64 bits.
        numbers_N: Of the numbers in each, 64 bits; 0 for a prompt without a sketch.
        sketches_S: Each sketch in ascending order.
        ends_N: Where each sketch ends.
        limits_N: Up to which hash a sketch is complete.
        template_C: Shingles that are left out of the sketches, in ascending order.
    """

    forms_N: np.ndarray
    answers_N: np.ndarray
    units_N: np.ndarray
    numbers_N: np.ndarray
    sketches_S: np.ndarray
    ends_N: np.ndarray
    limits_N: np.ndarray
    template_C: np.ndarray

    @classmethod
    def of(cls, domain: Domain, examples: Sequence[Example]) -> Self:
        """The prompts of a domain's examples."""
        forms = [normal_form(example.question) for example in examples]
        parts = [shingles(form) for form in forms]
        template = template_shingles(parts)
        sketches, limits = [], []
        for part in parts:
            own = without(part, template)
            kept = own[:SKETCH] if len(own) >= FEWEST_SHINGLES else own[:0]
            sketches.append(kept)
            limits.append(kept[-1] if len(kept) == SKETCH < len(own) else WHOLE)
        told = [short_hash(numbers(form)) if len(own) else 0 for form, own in zip(forms, sketches, strict=True)]
        return cls(
            forms_N=np.array([short_hash(form) for form in forms], dtype=np.uint64),
            answers_N=np.array([answer_hash(example.answer) for example in examples], dtype=np.uint64),
            units_N=np.array([unit_hash(domain, example) for example in examples], dtype=np.uint64),
            numbers_N=np.array(told, dtype=np.uint64),
            sketches_S=np.concatenate([np.empty(0, dtype=np.uint32), *sketches]),
            ends_N=np.cumsum([len(own) for own in sketches], dtype=np.int64),
            limits_N=np.array(limits, dtype=np.uint32),
            template_C=template,
        )

    @property
    def digest(self) -> str:
        """Hash of all arrays: the same group in two ancestors is kept once."""
        sha = hashlib.sha256()
        for column in fields(self):
            sha.update(getattr(self, column.name).tobytes())
        return sha.hexdigest()[:16]


@dataclass(frozen=True)
class TrainedOn:
    """All that a checkpoint has seen.

    Attributes:
        groups: Digest -> prompts.
        domains: Digest -> the name of their domain.
        unknown: Ancestors, or the checkpoint itself, whose training is unknown.
    """

    groups: Mapping[str, Prompts] = field(default_factory=dict)
    domains: Mapping[str, str] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()

    @classmethod
    def of(cls, domains: Mapping[str, Domain], examples: Mapping[str, Sequence[Example]]) -> Self:
        """What a stage trains on.

        Args:
            domains: By name.
            examples: Drawn, by the name of their domain.
        """
        made = {name: Prompts.of(domains[name], drawn) for name, drawn in examples.items()}
        return cls(
            {prompts.digest: prompts for prompts in made.values()},
            {prompts.digest: name for name, prompts in made.items()},
        )

    @classmethod
    def read(cls, checkpoint: Artifact) -> Self:
        """What a stored checkpoint was trained on; one without a record is unknown as a whole."""
        facts = checkpoint.manifest.get(FACT)
        if facts is None:
            return cls(unknown=(checkpoint.name,))
        listed: Mapping[str, Any] = facts["groups"]
        groups = {}
        if listed:
            with np.load(checkpoint.path / FILE) as file:
                names = [column.name for column in fields(Prompts)]
                groups = {digest: Prompts(**{name: file[f"{digest}/{name}"] for name in names}) for digest in listed}
        return cls(groups, {digest: one["domain"] for digest, one in listed.items()}, tuple(facts["unknown"]))

    def write(self, folder: Path) -> None:
        """Write the groups into an artifact's folder; none, no file."""
        if self.groups:
            arrays = {f"{d}/{c.name}": getattr(p, c.name) for d, p in self.groups.items() for c in fields(p)}
            np.savez_compressed(folder / FILE, **arrays)

    def facts(self) -> dict[str, Any]:
        """What the manifest holds of it."""
        listed = {
            digest: {"domain": self.domains[digest], "prompts": len(prompts.forms_N)}
            for digest, prompts in self.groups.items()
        }
        return {FACT: {"groups": listed, "unknown": list(self.unknown)}}


def together(parts: Iterable[TrainedOn]) -> TrainedOn:
    """The union of what several checkpoints have seen."""
    groups: dict[str, Prompts] = {}
    domains: dict[str, str] = {}
    unknown: dict[str, None] = {}
    for part in parts:
        groups |= part.groups
        domains |= part.domains
        unknown |= dict.fromkeys(part.unknown)
    return TrainedOn(groups, domains, tuple(unknown))


def unit_hash(domain: Domain, example: Example) -> int:
    """Hash of what an example is split by, the same for all domains that split alike."""
    return short_hash(f"{domain.source_space}\n{example.source}")


def answer_hash(answer: str) -> int:
    """32 bits of a gold answer without its case, and 32 of it as it is."""
    bare = answer.strip()
    return (short_hash(bare.casefold()) << 32 | short_hash(bare) & WHOLE) & (2**64 - 1)
