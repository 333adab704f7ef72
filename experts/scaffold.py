"""Digit sums: a whole domain in one short file, which `mopd add-expert --module FILE` copies for you to change.

A domain draws examples and scores completions. `score` alone is both the reward in RL and the measure of every
checkpoint.
"""

import random

from pydantic import Field

from base.errors import UserError
from base.hashing import stable_hash
from experts.domain import TRAIN, Domain, Example, in_train
from experts.domain import Options as DomainOptions

# Share of the examples that are never trained on.
HELD_OUT_SHARE = 0.25
DRAWS = 100


class Options(DomainOptions):
    """Options that the run file may set under `options`."""

    digits: int = Field(4, ge=2, le=12, description="Length of the numbers.")


class OwnDomain(Domain):
    """Add up a number's digits."""

    def __init__(self, name: str, options: Options) -> None:
        super().__init__(name)
        self.options = options

    def draw(self, split: str, count: int, seed: int) -> list[Example]:
        """Draw examples with distinct prompts; the prompt's hash alone decides its side of the split."""
        self.check_split(split)
        rng, found = random.Random(f"{seed}/{split}"), dict[str, Example]()
        for _ in range(DRAWS * count):
            if len(found) == count:
                break
            example = self._example(rng)
            if in_train(example.source, HELD_OUT_SHARE) == (split == TRAIN):
                found[example.source] = example
        if len(found) < count:
            raise UserError(f"domains.{self.name}: {split} holds fewer than {count} distinct examples; set more digits")
        return list(found.values())

    def score(self, example: Example, completion: str) -> float:
        """1 for the right sum without other text, else 0."""
        return float(completion.strip() == example.answer)

    def fingerprint(self) -> str:
        """Hash of everything that determines examples and scores; this file's text is added automatically."""
        return stable_hash(["digit_sum", self.options.model_dump()])

    def _example(self, rng: random.Random) -> Example:
        number = "".join(rng.choices("0123456789", k=self.options.digits))
        prompt = f"digit sum {number}:"
        return Example(prompt=prompt, answer=str(sum(map(int, number))), domain=self.name, source=prompt)


def load(name: str, options: Options) -> OwnDomain:
    """Make the domain from its entry in the run file."""
    return OwnDomain(name, options)
