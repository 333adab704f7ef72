"""Guesses the options of a data set: the fields of prompt and answer, and the scorer. A person has to check them."""

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from base.errors import UserError
from experts.data.files import Row
from experts.data.sources import find_source

READ_ROWS = 200
# In order of preference.
PROMPTS = ("question", "prompt", "problem", "instruction", "query", "input", "text")
ANSWERS = ("answer", "answers", "completion", "response", "output", "solution", "target", "label")
CHATS = ("messages", "conversation", "chat")
CHOICES = ("choices", "options")
# GSM8K writes the number behind its reasoning in this form.
HASHES = "#### (.+)"
# Longer answers are hardly ever repeated word for word.
SHORT_ANSWER = 60


def guess_options(path: str, folder: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a `hub` domain over a data set.

    Args:
        path: A local file or folder, relative to `folder`, or a Hub id.
        folder: The run file's folder.
        given: Options that are fixed already; they are kept.

    Raises:
        UserError: the data cannot be read, or no field looks like a prompt or an answer; the message lists the fields.
        ConnectionError: the Hub cannot be reached.
    """
    place = folder / Path(path).expanduser()
    source = find_source("--domain", "path", str(place) if place.exists() else path)
    rows = [
        row
        for _, row in itertools.islice(
            source.rows(str(given.get("train_split", "train")), given.get("name"), given.get("revision")), READ_ROWS
        )
    ]
    if not rows:
        raise UserError(f"{path}: no rows")
    options = {"path": path, **given}
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if not options.keys() & {"prompt_field", "prompt_template", "messages_field"}:
        options |= _prompt(path, columns, rows)
    chat = options.get("messages_field")
    if chat is None and "answer_field" not in options:
        left = [column for column in columns if column != options.get("prompt_field")]
        options["answer_field"] = _named(path, "answer_field", ANSWERS, left)
    if "scorer" not in options:
        answers = [_last_answer(row.get(chat)) if chat else row.get(options["answer_field"]) for row in rows]
        options |= _scorer(columns, [answer for answer in answers if answer is not None], options)
    return options


def free_text(options: Mapping[str, Any], answers: Sequence[str]) -> bool:
    """Whether most answers are too long for a comparison of whole texts to be a reward."""
    compared = options.get("scorer", "exact") == "exact" and "answer_pattern" not in options
    return compared and sum(len(answer) > SHORT_ANSWER for answer in answers) * 2 > len(answers)


def _prompt(path: str, columns: Sequence[str], rows: Sequence[Row]) -> dict[str, str]:
    for column in columns:
        if column.lower() in CHATS and all(_last_answer(row.get(column)) is not None for row in rows):
            return {"messages_field": column}
    lower = {column.lower(): column for column in columns}
    if {"instruction", "input"} <= lower.keys():
        # Alpaca's form, whose second field is often empty.
        if all(str(row.get(lower["input"]) or "").strip() for row in rows):
            return {"prompt_template": f"{{{lower['instruction']}}}\n{{{lower['input']}}}"}
        return {"prompt_field": lower["instruction"]}
    return {"prompt_field": _named(path, "prompt_field", PROMPTS, columns)}


def _named(path: str, key: str, known: Sequence[str], columns: Sequence[str]) -> str:
    lower = {column.lower(): column for column in columns}
    found = next((lower[name] for name in known if name in lower), None)
    if found is None:
        raise UserError(
            f"{path}: no field is called like {', '.join(known)}; name one by --option NAME.{key}=FIELD, "
            f"of {', '.join(columns)}"
        )
    return found


def _scorer(columns: Sequence[str], answers: Sequence[Any], options: Mapping[str, Any]) -> dict[str, str]:
    lower = {column.lower(): column for column in columns}
    choices = next((lower[name] for name in CHOICES if name in lower), None)
    if "choices_field" in options or choices is not None:
        return {"choices_field": options.get("choices_field", choices), "scorer": "multiple_choice"}
    texts = [str(one) for answer in answers for one in (answer if isinstance(answer, list) else [answer])]
    if texts and all(re.search(HASHES, text) for text in texts):
        return {"answer_pattern": HASHES, "scorer": "numeric"}
    return {"scorer": "numeric" if texts and all(map(_is_number, texts)) else "exact"}


def _last_answer(value: Any) -> str | None:
    """The text of a chat's last message if it is the assistant's; otherwise None."""
    last = value[-1] if isinstance(value, list) and value else None
    if not isinstance(last, Mapping) or last.get("role") != "assistant":
        return None
    return str(last.get("content"))


def _is_number(text: str) -> bool:
    try:
        float(text.replace(",", ""))
    except ValueError:
        return False
    # A text with a leading zero is probably a code, not a number.
    return re.match(r"-?0\d", text.strip()) is None
