"""Prompts made of a row's fields: text, a template, or chat messages, with a system prompt and examples before them."""

import datetime
import decimal
import math
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from base.errors import UserError, nearest
from base.hashing import stable_hash
from experts.data.files import Row
from experts.domain import Example, Message, Prompt

# Characters of a prompt, or of an answer; more is a mistake in the data, and no model's context.
LONGEST_TEXT = 500_000
ROLES = ("system", "developer", "user", "assistant")
# What a message may carry beside its text that a rendering without it would distort.
_CALLS = ("tool_calls", "function_call", "tool_call_id", "reasoning_content", "images")


def template_fields(template: str) -> list[str]:
    """The fields that a template names, in order.

    Raises:
        ValueError: it holds anything but field names in braces.
    """
    fields = []
    for _, name, form, conversion in string.Formatter().parse(template):
        if name is None:
            continue
        if form or conversion or not all(part.isidentifier() for part in name.split(".")):
            raise ValueError(f"'{template:.60}' may hold plain field names in braces only; '{{{{' stands for a brace")
        fields.append(name)
    return fields


def filled(template: str, values: Mapping[str, str]) -> str:
    """A template with each field replaced by its text."""
    parts = string.Formatter().parse(template)
    return "".join(literal + ("" if name is None else values[name]) for literal, name, _, _ in parts)


def look_up(row: Row, field: str) -> Any:
    """A field's value; `answers.text` is `text` in the object `answers`. None where it is not there."""
    if field in row:
        return row[field]
    value: Any = row
    for part in field.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def written(value: Any, where: str) -> str:
    """A value's text as it is written: of text and JSON numbers their own, of a typed column's its exact value.

    Raises:
        UserError: there is none, or it is a list, an object or binary data.
    """
    if isinstance(value, str):
        text = str(value)
    elif isinstance(value, bool):
        text = str(value).lower()
    elif isinstance(value, float) and math.isnan(value):
        raise UserError(f"{where} is not a number (NaN)")
    elif isinstance(value, int | float | decimal.Decimal | datetime.date | datetime.time):
        text = str(value)
    elif value is None:
        raise UserError(f"{where} is missing or null")
    else:
        raise UserError(f"{where} is neither text nor a number: {value!r:.60}")
    check_text(text, where)
    return text


def check_text(text: str, where: str) -> None:
    """See that a text can be used.

    Raises:
        UserError: it is too long, or is no Unicode text.
    """
    if len(text) > LONGEST_TEXT:
        raise UserError(f"{where} has {len(text):,} characters, the most are {LONGEST_TEXT:,}")
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(f"{where} holds half of a surrogate pair, which is no character")


def chat(value: Any, where: str, unused: Counter[str]) -> list[Message]:
    """Chat messages of a row, as role and content.

    Args:
        value: What the row holds.
        where: Names row and field in the message of an error.
        unused: Counts the keys of messages that are not used.

    Raises:
        UserError: it is no list of messages with a role and a text, or holds tool calls.
    """
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise UserError(f"{where} is neither text nor a list of chat messages: {value!r:.60}")
    messages = []
    for number, message in enumerate(value, 1):
        here = f"{where}: message {number}"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise UserError(f"{here} has no 'role' and 'content': {message!r:.80}")
        for key in message.keys() - {"role", "content"}:
            # A typed column gives every message every key.
            if message[key] is None or message[key] == []:
                continue
            if key in _CALLS:
                raise UserError(f"{here} has '{key}', which cannot be used here; leave such rows out")
            unused[key] += 1
        role, content = message["role"], message.get("content")
        if role not in ROLES:
            raise UserError(f"{here} has the role '{role}'{nearest(role, ROLES)}")
        if not isinstance(content, str) or not content.strip():
            raise UserError(f"{here} ({role}) has no text: {content!r:.60}")
        check_text(content, here)
        messages.append({"role": str(role), "content": str(content)})
    return messages


def prompt_source(prompt: Prompt) -> str:
    """The unit the split is made by: the prompt's text, or the hash of a chat."""
    return prompt if isinstance(prompt, str) else stable_hash(prompt)


def with_context(prompt: Prompt, system: str | None, shots: Iterable[Example]) -> Prompt:
    """A prompt with a system prompt and solved examples before it.

    Without a system prompt, text stays text: each example is its prompt, a space unless it ends in white space, its
    answer and an empty line. Otherwise the examples are turns of a chat.
    """
    shots = list(shots)
    if isinstance(prompt, str) and system is None:
        return "".join(f"{shot.prompt}{_gap(str(shot.prompt))}{shot.answer}\n\n" for shot in shots) + prompt
    messages = _messages(prompt)
    own = [message for message in messages[:1] if message["role"] in ("system", "developer")]
    first = own if system is None else [{"role": "system", "content": system}]
    turns: list[Message] = []
    for shot in shots:
        asked = [message for message in _messages(shot.prompt) if message["role"] not in ("system", "developer")]
        turns += [*asked, {"role": "assistant", "content": shot.answer}]
    return [*first, *turns, *messages[len(own) :]]


def _messages(prompt: Prompt) -> list[Message]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _gap(prompt: str) -> str:
    return "" if prompt[-1:].isspace() else " "
