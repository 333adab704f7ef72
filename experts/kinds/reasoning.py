"""Any reasoning-gym tasks as one domain: its generators make the examples, its own verifiers score them.

Several tasks are mixed evenly. reasoning-gym takes seconds to import, so the first draw or score imports it. Unknown
tasks and parameters are therefore found there, not when the options are checked.

A task's own verifier may evaluate the model's text or never end, so it runs in a child process
(`experts.isolation.untrusted`). Only reasoning-gym's default verifier, which compares strings, runs in this process.
"""

import json
import logging
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from importlib import metadata
from typing import Any, Literal

from pydantic import Field, field_validator

from base.errors import UserError, nearest
from base.hashing import stable_hash
from experts.data.normal_form import normal_form
from experts.domain import TRAIN, Domain, Example, in_train
from experts.domain import Options as DomainOptions
from experts.isolation.gym import PYCOSAT_TASKS, has_pycosat, import_reasoning_gym
from experts.isolation.untrusted import REASONING, Losses, VerifierError, VerifierLostError
from experts.kinds.reasoning_answers import may_be_right, without_full_stop
from experts.scoring.final_answer import without_thoughts

VERSION = 4
# Some generators prepare all their items at once, so a stream is made of short data sets with seeds of their own.
CHUNK = 256
# Generators are slow and need not be uniform: a task counts as exhausted after this many repeats per distinct prompt.
EXHAUSTION_FACTOR = 10
TAGS_INSTRUCTION = "Give only the final answer between <answer> and </answer>."
LONGEST_ANSWER = 20_000
FULL_MARKS = 1 - 1e-9

# The verifiers of these tasks pass the model's text to Python's `eval` or sympy's `parse_expr`, which runs code.
LITERAL_VERIFIERS = frozenset({"binary_matrix", "n_queens", "spiral_matrix", "string_insertion"})
EXPRESSION_VERIFIERS = frozenset({"countdown", "puzzle24", "simple_integration"})

# Their examples depend on Python's string hash seed, so they differ between processes (seen in reasoning-gym 0.1.25).
UNREPEATABLE = frozenset(
    {
        "codeio",
        "intermediate_integration",
        "isomorphic_strings",
        "knight_swap",
        "list_functions",
        "polynomial_multiplication",
        "ransom_note",
        "word_ladder",
    }
)

# Their prompts are a short list of texts in many forms. Split by prompt, most held-out answers would occur in
# training (85 to 95 % of 1,280 prompts), so they are split by answer.
SPLIT_BY_ANSWER = frozenset({"caesar_cipher", "emoji_mystery", "modulo_grid", "sentence_reordering"})
# Without this limit, the search for a split without any answer would never end.
FRUITLESS_FACTOR = 30

_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_LITERAL = re.compile(r"[\w\s\[\],'\"-]*")
_EXPRESSION = re.compile(r"[\w\s+\-*/^().]*")
_FUNCTIONS = frozenset(
    {"sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "exp", "log", "sqrt", "pi"}
)
_POWER = re.compile(r"\*\*|\^")
_SMALL_POWER = re.compile(r"(?:\*\*|\^)\s*(?:-?\w{1,2}|\(\s*-?\d{1,2}\s*(?:/\s*\d{1,2}\s*)?\))(?!\w|\s*(?:\*\*|\^|\())")

logger = logging.getLogger(__name__)


class Options(DomainOptions):
    """Options of a `reasoning` domain."""

    tasks: dict[str, dict[str, Any]] = Field(
        min_length=1, description="reasoning-gym tasks and their parameters, e.g. {basic_arithmetic: {min_terms: 2}}."
    )
    held_out_share: float = Field(0.2, gt=0, lt=1, description="Share of all prompts held out from training.")
    partial: bool = Field(
        False, description="Give the verifier's partial credit instead of 0, also for the gold inside another answer."
    )
    answer_format: Literal["plain", "tags"] = Field(
        "plain", description="`tags` asks in the prompt for <answer>…</answer>; the last such answer always counts."
    )

    @field_validator("tasks")
    @classmethod
    def _can_be_used(cls, tasks: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for task, parameters in tasks.items():
            if task in UNREPEATABLE:
                raise ValueError(f"'{task}' draws different examples in every process, so results cannot be compared")
            if task in PYCOSAT_TASKS and not has_pycosat():
                raise ValueError(
                    f"'{task}' needs the package pycosat, which set-up leaves out because pip builds it with a C "
                    "compiler and Python's headers: `pip install pycosat`, or choose another task"
                )
            for reserved in ("seed", "size"):
                if reserved in parameters:
                    raise ValueError(f"{task}.{reserved} is set by the draw; leave it out")
        return tasks


class ReasoningDomain(Domain):
    """A mixture of reasoning-gym tasks."""

    def __init__(self, name: str, options: Options) -> None:
        super().__init__(name)
        self.options = options
        self._verifiers: dict[str, Any] = {}
        self._losses = Losses(name)

    @property
    def source_space(self) -> str:
        """Shared by all domains of this kind."""
        return "reasoning"

    def draw(self, split: str, count: int, seed: int) -> list[Example]:
        """Draw distinct prompts of one split, task after task in turn; see `Domain.draw`.

        Raises:
            UserError: besides `Domain.draw`'s, an unknown task or parameter, or a task without a verifiable answer.
        """
        self.check_split(split)
        streams = [self._stream(task, split, count, seed) for task in self.options.tasks]
        return [next(streams[position % len(streams)]) for position in range(count)]

    def score(self, example: Example, completion: str) -> float:
        """1 where the task's own verifier gives the extracted answer full marks, else 0, or its credit if `partial`.

        A full stop at the end is not part of an answer. Wrong answers that verifiers give full marks score 0
        (`experts.kinds.reasoning_answers`).
        """
        task, gold = example.meta["task"], example.meta["answer"]
        answer = without_full_stop(extract_answer(completion), gold)
        if not is_safe_to_verify(task, answer) or not (self.options.partial or may_be_right(task, answer, gold)):
            return 0.0
        entry = {"question": example.question, "answer": example.meta["answer"], "metadata": example.meta["metadata"]}
        try:
            value = self._verify(task, answer, entry)
        except VerifierLostError as error:
            self._losses.add(error)
            return 0.0
        except VerifierError as error:
            logger.debug("domains.%s: the verifier of %s refused an answer: %s", self.name, task, error)
            return 0.0
        if not self.options.partial:
            return float(FULL_MARKS <= value <= 1)
        return min(max(value, 0.0), 1.0) if math.isfinite(value) else 0.0

    def facts(self) -> dict[str, float]:
        """`verifier_lost`: answers that scored 0 because the verifier's process ended or took too long."""
        return self._losses.facts()

    def news(self) -> list[str]:
        """One line on these answers since the last call."""
        return self._losses.news()

    def fingerprint(self) -> str:
        """Hash of the kind, its version, the options, reasoning-gym's version and which tasks are split by answer."""
        facts = ["reasoning", VERSION, self.options.model_dump(mode="json"), metadata.version("reasoning-gym")]
        by_answer = sorted(SPLIT_BY_ANSWER & self.options.tasks.keys())
        return stable_hash([*facts, by_answer] if by_answer else facts)

    def _stream(self, task: str, split: str, count: int, seed: int) -> Iterator[Example]:
        """Distinct examples of one task and split; raises UserError when the generator only repeats itself."""
        seen: set[str] = set()
        given = repeats = 0
        share = self.options.held_out_share if split != TRAIN else 1 - self.options.held_out_share
        for entry in self._entries(task, split, seed):
            question = entry["question"]
            if question in seen:
                repeats += 1
                if repeats > EXHAUSTION_FACTOR * (len(seen) + 20):
                    raise UserError(
                        f"domains.{self.name}: {count} examples of split '{split}' are needed, but task '{task}' "
                        f"has only {given} distinct ones in it with these parameters"
                    )
                continue
            seen.add(question)
            repeats = 0
            if len(seen) * share > FRUITLESS_FACTOR * (given + 20):
                raise UserError(
                    f"domains.{self.name}: {count} examples of split '{split}' are needed, but of {len(seen)} of task "
                    f"'{task}' with these parameters only {given} are in it; it has too few answers to split them"
                )
            source = normal_form(str(entry["answer"])) if task in SPLIT_BY_ANSWER else question
            if in_train(source, self.options.held_out_share) == (split == TRAIN):
                example = self._example(task, entry, source)
                if not given:
                    self._check_gold(example)
                given += 1
                yield example

    def _entries(self, task: str, split: str, seed: int) -> Iterator[dict[str, Any]]:
        chunk = 0
        while True:
            chunk_seed = int(stable_hash([task, split, seed, chunk])[:7], 16)
            dataset = self._dataset(task, chunk_seed)
            for index in range(CHUNK):
                yield dataset[index]
            chunk += 1

    def _example(self, task: str, entry: Mapping[str, Any], source: str) -> Example:
        question, answer = entry["question"], entry["answer"]
        if not isinstance(answer, str):
            raise UserError(
                f"domains.{self.name}.options.tasks.{task}: this task gives no gold answer, so it cannot be taught; "
                "choose another"
            )
        prompt, gold = question, answer
        if self.options.answer_format == "tags":
            prompt, gold = f"{question}\n{TAGS_INSTRUCTION}", f"<answer>{answer}</answer>"
        try:
            facts = json.loads(json.dumps(entry["metadata"]))
        except (TypeError, ValueError) as error:
            raise UserError(
                f"domains.{self.name}.options.tasks.{task}: its metadata cannot be stored as JSON ({error})"
            ) from None
        meta = {"task": task, "answer": answer, "metadata": facts}
        return Example(prompt, gold, self.name, source, meta, asked=question)

    def _check_gold(self, example: Example) -> None:
        """Refuse a task whose verifier rejects the gold answer (some need objects that JSON does not keep)."""
        score = self.score(example, example.answer)
        if score < 1.0:
            raise UserError(
                f"domains.{self.name}.options.tasks.{example.meta['task']}: its verifier gives its own answer "
                f"{score:.2f} once the example is stored as JSON, so this task is not usable here"
            )

    def _verify(self, task: str, answer: str, entry: dict[str, Any]) -> float:
        self._check_task(task)
        if only_compares(task):
            if task not in self._verifiers:
                self._verifiers[task] = self._dataset(task, seed=0)
            return float(self._verifiers[task].score_answer(answer, entry))
        parameters = self.options.tasks[task]
        key = f"{task} {json.dumps(parameters, sort_keys=True)}"
        dataset = {"key": key, "task": task, "parameters": parameters, "size": CHUNK}
        return float(REASONING.ask("score", {"key": key, "answer": answer, "entry": entry}, dataset))

    def _dataset(self, task: str, seed: int) -> Any:
        self._check_task(task)
        try:
            return import_reasoning_gym().create_dataset(task, seed=seed, size=CHUNK, **self.options.tasks[task])
        except (AssertionError, ValueError, TypeError) as error:
            where = f"domains.{self.name}.options.tasks.{task}"
            raise UserError(f"{where}: {error or 'these parameters are not valid'}") from None

    def _check_task(self, task: str) -> None:
        """Raise UserError for a task or parameter that reasoning-gym does not have."""
        import_reasoning_gym()
        from reasoning_gym.factory import DATASETS

        where = f"domains.{self.name}.options.tasks"
        if task not in DATASETS:
            raise UserError(f"{where}: reasoning-gym has no task '{task}'{nearest(task, DATASETS)}")
        known = [field.name for field in fields(DATASETS[task][1]) if field.name not in ("seed", "size")]
        for parameter in self.options.tasks[task]:
            if parameter not in known:
                raise UserError(f"{where}.{task}.{parameter}: unknown parameter{nearest(parameter, known)}")


def load(name: str, options: Options) -> ReasoningDomain:
    """Make a `reasoning` domain; reasoning-gym itself is imported by the first draw or score."""
    return ReasoningDomain(name, options)


def extract_answer(completion: str) -> str:
    """The last `<answer>…</answer>` behind a completion's thoughts, or the whole text there, stripped."""
    answer = without_thoughts(completion)
    tagged = _TAGGED.findall(answer)
    return (tagged[-1] if tagged else answer).strip()


def only_compares(task: str) -> bool:
    """Whether a known task's verifier is reasoning-gym's default, which compares strings and does nothing else."""
    import_reasoning_gym()
    from reasoning_gym.dataset import ProceduralDataset
    from reasoning_gym.factory import DATASETS

    return DATASETS[task][0].score_answer is ProceduralDataset.score_answer


def is_safe_to_verify(task: str, answer: str) -> bool:
    """Whether an answer may reach the task's verifier.

    Verifiers that evaluate text only get literals or plain formulas: no attribute, keyword, string or unknown function,
    and no power whose value could fill the memory. Their process contains whatever passes this check (see
    `experts.isolation.untrusted_worker`), but only this check prevents a text from forging that process's answer.
    """
    # complex_arithmetic's verifier treats a distance of NaN as 0.
    if len(answer) > LONGEST_ANSWER or (task == "complex_arithmetic" and "nan" in answer.casefold()):
        return False
    if task in LITERAL_VERIFIERS:
        return bool(_LITERAL.fullmatch(answer)) and not re.search(r"\bfor\b", answer)
    if task in EXPRESSION_VERIFIERS:
        return _is_plain_formula(answer)
    return True


def _is_plain_formula(text: str) -> bool:
    if len(text) > 1000 or not _EXPRESSION.fullmatch(text) or re.search(r"\.\s*[A-Za-z_]|[A-Za-z_]\s*\.", text):
        return False
    words = re.findall(r"[A-Za-z_]\w*", text)
    if not all(len(word) == 1 or word in _FUNCTIONS for word in words):
        return False
    # `(…)**n` multiplies exponents; two in one formula still stay small.
    powers_of_groups = len(re.findall(r"\)\s*(?:\*\*|\^)", text))
    return powers_of_groups <= 2 and len(_POWER.findall(text)) == len(_SMALL_POWER.findall(text))
