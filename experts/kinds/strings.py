"""Compact text tasks a character-level model of half a million parameters can learn.

Each task turns a few digits or random pronounceable letters into a prompt such as `sort up 5 3 9 1:` or
`reverse kotap:` with one right answer, all in printable ASCII. Words are generated and not taken from a list, because a
list of a few thousand words, filtered by length, leaves too few distinct prompts.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from base.errors import UserError
from base.hashing import stable_hash
from experts.domain import TRAIN, Domain, Example, in_train
from experts.domain import Options as DomainOptions

VERSION = 1
VOWELS = "aeiou"
CONSONANTS = "bcdfghjklmnpqrstvwxyz"
# A prompt among M equally likely ones is still unseen after 30 M draws with probability e^-30.
EXHAUSTION_FACTOR = 30

TaskName = Literal[
    "sort",
    "reverse",
    "caesar",
    "uppercase",
    "lowercase",
    "capitalize",
    "swapcase",
    "rotate",
    "double",
    "interleave",
    "first_letters",
]


@dataclass(frozen=True, slots=True)
class Task:
    """One text task.

    Attributes:
        make: Makes a prompt and its answer from a length.
        flaw: Makes this task's typical mistake in an answer.
        min_length: Shortest input by default: digits, letters of a word, or words for `first_letters`.
        max_length: Longest input by default.
    """

    make: Callable[[random.Random, int], tuple[str, str]]
    flaw: Callable[[random.Random, str], str]
    min_length: int
    max_length: int


class Options(DomainOptions):
    """Options of a `strings` domain."""

    task: TaskName = Field(description="What to do with the text.")
    min_length: int | None = Field(
        None, ge=2, le=12, description="Shortest input (digits, letters or words); the task's own default when absent."
    )
    max_length: int | None = Field(
        None, ge=2, le=12, description="Longest input (digits, letters or words); the task's own default when absent."
    )
    held_out_share: float = Field(0.2, gt=0, lt=1, description="Share of all prompts held out from training.")
    rough_share: float = Field(0.0, ge=0, le=1, description="Probability that a rough demonstration has a mistake.")
    partial: bool = Field(False, description="Score the share of right positions instead of exact match.")

    @field_validator("max_length")
    @classmethod
    def _not_below_min_length(cls, value: int | None, info: ValidationInfo) -> int | None:
        shortest = info.data.get("min_length")
        if value is not None and shortest is not None and value < shortest:
            raise ValueError(f"{value} is below min_length {shortest}")
        return value


class StringsDomain(Domain):
    """One text task with a length range."""

    def __init__(self, name: str, options: Options) -> None:
        super().__init__(name)
        self.options = options
        self._task = TASKS[options.task]
        self._lengths = _length_range(name, options, self._task)

    def draw(self, split: str, count: int, seed: int) -> list[Example]:
        """Draw distinct prompts of one split; see `Domain.draw`."""
        self.check_split(split)
        rng = random.Random(f"{self.options.task}/{split}/{seed}")
        seen: set[str] = set()
        drawn: list[Example] = []
        repeats = 0
        while len(drawn) < count:
            prompt, answer = self._task.make(rng, rng.randint(*self._lengths))
            if prompt in seen:
                repeats += 1
                if repeats > EXHAUSTION_FACTOR * (len(seen) + 100):
                    raise UserError(
                        f"domains.{self.name}: {count} examples of split '{split}' are needed, but only {len(drawn)} "
                        f"distinct ones exist for task '{self.options.task}' with lengths "
                        f"{self._lengths[0]}–{self._lengths[1]}"
                    )
                continue
            seen.add(prompt)
            repeats = 0
            if in_train(prompt, self.options.held_out_share) == (split == TRAIN):
                drawn.append(Example(prompt, answer, self.name, source=prompt))
        return drawn

    def score(self, example: Example, completion: str) -> float:
        """1 for the exact answer (outer white space ignored), else 0, or the share of right positions if `partial`."""
        given = completion.strip()
        if not self.options.partial:
            return float(given == example.answer)
        right = sum(a == b for a, b in zip(given, example.answer, strict=False))
        return right / max(len(given), len(example.answer))

    def demonstration(self, example: Example, rng: random.Random, rough: bool = False) -> str:
        """The gold answer; if `rough`, with probability `rough_share` one with the task's typical mistake.

        An answer in which the mistake is impossible (sorting equal digits) stays right.
        """
        if rough and rng.random() < self.options.rough_share:
            return self._task.flaw(rng, example.answer)
        return example.answer

    def fingerprint(self) -> str:
        """Hash of the kind, its version and the options."""
        return stable_hash(["strings", VERSION, self.options.model_dump(mode="json")])


def load(name: str, options: Options) -> StringsDomain:
    """Make a `strings` domain.

    Raises:
        UserError: the length range is empty.
    """
    return StringsDomain(name, options)


def _length_range(name: str, options: Options, task: Task) -> tuple[int, int]:
    shortest = task.min_length if options.min_length is None else options.min_length
    longest = task.max_length if options.max_length is None else options.max_length
    if longest < shortest:
        raise UserError(
            f"domains.{name}.options: task '{options.task}' has default lengths {task.min_length}–{task.max_length}, "
            f"with yours the range is {shortest}–{longest}: set both min_length and max_length"
        )
    return shortest, longest


def _word(rng: random.Random, length: int) -> str:
    """Alternate consonants and vowels, starting with either."""
    start = rng.randrange(2)
    return "".join(rng.choice((CONSONANTS, VOWELS)[(start + position) % 2]) for position in range(length))


def _sort(rng: random.Random, length: int) -> tuple[str, str]:
    digits = rng.choices("0123456789", k=length)
    direction = rng.choice(("up", "down"))
    return f"sort {direction} {' '.join(digits)}:", " ".join(sorted(digits, reverse=direction == "down"))


def _reverse(rng: random.Random, length: int) -> tuple[str, str]:
    word = _word(rng, length)
    return f"reverse {word}:", word[::-1]


def _caesar(rng: random.Random, length: int) -> tuple[str, str]:
    word, shift = _word(rng, length), rng.choice((-2, -1, 1, 2))
    return f"caesar {shift:+d} {word}:", "".join(_shifted(letter, shift) for letter in word)


def _uppercase(rng: random.Random, length: int) -> tuple[str, str]:
    word = _word(rng, length)
    return f"upper {word}:", word.upper()


def _lowercase(rng: random.Random, length: int) -> tuple[str, str]:
    word = _word(rng, length)
    return f"lower {word.upper()}:", word


def _capitalize(rng: random.Random, length: int) -> tuple[str, str]:
    word = _word(rng, length)
    return f"capital {word}:", word.capitalize()


def _swapcase(rng: random.Random, length: int) -> tuple[str, str]:
    word = "".join(rng.choice((letter, letter.upper())) for letter in _word(rng, length))
    return f"swap {word}:", word.swapcase()


def _rotate(rng: random.Random, length: int) -> tuple[str, str]:
    word, steps = _word(rng, length), rng.choice((1, 2))
    return f"rotate {steps} {word}:", word[steps:] + word[:steps]


def _double(rng: random.Random, length: int) -> tuple[str, str]:
    word = _word(rng, length)
    return f"double {word}:", "".join(letter * 2 for letter in word)


def _interleave(rng: random.Random, length: int) -> tuple[str, str]:
    left, right = _word(rng, length), _word(rng, length)
    return f"zip {left} {right}:", "".join(a + b for a, b in zip(left, right, strict=True))


def _first_letters(rng: random.Random, length: int) -> tuple[str, str]:
    words = [_word(rng, rng.randint(2, 3)) for _ in range(length)]
    return f"first {' '.join(words)}:", "".join(word[0] for word in words)


def _shifted(letter: str, shift: int) -> str:
    return chr((ord(letter) - ord("a") + shift) % 26 + ord("a"))


def _swap_neighbours(rng: random.Random, answer: str) -> str:
    """Swap two neighbouring, different symbols; digits are separated by a space."""
    gap = " " if " " in answer else ""
    symbols = answer.split(" ") if gap else list(answer)
    places = [i for i in range(len(symbols) - 1) if symbols[i] != symbols[i + 1]]
    if places:
        place = rng.choice(places)
        symbols[place], symbols[place + 1] = symbols[place + 1], symbols[place]
    return gap.join(symbols)


def _miss_one_shift(rng: random.Random, answer: str) -> str:
    place = rng.randrange(len(answer))
    return answer[:place] + _shifted(answer[place], rng.choice((-1, 1))) + answer[place + 1 :]


def _wrong_case_of_one(rng: random.Random, answer: str) -> str:
    place = rng.randrange(len(answer))
    return answer[:place] + answer[place].swapcase() + answer[place + 1 :]


def _drop_one(rng: random.Random, answer: str) -> str:
    place = rng.randrange(len(answer))
    return answer[:place] + answer[place + 1 :]


TASKS: Mapping[str, Task] = MappingProxyType(
    {
        "sort": Task(_sort, _swap_neighbours, 4, 7),
        "reverse": Task(_reverse, _swap_neighbours, 3, 5),
        "caesar": Task(_caesar, _miss_one_shift, 3, 5),
        "uppercase": Task(_uppercase, _wrong_case_of_one, 3, 6),
        "lowercase": Task(_lowercase, _wrong_case_of_one, 3, 6),
        "capitalize": Task(_capitalize, _wrong_case_of_one, 3, 6),
        "swapcase": Task(_swapcase, _wrong_case_of_one, 3, 5),
        "rotate": Task(_rotate, _swap_neighbours, 3, 5),
        "double": Task(_double, _drop_one, 3, 5),
        "interleave": Task(_interleave, _swap_neighbours, 2, 4),
        "first_letters": Task(_first_letters, _drop_one, 2, 4),
    }
)
