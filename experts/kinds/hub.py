"""Any `datasets` source as a domain: a data set on the Hub, or local JSON, JSONL, CSV, TSV or Parquet files.

Rows become examples by naming fields or by a template. Completions are scored by exact match, as numbers and formulas
(math-verify), or as the letter of a multiple-choice question. Where a row has several answers, each of them is right.
Making the domain checks that the file exists; the first draw reads the rows and checks the fields.
"""

import re
import string
from collections.abc import Mapping
from importlib import metadata
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from base.errors import UserError
from base.hashing import stable_hash
from experts.data.files import Number, Row
from experts.data.prompts import look_up, prompt_source, written
from experts.data.rows import RowDomain, RowOptions, answers_of
from experts.domain import Example
from experts.isolation.untrusted import Losses, VerifierLostError
from experts.kinds import answers
from experts.scoring.choices import chosen_letter, gold_letters, lettered
from experts.scoring.final_answer import without_thoughts

# Increased with every change to the scores that a scorer gives.
VERSION = 3
# Key in an example's meta: the right answers, if the gold completion is not the only one.
ANSWERS = "answers"


class Options(RowOptions):
    """Options of a `hub` domain."""

    answer_field: str | None = Field(
        None,
        validate_default=True,
        description="Field with the gold answer, or a list of right answers (`answers.text` reads inside an object); "
        " for choices an index, a letter or the text.",
    )
    answer_pattern: str | None = Field(
        None,
        description="Regular expression with one group that finds the answer in the field's text, such as "
        "`#### (.+)`; SFT still imitates the whole text. If a completion matches, its last match is scored.",
    )
    choices_field: str | None = Field(
        None,
        description="Field with the choices: a list, or {text, label}; shown where the template names it, or last.",
    )
    scorer: Literal["exact", "numeric", "multiple_choice"] = Field(
        "exact", validate_default=True, description="How a completion is compared with the gold answer."
    )

    @field_validator("answer_field")
    @classmethod
    def _there_is_an_answer(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None and info.data.get("messages_field") is None:
            raise ValueError("name the field with the gold answer")
        return value

    @field_validator("answer_pattern")
    @classmethod
    def _has_one_group(cls, value: str | None) -> str | None:
        if value is None:
            return value
        try:
            groups = re.compile(value).groups
        except re.error as error:
            raise ValueError(f"'{value}' is not a regular expression: {error}") from None
        if groups != 1:
            raise ValueError(f"'{value}' has {groups} groups in parentheses; exactly one must enclose the answer")
        return value

    @field_validator("scorer")
    @classmethod
    def _choices_are_named(cls, value: str, info: ValidationInfo) -> str:
        if (value == "multiple_choice") != (info.data.get("choices_field") is not None):
            raise ValueError("multiple_choice and choices_field go together")
        return value


class HubDomain(RowDomain):
    """Rows of a data set, each one example."""

    def __init__(self, name: str, options: Options) -> None:
        super().__init__(name, options)
        self.options = options
        self._losses = Losses(name)

    def score(self, example: Example, completion: str) -> float:
        """1 if the scorer named in the options accepts the completion, else 0."""
        golds = example.meta.get(ANSWERS, [example.answer])
        try:
            if self.options.answer_pattern is not None:
                completion = without_thoughts(completion)
                found = answers.last_match(self.options.answer_pattern, completion)
                # An empty match is an empty answer.
                completion = completion if found is None else found
            if self.options.scorer == "multiple_choice":
                return float(chosen_letter(completion, example.meta["choices"]) in golds)
            if self.options.scorer == "exact":
                return float(answers.same_text(completion, golds))
            return float(answers.same_value(completion, golds, _question(example)))
        except VerifierLostError as error:
            self._losses.add(error)
            return 0.0

    def facts(self) -> dict[str, float]:
        """`verifier_lost`: completions that scored 0 because the process that parses them ended or took too long."""
        return self._losses.facts()

    def news(self) -> list[str]:
        """One line on these completions since the last call."""
        return self._losses.news()

    def fingerprint(self) -> str:
        """Hash of the kind, its version, the options and the data: local content, or a Hub id with its revision."""
        packages = {"math-verify": metadata.version("math-verify")} if self.options.scorer == "numeric" else {}
        return stable_hash(["hub", VERSION, self._described(), packages])

    def _named_fields(self) -> dict[str, str | None]:
        return super()._named_fields() | {"choices_field": self.options.choices_field}

    def _example(self, row: Row, where: str) -> Example:
        if self.options.scorer == "multiple_choice":
            return self._choice(row, where)
        prompt, gold = self._parts(row, where)
        here = f"{where}: '{self.options.answer_field or self.options.messages_field}'"
        texts = answers_of(gold, here)
        golds = [self._found(text, here) for text in texts]
        if any(map(answers.is_blank, golds)):
            raise UserError(f"{here} is empty apart from thoughts or zero-width characters")
        if self.options.scorer == "numeric":
            for text in golds:
                self._check_value(text, here)
        meta = {} if golds == texts[:1] else {ANSWERS: golds}
        return Example(prompt, texts[0], self.name, prompt_source(prompt), meta)

    def _choice(self, row: Row, where: str) -> Example:
        field = self.options.choices_field or ""
        choices, labels = _choices(look_up(row, field), f"{where}: '{field}'")
        prompt, gold = self._parts(row, where, lettered(choices), field)
        here = f"{where}: '{self.options.answer_field or self.options.messages_field}'"
        several = gold if isinstance(gold, list) else [gold]
        is_index = all(isinstance(one, Number | int) and not isinstance(one, bool) for one in several)
        letters: list[str] = []
        for text in answers_of(gold, here):
            letters += gold_letters(self._found(text, here), is_index, choices, labels)
        if not letters:
            raise UserError(f"{here}: {gold!r} is neither an index from 0, a letter nor one of {choices}")
        meta = {"choices": choices} | ({ANSWERS: letters} if len(letters) > 1 else {})
        return Example(prompt, letters[0], self.name, prompt_source(prompt), meta)

    def _found(self, text: str, where: str) -> str:
        """The answer in a field's text."""
        pattern = self.options.answer_pattern
        if pattern is None:
            return text
        found = [match[1] for match in re.finditer(pattern, text) if match[1] is not None]
        if not found or not found[-1].strip():
            raise UserError(f"{where}: answer_pattern '{pattern}' finds nothing in {text!r:.80}")
        return str(found[-1].strip())

    def _check_value(self, text: str, where: str) -> None:
        try:
            known = answers.has_value(text)
        except VerifierLostError as error:
            raise UserError(f"{where}: math-verify cannot read {text!r:.80}: {error}") from None
        if not known:
            raise UserError(f"{where}: no number or formula in the answer {text!r:.80}")


def load(name: str, options: Options) -> HubDomain:
    """Make a `hub` domain.

    Raises:
        UserError: a local file that does not exist.
    """
    return HubDomain(name, options)


def _question(example: Example) -> str:
    """The text of the question: in a chat the last message."""
    asked = example.question
    return asked if isinstance(asked, str) else asked[-1]["content"]


def _choices(value: Any, where: str) -> tuple[list[str], list[str]]:
    """The texts of the choices and, if the data set has them, their labels."""
    labels: list[str] = []
    if isinstance(value, Mapping) and "text" in value:
        labels = [written(label, f"{where}: label") for label in value.get("label") or []]
        value = value["text"]
    if not isinstance(value, list) or not 2 <= len(value) <= len(string.ascii_uppercase):
        raise UserError(f"{where}: choices must be a list of 2 to 26 texts, found {value!r:.80}")
    return [written(choice, f"{where}: choice {number}") for number, choice in enumerate(value, 1)], labels
