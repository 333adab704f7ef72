"""A domain, the skill of an expert: examples to learn from and a score for any completion.

A domain is a typed source of examples with one scorer; the scorer is the reward in training and the measure in
evaluation, so the two can never drift apart. `experts.loading` makes domains.
"""

import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict

from base.errors import UserError, nearest
from base.hashing import stable_hash

Message = dict[str, str]
Prompt = str | list[Message]

TRAIN = "train"
HELD_OUT = "held_out"
OUT_OF_DISTRIBUTION = "out_of_distribution"
# A kind with this ending is a user's own file.
OWN_SUFFIX = ".py"


class Options(BaseModel):
    """Base of every kind's options: unknown keys are errors, values are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt with the data that its scorer needs.

    Attributes:
        prompt: Plain text (becomes one user message) or chat messages.
        answer: The gold completion.
        domain: Name of the domain that scores it.
        source: The unit by which the train/held-out split is made: the prompt itself, or the source function of an
            edit.
        meta: JSON-serialisable facts for the scorer.
        asked: The prompt without the text before or behind every prompt of the domain, where that is known.
    """

    prompt: Prompt
    answer: str
    domain: str
    source: str
    meta: Mapping[str, Any] = field(default_factory=dict)
    asked: Prompt | None = None

    @property
    def question(self) -> Prompt:
        """The question itself, by which copies of a prompt are found."""
        return self.prompt if self.asked is None else self.asked

    @property
    def id(self) -> str:
        """Stable identity: a hash of domain, prompt and answer."""
        return stable_hash([self.domain, self.prompt, self.answer])[:16]

    @property
    def messages(self) -> list[Message]:
        """The whole chat: the prompt's messages, then the gold completion as the assistant's."""
        asked = [{"role": "user", "content": self.prompt}] if isinstance(self.prompt, str) else self.prompt
        return [*asked, {"role": "assistant", "content": self.answer}]


class Domain(ABC):
    """A skill: a source of examples, and a scorer of completions.

    Attributes:
        name: Its key in the run file.
        code: Hash of a user's own domain file; empty for a built-in kind, which has a version.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.code = ""

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits this domain can draw from."""
        return (TRAIN, HELD_OUT)

    @property
    def source_space(self) -> str:
        """Domains with the same source space split alike: their examples of one `source` are copies."""
        return self.name

    @property
    def left_out(self) -> tuple[str, ...]:
        """Notes on data that the draws so far left out, one line each, for the journal and the plan."""
        return ()

    def check_split(self, split: str) -> None:
        """Check that this domain has a split.

        Raises:
            UserError: it does not have this split.
        """
        if split not in self.splits:
            raise UserError(f"domains.{self.name}: no split '{split}'{nearest(split, self.splits)}")

    @abstractmethod
    def draw(self, split: str, count: int, seed: int) -> list[Example]:
        """Draw `count` examples with distinct prompts; the same arguments give the same examples.

        Splits never share a `source`.

        Raises:
            UserError: the domain cannot supply that many distinct examples, or has no such split.
        """

    def supply(self, split: str) -> int | None:
        """The number of distinct examples in a split; None where they are generated."""
        del split
        return None

    def draw_up_to(self, most: int, split: str, seed: int) -> list[Example]:
        """Draw `most` examples, or all examples of a smaller data set; see `draw`."""
        supply = self.supply(split)
        return self.draw(split, most if supply is None else min(most, supply), seed)

    @abstractmethod
    def score(self, example: Example, completion: str) -> float:
        """Score a completion in [0, 1]; malformed or hostile text scores 0 and never raises."""

    def score_all(self, pairs: Sequence[tuple[Example, str]]) -> list[float]:
        """Score completions, each as `score` does; a domain with a remote scorer sends parallel requests."""
        return [self.score(example, completion) for example, completion in pairs]

    def facts(self) -> dict[str, float]:
        """Measurements of the scorer itself, for the metrics; empty for most domains."""
        return {}

    def news(self) -> list[str]:
        """Faults in scoring since the last call, one line each, for the log; empty for most domains."""
        return []

    def preflight(self) -> None:  # noqa: B027 - most domains need nothing outside this process
        """Check that everything scoring needs outside this process is available.

        Raises:
            UserError: something is missing; the message names the key.
        """

    def demonstration(self, example: Example, rng: random.Random, rough: bool = False) -> str:
        """A completion to imitate: the gold answer, or a flawed one where the domain defines `rough` teaching."""
        del rng, rough
        return example.answer

    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of everything that determines the examples and their scores (kind, version, options, data, packages)."""

    def identity(self) -> str:
        """The fingerprint, combined with the code of a user's own domain, because another scorer is another reward."""
        return stable_hash([self.fingerprint(), self.code]) if self.code else self.fingerprint()


def in_train(source: str, held_out_share: float) -> bool:
    """Whether a source belongs to the train split: decided by its hash alone, so it never changes."""
    bucket = int(hashlib.sha256(source.encode()).hexdigest()[:8], 16) / 2**32
    return bucket >= held_out_share
