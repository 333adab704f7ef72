"""Another domain with an erring scorer: for studies of what a noisy or biased reward does to training.

Train on the noisy domain and measure on the wrapped one. Both have the same examples and splits.
"""

import random
from collections.abc import Sequence
from typing import Any

from pydantic import Field, field_validator

from base.hashing import stable_hash
from experts.domain import Domain, Example
from experts.domain import Options as DomainOptions

VERSION = 1
KIND = "noisy"


class Options(DomainOptions):
    """Options of a `noisy` domain."""

    kind: str = Field(description="The kind of the wrapped domain; not noisy.")
    options: dict[str, Any] = Field(default_factory=dict, description="The options of the wrapped domain.")
    flip: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Probability that a score r becomes 1 - r. A completion of a prompt is always scored alike.",
    )
    length_bias: float = Field(
        0.0,
        ge=0,
        le=10,
        description="b: the score becomes (r + b * length) / (1 + b), with the completion's length as a share of "
        "`longest`.",
    )
    longest: int = Field(200, gt=0, le=10**9, description="Characters of a completion that counts as longest.")

    @field_validator("kind")
    @classmethod
    def _is_another(cls, value: str) -> str:
        if value == KIND:
            raise ValueError("a noisy domain wraps a domain of another kind")
        return value


class NoisyDomain(Domain):
    """A domain with the examples of another one, and its scores with errors.

    Args:
        inner: The wrapped domain, under this domain's name.
        options: The amounts of both errors.
    """

    def __init__(self, inner: Domain, options: Options) -> None:
        super().__init__(inner.name)
        self.inner = inner
        self.options = options
        self.code = inner.code
        self._facts: dict[str, float] = {}

    @property
    def splits(self) -> tuple[str, ...]:
        """The inner domain's."""
        return self.inner.splits

    @property
    def source_space(self) -> str:
        """The inner domain's."""
        return self.inner.source_space

    @property
    def left_out(self) -> tuple[str, ...]:
        """The inner domain's."""
        return self.inner.left_out

    def supply(self, split: str) -> int | None:
        """The inner domain's."""
        return self.inner.supply(split)

    def draw(self, split: str, count: int, seed: int) -> list[Example]:
        """The inner domain's examples."""
        return self.inner.draw(split, count, seed)

    def score(self, example: Example, completion: str) -> float:
        """The inner domain's score with its errors, in [0, 1]."""
        return self.score_all([(example, completion)])[0]

    def score_all(self, pairs: Sequence[tuple[Example, str]]) -> list[float]:
        """The inner domain's scores with their errors, in [0, 1]."""
        true = self.inner.score_all(pairs)
        self._facts = {"true_score": sum(true) / len(true)} if true else {}
        return [self._noisy(*pair, score) for pair, score in zip(pairs, true, strict=True)]

    def _noisy(self, example: Example, completion: str, score: float) -> float:
        flip = random.Random(stable_hash([example.prompt, completion])).random() < self.options.flip
        share, bias = min(1.0, len(completion) / self.options.longest), self.options.length_bias
        return ((1.0 - score if flip else score) + bias * share) / (1.0 + bias)

    def facts(self) -> dict[str, float]:
        """The inner domain's, and the mean score without errors of the last completions."""
        return self.inner.facts() | self._facts

    def news(self) -> list[str]:
        """The inner domain's."""
        return self.inner.news()

    def preflight(self) -> None:
        """The inner domain's."""
        self.inner.preflight()

    def demonstration(self, example: Example, rng: random.Random, rough: bool = False) -> str:
        """The inner domain's."""
        return self.inner.demonstration(example, rng, rough)

    def fingerprint(self) -> str:
        """Hash of the inner domain's fingerprint and the amounts of the errors."""
        errors = self.options.model_dump(include={"flip", "length_bias", "longest"})
        return stable_hash([KIND, VERSION, errors, self.inner.fingerprint()])
