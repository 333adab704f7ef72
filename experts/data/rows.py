"""Makes examples of a source's rows: a data set on the Hub, or local JSON, JSONL, CSV, TSV or Parquet files.

The base class of all kinds that read rows; they differ in how a completion is scored. Making the domain checks that the
file exists. The first draw reads the rows and checks the fields. Text is kept as it is written (`experts.data.files`).
"""

import itertools
import logging
import random
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from base.errors import UserError, nearest
from base.hashing import stable_hash
from experts.data.files import Place, Row, file_format
from experts.data.prompts import chat, filled, look_up, template_fields, with_context, written
from experts.data.sources import Source, find_source
from experts.domain import HELD_OUT, TRAIN, Domain, Example, Prompt, in_train
from experts.domain import Options as DomainOptions

# Increased with every change to the examples that rows become, for all kinds that read rows.
ROWS_VERSION = 2
# Number of faulty rows that one message names.
MOST_NAMED = 3

logger = logging.getLogger(__name__)


class RowOptions(DomainOptions):
    """The location of the rows, and the fields that make the prompt."""

    path: str = Field(
        description="Hub id (owner/name), or a local file or folder relative to the run file's folder: .jsonl, .json, "
        ".csv, .tsv (also with .gz) or .parquet."
    )
    held_out_path: str | None = Field(
        None, description="Local file or folder, or Hub id, with the rows to measure on; `path` is then trained on."
    )
    name: str | None = Field(None, description="Configuration of a Hub data set, e.g. `main` of openai/gsm8k.")
    revision: str | None = Field(
        None, description="Commit or tag of a Hub data set; pin it to keep results repeatable."
    )
    train_split: str = Field("train", description="The data set's split to train on.")
    held_out_split: str | None = Field(
        None, description="The data set's split to measure on; when absent, a share of the prompts is held out."
    )
    held_out_share: float = Field(
        0.2, gt=0, lt=1, description="Share of prompts held out when neither split nor path is named for it."
    )
    prompt_field: str | None = Field(None, description="Field with the prompt: text or a list of chat messages.")
    messages_field: str | None = Field(
        None, description="Field with a whole chat: its last assistant message is the gold answer, the rest the prompt."
    )
    assistant_turns: Literal["last", "all"] = Field(
        "last",
        description="Whole chats: the last answer is the example, or each answer is one, with the messages before it "
        "as the prompt. All examples of a chat are trained on or held out together.",
    )
    prompt_template: str | None = Field(
        None, validate_default=True, description="Prompt made of fields, e.g. `Question: {question}`."
    )
    system: str | None = Field(None, min_length=1, description="System prompt; makes every prompt a chat.")
    few_shot: int = Field(
        0, ge=0, le=64, description="Solved examples before every prompt, from train rows that are then left out."
    )
    answer_field: str | None = Field(
        None, description="Field with the gold answer, or a list of right ones; `answers.text` reads inside an object."
    )

    @field_validator("held_out_split")
    @classmethod
    def _splits_are_on_the_hub(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and info.data.get("held_out_path") is not None:
            raise ValueError("give either held_out_split or held_out_path")
        if value is not None and file_format(Path(info.data.get("path", ""))) is not None:
            raise ValueError("a local file has one split; leave this key out and set held_out_share or held_out_path")
        if value is not None and value == info.data.get("train_split"):
            raise ValueError(f"'{value}' is the train split already")
        return value

    @field_validator("prompt_template")
    @classmethod
    def _one_way_to_the_prompt(cls, value: str | None, info: ValidationInfo) -> str | None:
        given = [value, info.data.get("prompt_field"), info.data.get("messages_field")]
        if sum(one is not None for one in given) != 1:
            raise ValueError("give either prompt_field or prompt_template, or messages_field alone")
        if value is not None and not template_fields(value):
            raise ValueError(f"'{value:.60}' names no field in braces")
        return value

    @field_validator("assistant_turns")
    @classmethod
    def _turns_are_of_chats(cls, value: str, info: ValidationInfo) -> str:
        if value == "all" and info.data.get("messages_field") is None:
            raise ValueError("'all' goes with messages_field, the field with the whole chats")
        return value

    @field_validator("answer_field")
    @classmethod
    def _one_way_to_the_answer(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and info.data.get("messages_field") is not None:
            raise ValueError("with messages_field the last assistant message is the answer; leave this key out")
        return value


class RowDomain(Domain):
    """Rows of a data set, each one example."""

    def __init__(self, name: str, options: RowOptions) -> None:
        super().__init__(name)
        self.source = options
        key, apart = f"domains.{name}.options", options.held_out_path
        self._train_source = find_source(key, "path", options.path)
        self._held_out_source = None if apart is None else find_source(key, "held_out_path", apart)
        self._unused: Counter[str] = Counter()
        self._left_out: list[str] = []

    @property
    def left_out(self) -> tuple[str, ...]:
        """Notes on rows that are not examples because other rows have their prompts."""
        return tuple(self._left_out)

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
                f"domains.{self.name}: {count} examples of split '{split}' are needed, but "
                f"'{self.source.path}' has {len(pool)} with distinct prompts"
            )
        return random.Random(f"{split}/{seed}").sample(pool, count)

    def supply(self, split: str) -> int:
        """The number of rows of a split with distinct prompts; raises as `draw` does."""
        self.check_split(split)
        return len(self._examples[split])

    @cached_property
    def _examples(self) -> dict[str, list[Example]]:
        """Both splits, with one example for each prompt; a prompt in both splits of the source is held out."""
        options = self.source
        train = self._read(self._train_source, options.train_split)
        held_out = None
        if self._held_out_source is not None:
            held_out = self._read(self._held_out_source, options.train_split)
        elif options.held_out_split is not None:
            held_out = self._read(self._train_source, options.held_out_split)
        if held_out is None:
            held_out = {source: e for source, e in train.items() if not in_train(self._unit(e), options.held_out_share)}
        elif shared := train.keys() & held_out.keys():
            self._leave_out(f"{len(shared)} prompts to train on are held-out ones too, and are left out of training")
        apart = {self._unit(example) for example in held_out.values()}
        trained = [example for example in train.values() if self._unit(example) not in apart]
        if self._unused:
            self._log(f"keys of messages that are not used, with their number: {dict(self._unused)}")
        return self._in_context(trained, list(held_out.values()))

    def _unit(self, example: Example) -> str:
        """The unit trained on or held out as a whole: a prompt, or the opening of a chat whose answers are examples."""
        if self.source.assistant_turns == "last" or isinstance(example.prompt, str):
            return example.source
        return stable_hash(list(itertools.takewhile(lambda message: message["role"] != "assistant", example.prompt)))

    def _turns(self, row: Row) -> Iterator[Row]:
        """A row for each example to be made of this row."""
        field = self.source.messages_field
        messages = look_up(row, field) if field and self.source.assistant_turns == "all" else None
        if field is None or not isinstance(messages, list):
            yield row
            return
        ends = [
            at
            for at, message in enumerate(messages, 1)
            if isinstance(message, Mapping) and message.get("role") == "assistant"
        ]
        if not ends:
            yield row
        for end in ends:
            yield {**row, field: messages[:end]}

    def _in_context(self, train: list[Example], held_out: list[Example]) -> dict[str, list[Example]]:
        """Put the system prompt and the solved examples before every prompt."""
        system, count = self.source.system, self.source.few_shot
        if count >= len(train) > 0 and count:
            raise UserError(
                f"domains.{self.name}.options.few_shot: {count} examples leave none of the {len(train)} to train on"
            )
        # By hash, so that neither the order of the file nor a held-out row affects the choice.
        shots = sorted(train, key=lambda example: stable_hash(example.source))[:count] if count else []
        left_out = {example.source for example in shots}
        splits = {TRAIN: [e for e in train if e.source not in left_out], HELD_OUT: held_out}
        # Answers of one chat are not independent examples, so their source is the chat.
        splits = {split: [replace(e, source=self._unit(e)) for e in drawn] for split, drawn in splits.items()}
        if system is None and not shots:
            return splits
        return {
            split: [
                replace(example, prompt=with_context(example.prompt, system, shots), asked=example.question)
                for example in drawn
            ]
            for split, drawn in splits.items()
        }

    def _read(self, source: Source, split: str) -> dict[str, Example]:
        rows = list(self._rows(source, split))
        if not rows:
            where = f"'{source.path}'" if source.local is not None else f"split '{split}' of '{source.path}'"
            raise UserError(f"domains.{self.name}: {where} is empty")
        self._check_fields(source, list(dict.fromkeys(key for _, row in rows for key in row)))
        examples: dict[str, Example] = {}
        problems: list[str] = []
        repeated = other = 0
        for place, part in ((place, part) for place, row in rows for part in self._turns(row)):
            try:
                example = self._example(part, f"domains.{self.name}: {place}")
            except UserError as error:
                problems.append(str(error))
                continue
            first = examples.setdefault(example.source, example)
            if first is not example:
                repeated, other = repeated + 1, other + (first.answer != example.answer)
        if problems:
            more = len(problems) - MOST_NAMED
            tail = [f"domains.{self.name}: and {more} more rows of '{source.path}'"] if more > 0 else []
            raise UserError("\n".join([*problems[:MOST_NAMED], *tail]))
        if repeated:
            self._leave_out(
                f"{repeated} rows of '{source.path}' repeat the prompt of an earlier row, {other} of them with another "
                f"answer; the first one counts"
            )
        return examples

    def _leave_out(self, text: str) -> None:
        self._left_out.append(f"domains.{self.name}: {text}")

    def _log(self, text: str) -> None:
        logger.warning("domains.%s: %s", self.name, text)

    def _rows(self, source: Source, split: str) -> Iterator[tuple[Place, Row]]:
        """A source's rows; an error of reading them names the option's key."""
        try:
            yield from source.rows(split, self.source.name, self.source.revision)
        except ConnectionError as error:
            raise ConnectionError(
                f"domains.{self.name}: cannot read split '{split}' of '{source.path}': {error}; without a network only "
                f"what is in the Hub's cache is read"
            ) from error
        except UserError as error:
            raise UserError(f"domains.{self.name}.options.{source.key}: {error}") from error

    @abstractmethod
    def _example(self, row: Row, where: str) -> Example:
        """Make an example of a row; `where` names the row in error messages."""

    def _named_fields(self) -> dict[str, str | None]:
        """Option -> the field that it names."""
        return {key: getattr(self.source, key) for key in ("prompt_field", "messages_field", "answer_field")}

    def _described(self) -> dict[str, Any]:
        """The options with the path replaced by the data: a hash of local content, or a Hub id with its revision."""
        options = self.source.model_dump(mode="json")
        held_out = self._held_out_source
        if options["assistant_turns"] == "last":
            del options["assistant_turns"]
        return options | {
            "rows_version": ROWS_VERSION,
            "path": self._train_source.digest(),
            "held_out_path": held_out.digest() if held_out else None,
        }

    def _check_fields(self, source: Source, columns: list[str]) -> None:
        wanted = [(key, field) for key, field in self._named_fields().items() if field is not None]
        wanted += [("prompt_template", field) for field in template_fields(self.source.prompt_template or "")]
        for key, field in wanted:
            if field not in columns and field.partition(".")[0] not in columns:
                raise UserError(
                    f"domains.{self.name}.options.{key}: '{source.path}' has no field '{field}'"
                    f"{nearest(field, columns)}; its fields: {', '.join(columns)}"
                )

    def _parts(self, row: Row, where: str, choices: str = "", choices_field: str = "") -> tuple[Prompt, Any]:
        """A row's prompt, and its gold answer as the row has it; None if no field is named for it.

        Choices are inserted where the template names their field, otherwise at the end.
        """
        options = self.source
        field = options.messages_field or options.prompt_field
        answer = look_up(row, options.answer_field) if options.answer_field else None
        if options.prompt_template is not None:
            names = template_fields(options.prompt_template)
            values = {n: written(look_up(row, n), f"{where}: '{n}'") for n in names if n != choices_field}
            if values and not any(value.strip() for value in values.values()):
                empty = ", ".join(repr(name) for name in values)
                raise UserError(f"{where}: {empty}: all of these fields are empty, so the prompt is empty")
            prompt = filled(options.prompt_template, values | {choices_field: choices})
            return (prompt if choices_field in names or not choices else f"{prompt}\n{choices}"), answer
        assert field is not None
        here, value = f"{where}: '{field}'", look_up(row, field)
        if options.messages_field is None and not isinstance(value, list):
            text = written(value, here)
            if not text.strip():
                raise UserError(f"{here} is empty")
            return (f"{text}\n{choices}" if choices else text), answer
        messages = chat(value, here, self._unused)
        if options.messages_field is not None:
            if messages[-1]["role"] != "assistant" or len(messages) < 2:
                raise UserError(f"{here} does not end with an assistant message after a question")
            answer = messages.pop()["content"]
        elif messages[-1]["role"] == "assistant":
            raise UserError(
                f"{here} ends with its answer; name a whole chat by messages_field in place of prompt_field"
            )
        if options.system is not None and messages[0]["role"] in ("system", "developer"):
            raise UserError(f"{here} has a system message of its own beside domains.{self.name}.options.system")
        if choices:
            messages[-1]["content"] += f"\n{choices}"
        return messages, answer


def answers_of(gold: Any, where: str) -> list[str]:
    """The right answers of a row: text, a number, or a list of them; SQuAD's object has its list under `text`.

    Raises:
        UserError: there is no answer, or an answer cannot be used or is empty.
    """
    if isinstance(gold, dict) and isinstance(gold.get("text"), list):
        gold = gold["text"]
    if isinstance(gold, dict):
        raise UserError(f"{where} is an object; name a field inside it, such as '{next(iter(gold), 'x')}', with a dot")
    several: Sequence[Any] = gold if isinstance(gold, list) else [gold]
    if not several:
        raise UserError(f"{where} is an empty list")
    found = [written(one, where) for one in several]
    if not all(one.strip() for one in found):
        raise UserError(f"{where} is empty")
    return list(dict.fromkeys(found))
