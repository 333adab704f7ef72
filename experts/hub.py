"""Any `datasets` source as a domain: a data set on the Hub, or local .jsonl, .json, .csv or .parquet files.

Rows become examples by naming fields or by a template; completions are scored by exact match, as numbers and formulas
(math-verify), or as the letter of a multiple-choice question. A file is looked for when the domain is made; its rows
are read, and unknown fields found, by the first draw.
"""

import string
from collections.abc import Mapping
from importlib import metadata
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from experts import answers
from experts.domain import Example, stable_hash
from experts.errors import UserError
from experts.rows import Row, RowDomain, RowOptions, prompt_source

VERSION = 1


class Options(RowOptions):
    """What a `hub` domain asks for."""

    answer_field: str = Field(description="Field with the gold answer; for choices an index, a letter or the text.")
    choices_field: str | None = Field(
        None,
        description="Field with the choices: a list, or {text, label}; shown where the template names it, or last.",
    )
    scorer: Literal["exact", "numeric", "multiple_choice"] = Field(
        "exact", validate_default=True, description="How a completion is compared with the gold answer."
    )

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

    def score(self, example: Example, completion: str) -> float:
        """1 if the scorer named in the options accepts the completion, else 0."""
        if self.options.scorer == "numeric":
            return float(answers.same_value(completion, example.answer))
        if self.options.scorer == "multiple_choice":
            return float(answers.chosen_letter(completion, example.meta["choices"]) == example.answer)
        return float(completion.strip() == example.answer.strip())

    def fingerprint(self) -> str:
        """Hash of the kind, its version, the options and the data: local content, or a Hub id with its revision."""
        packages = {"math-verify": metadata.version("math-verify")} if self.options.scorer == "numeric" else {}
        return stable_hash(["hub", VERSION, self._described(), packages])

    def _named_fields(self) -> dict[str, str | None]:
        return super()._named_fields() | {"choices_field": self.options.choices_field}

    def _example(self, row: Row, where: str) -> Example:
        gold = self._answer(row, where)
        if self.options.scorer == "multiple_choice":
            choices, labels = _choices(row[self.options.choices_field or ""], where)
            letter = answers.gold_letter(gold, choices, labels)
            if letter is None:
                raise UserError(f"{where}: answer {gold!r} is neither an index, a letter nor one of {choices}")
            prompt = self._prompt(row, where, answers.lettered(choices), self.options.choices_field or "")
            return Example(prompt, letter, self.name, prompt_source(prompt), {"choices": choices})
        answer = str(gold)
        if self.options.scorer == "numeric" and not answers.has_value(answer):
            raise UserError(f"{where}: no number or formula in the answer {answer!r}")
        prompt = self._prompt(row, where)
        return Example(prompt, answer, self.name, prompt_source(prompt))


def load(name: str, options: Options) -> HubDomain:
    """Make a `hub` domain.

    Raises:
        UserError: a local file that does not exist.
    """
    return HubDomain(name, options)


def _choices(value: Any, where: str) -> tuple[list[str], list[str]]:
    """Texts and, where the data set has its own, labels of the choices."""
    labels: list[str] = []
    if isinstance(value, Mapping) and "text" in value:
        labels = [str(label) for label in value.get("label") or []]
        value = value["text"]
    if not isinstance(value, list) or not 2 <= len(value) <= len(string.ascii_uppercase):
        raise UserError(f"{where}: choices must be a list of 2 to 26 texts, found {value!r}")
    return [str(choice) for choice in value], labels
