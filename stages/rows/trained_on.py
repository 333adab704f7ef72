"""Hashes of the training data of a checkpoint and all its ancestors, with which copies of a prompt can be found.

Each domain of each stage is one group of prompts, in the file `trained_on.npz` of the artifact; the manifest's
`trained_on` lists the groups, and the ancestors whose training is unknown. A long prompt has a sketch besides its hash:
the lowest hashes of its shingles, from which its likeness to another prompt is estimated (bottom-k sampling, Cohen and
Kaplan 2007). Free of torch.

Shape suffixes: `N` prompts, `S` concatenated hashes of all sketches, `C` shingles of the template.
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
# Number of hashes of one sketch.
SKETCH = 32
WHOLE = 2**32 - 1


@dataclass(frozen=True)
class Prompts:
    """The prompts of one domain as hashes.

    Attributes:
        forms_N: Hashes of their normal forms, 64 bits.
        answers_N: Hashes of their gold answers: the exact text in the low 32 bits, without case in the high 32 bits.
        units_N: Hashes of the units by which the domain splits its data, 64 bits.
        numbers_N: Hashes of the numbers in each prompt, 64 bits; 0 for a prompt without a sketch.
        sketches_S: The hashes of all sketches, each sketch in ascending order.
        ends_N: End of each sketch in `sketches_S`.
        limits_N: The hash up to which each sketch is complete.
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
        by_numbers = [short_hash(numbers(form)) if len(own) else 0 for form, own in zip(forms, sketches, strict=True)]
        return cls(
            forms_N=np.array([short_hash(form) for form in forms], dtype=np.uint64),
            answers_N=np.array([answer_hash(example.answer) for example in examples], dtype=np.uint64),
            units_N=np.array([unit_hash(domain, example) for example in examples], dtype=np.uint64),
            numbers_N=np.array(by_numbers, dtype=np.uint64),
            sketches_S=np.concatenate([np.empty(0, dtype=np.uint32), *sketches]),
            ends_N=np.cumsum([len(own) for own in sketches], dtype=np.int64),
            limits_N=np.array(limits, dtype=np.uint32),
            template_C=template,
        )

    @property
    def digest(self) -> str:
        """Hash of all arrays, so that a group of two ancestors is stored once."""
        sha = hashlib.sha256()
        for column in fields(self):
            sha.update(getattr(self, column.name).tobytes())
        return sha.hexdigest()[:16]


@dataclass(frozen=True)
class TrainedOn:
    """All training data of a checkpoint and its ancestors.

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
        """The training data of one stage.

        Args:
            domains: The domains by name.
            examples: The drawn examples by the name of their domain.
        """
        made = {name: Prompts.of(domains[name], drawn) for name, drawn in examples.items()}
        return cls(
            {prompts.digest: prompts for prompts in made.values()},
            {prompts.digest: name for name, prompts in made.items()},
        )

    @classmethod
    def read(cls, checkpoint: Artifact) -> Self:
        """The training data of a stored checkpoint; without a record the checkpoint counts as unknown."""
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
        """Write the groups into an artifact's folder; without groups no file is written."""
        if self.groups:
            arrays = {f"{d}/{c.name}": getattr(p, c.name) for d, p in self.groups.items() for c in fields(p)}
            np.savez_compressed(folder / FILE, **arrays)

    def facts(self) -> dict[str, Any]:
        """The manifest's entry."""
        listed = {
            digest: {"domain": self.domains[digest], "prompts": len(prompts.forms_N)}
            for digest, prompts in self.groups.items()
        }
        return {FACT: {"groups": listed, "unknown": list(self.unknown)}}


def together(parts: Iterable[TrainedOn]) -> TrainedOn:
    """The union of the training data of several checkpoints."""
    groups: dict[str, Prompts] = {}
    domains: dict[str, str] = {}
    unknown: dict[str, None] = {}
    for part in parts:
        groups |= part.groups
        domains |= part.domains
        unknown |= dict.fromkeys(part.unknown)
    return TrainedOn(groups, domains, tuple(unknown))


def unit_hash(domain: Domain, example: Example) -> int:
    """Hash of the unit by which an example is split, the same in all domains with the same split."""
    return short_hash(f"{domain.source_space}\n{example.source}")


def answer_hash(answer: str) -> int:
    """Hash of a gold answer: 32 bits without case in the high half, 32 bits of the exact text in the low half."""
    bare = answer.strip()
    return (short_hash(bare.casefold()) << 32 | short_hash(bare) & WHOLE) & (2**64 - 1)
