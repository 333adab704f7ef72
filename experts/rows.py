"""Rows of any `datasets` source as examples: a data set on the Hub, or local .jsonl, .json, .csv or .parquet files.

What kinds of domains share that differ in how a completion is scored. A file is looked for when the domain is made;
its rows are read, and unknown fields found, by the first draw.
"""

import hashlib
import random
import string
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationInfo, field_validator

from experts.domain import HELD_OUT, TRAIN, Domain, Example, Prompt, in_train, stable_hash
from experts.domain import Options as DomainOptions
from experts.errors import UserError, nearest

FILE_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}

Row = Mapping[str, Any]


class RowOptions(DomainOptions):
    """Where the rows are and which of their fields make the prompt."""

    path: str = Field(
        description="Hub id (owner/name), a local .jsonl, .json, .csv or .parquet file, or a folder of them."
    )
    name: str | None = Field(None, description="Configuration of a Hub data set, e.g. `main` of openai/gsm8k.")
    revision: str | None = Field(
        None, description="Commit or tag of a Hub data set; pin it to keep results repeatable."
    )
    train_split: str = Field("train", description="The data set's split to train on.")
    held_out_split: str | None = Field(
        None, description="The data set's split to measure on; when absent, a share of the prompts is held out."
    )
    held_out_share: float = Field(0.2, gt=0, lt=1, description="Share of prompts held out when no split is named.")
    prompt_field: str | None = Field(None, description="Field with the prompt: text or a list of chat messages.")
    prompt_template: str | None = Field(
        None, validate_default=True, description="Prompt made of fields, e.g. `Question: {question}`."
    )
    answer_field: str | None = Field(None, description="Field with the gold answer.")

    @field_validator("held_out_split")
    @classmethod
    def _splits_are_on_the_hub(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and Path(info.data.get("path", "")).suffix in FILE_FORMATS:
            raise ValueError("a local file has one split; leave this out and set held_out_share")
        if value is not None and value == info.data.get("train_split"):
            raise ValueError(f"'{value}' is the train split already")
        return value

    @field_validator("prompt_template")
    @classmethod
    def _one_way_to_the_prompt(cls, value: str | None, info: ValidationInfo) -> str | None:
        if (value is None) == (info.data.get("prompt_field") is None):
            raise ValueError("give either prompt_field or prompt_template")
        if value is not None and not all(name.isidentifier() for name in _template_fields(value)):
            raise ValueError(f"'{value}' may hold plain field names in braces only")
        return value


class RowDomain(Domain):
    """Rows of a data set, each one example."""

    def __init__(self, name: str, options: RowOptions) -> None:
        super().__init__(name)
        self.source = options
        self._file = Path(options.path) if Path(options.path).suffix in FILE_FORMATS else None
        self._folder = Path(options.path)
        if self._file is not None and not self._file.is_file():
            raise UserError(f"domains.{name}.options.path: no such file '{options.path}'")

    def draw(self, split: str, count: int, seed: int) -> list[Example]:
        """Draw rows of one split without repetition; see `Domain.draw`.

        Raises:
            UserError: besides `Domain.draw`'s, an unreadable or empty source, an unknown field, or a row whose prompt,
                choices or answer cannot be used.
        """
        self.check_split(split)
        pool = self._examples[split]
        if count > len(pool):
            raise UserError(
                f"domains.{self.name}: {count} examples were asked of split '{split}', "
                f"'{self.source.path}' has {len(pool)} with distinct prompts"
            )
        return random.Random(f"{split}/{seed}").sample(pool, count)

    @cached_property
    def _examples(self) -> dict[str, list[Example]]:
        """Both splits, with one example for each prompt; a prompt in both splits of the source is held out."""
        train = self._read(self.source.train_split)
        if self.source.held_out_split is not None:
            held_out = self._read(self.source.held_out_split)
            return {
                HELD_OUT: list(held_out.values()),
                TRAIN: [example for source, example in train.items() if source not in held_out],
            }
        share = self.source.held_out_share
        return {
            TRAIN: [example for source, example in train.items() if in_train(source, share)],
            HELD_OUT: [example for source, example in train.items() if not in_train(source, share)],
        }

    def _read(self, split: str) -> dict[str, Example]:
        rows = self._load(split)
        if len(rows) == 0:
            raise UserError(f"domains.{self.name}: split '{split}' of '{self.source.path}' is empty")
        self._check_fields(rows.column_names)
        examples: dict[str, Example] = {}
        for number, row in enumerate(rows):
            where = f"domains.{self.name}: row {number} of '{self.source.path}' ({split})"
            example = self._example(row, where)
            examples.setdefault(example.source, example)
        return examples

    def _load(self, split: str) -> Any:
        """Open one split; a Hub that cannot be reached raises ConnectionError, which is no mistake of the user's."""
        import datasets
        from datasets.exceptions import DatasetsError

        place = f"domains.{self.name}: cannot read split '{split}' of '{self.source.path}'"
        try:
            with _no_progress_bars():
                if self._file is None:
                    return datasets.load_dataset(
                        self.source.path, self.source.name, revision=self.source.revision, split=split
                    )
                if self._file.stat().st_size == 0:
                    raise UserError(f"domains.{self.name}: '{self.source.path}' is empty")
                kind = FILE_FORMATS[self._file.suffix]
                return datasets.load_dataset(kind, data_files={split: str(self._file)}, split=split)
        except ConnectionError as error:
            raise ConnectionError(
                f"{place}: {error}; without a network only what is in the Hub's cache is read"
            ) from error
        except (DatasetsError, ValueError) as error:
            raise UserError(f"{place}: {error.__cause__ or error}") from error

    @abstractmethod
    def _example(self, row: Row, where: str) -> Example:
        """Make an example of a row; `where` names the row in the message of an error."""

    def _named_fields(self) -> dict[str, str | None]:
        """Option -> the field of a row that it names."""
        return {"prompt_field": self.source.prompt_field, "answer_field": self.source.answer_field}

    def _described(self) -> dict[str, Any]:
        """The options with the data in place of its path: local content, or a Hub id with its revision."""
        options = self.source.model_dump(mode="json")
        if self._file is not None:
            options["path"] = _file_digest(self._file)
        elif self._folder.is_dir():
            files = sorted(path for path in self._folder.rglob("*") if path.is_file())
            options["path"] = {str(path.relative_to(self._folder)): _file_digest(path) for path in files}
        return options

    def _check_fields(self, columns: list[str]) -> None:
        wanted = [(key, field) for key, field in self._named_fields().items() if field is not None]
        wanted += [("prompt_template", field) for field in _template_fields(self.source.prompt_template or "")]
        for key, field in wanted:
            if field not in columns:
                raise UserError(
                    f"domains.{self.name}.options.{key}: '{self.source.path}' has no field '{field}'"
                    f"{nearest(field, columns)}; its fields: {', '.join(columns)}"
                )

    def _answer(self, row: Row, where: str) -> Any:
        """The gold answer as it stands in the row; there must be one."""
        gold = row[self.source.answer_field or ""]
        if gold is None:
            raise UserError(f"{where} has no '{self.source.answer_field}'")
        return gold

    def _prompt(self, row: Row, where: str, choices: str = "", choices_field: str = "") -> Prompt:
        """The prompt of a row; choices are shown where the template names their field, or last."""
        if self.source.prompt_template is not None:
            placed = choices_field in _template_fields(self.source.prompt_template)
            prompt = self.source.prompt_template.format_map({**row, choices_field: choices} if choices else row)
            return prompt if placed or not choices else f"{prompt}\n{choices}"
        prompt = row[self.source.prompt_field or ""]
        if isinstance(prompt, str):
            return f"{prompt}\n{choices}" if choices else prompt
        if not _is_chat(prompt):
            raise UserError(f"{where}: '{self.source.prompt_field}' is neither text nor a list of chat messages")
        messages = [{"role": message["role"], "content": message["content"]} for message in prompt]
        if choices:
            messages[-1]["content"] += f"\n{choices}"
        return messages


def _file_digest(path: Path) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _template_fields(template: str) -> list[str]:
    return [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]


def prompt_source(prompt: Prompt) -> str:
    """The unit the split is made by: the prompt's text, or the hash of a chat."""
    return prompt if isinstance(prompt, str) else stable_hash(prompt)


def _is_chat(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
        )
    )


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Keep `datasets` from drawing bars into the log, and leave its setting as it was."""
    import datasets

    if datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()
