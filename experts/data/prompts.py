"""Makes prompts of a row's fields: text, a template or chat messages, after a system prompt and examples."""

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

# Limit in characters of a prompt or an answer; more is a mistake in the data, and exceeds any model's context.
LONGEST_TEXT = 500_000
ROLES = ("system", "developer", "user", "assistant")
# Parts of a message besides its text; a rendering without them would be wrong.
_CALLS = ("tool_calls", "function_call", "tool_call_id", "reasoning_content", "images")


def template_fields(template: str) -> list[str]:
    """The fields that a template names, in order.

    Raises:
        ValueError: the braces hold anything but field names.
    """
    fields = []
    for _, name, form, conversion in string.Formatter().parse(template):
        if name is None:
            continue
        if form or conversion or not all(part.isidentifier() for part in name.split(".")):
            raise ValueError(f"'{template:.60}' may have only plain field names in braces; write '{{{{' for a brace")
        fields.append(name)
    return fields


def filled(template: str, values: Mapping[str, str]) -> str:
    """A template with each field replaced by its text."""
    parts = string.Formatter().parse(template)
    return "".join(literal + ("" if name is None else values[name]) for literal, name, _, _ in parts)


def look_up(row: Row, field: str) -> Any:
    """A field's value; `answers.text` is `text` in the object `answers`. None if it is missing."""
    if field in row:
        return row[field]
    value: Any = row
    for part in field.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def written(value: Any, where: str) -> str:
    """A value's text: text and JSON numbers as they are written, values of a typed column exactly.

    Raises:
        UserError: the value is missing, or is a list, an object or binary data.
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
    """Check that a text can be used.

    Raises:
        UserError: the text is too long, or is not valid Unicode.
    """
    if len(text) > LONGEST_TEXT:
        raise UserError(f"{where} has {len(text):,} characters, the limit is {LONGEST_TEXT:,}")
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(f"{where} holds half of a surrogate pair, which is not a character")


def chat(value: Any, where: str, unused: Counter[str]) -> list[Message]:
    """Chat messages of a row, as role and content.

    Args:
        value: The row's value.
        where: Row and field, for error messages.
        unused: Counts the keys of messages that are not used.

    Raises:
        UserError: the value is not a list of messages with a role and a text, or holds tool calls.
    """
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise UserError(f"{where} is neither text nor a list of chat messages: {value!r:.60}")
    messages = []
    for number, message in enumerate(value, 1):
        here = f"{where}: message {number}"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise UserError(f"{here} has no 'role' and 'content': {message!r:.80}")
        for key in message.keys() - {"role", "content"}:
            # In a typed column every message has every key.
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
    """The unit by which the split is made: the prompt's text, or the hash of a chat."""
    return prompt if isinstance(prompt, str) else stable_hash(prompt)


def with_context(prompt: Prompt, system: str | None, shots: Iterable[Example]) -> Prompt:
    """A prompt with a system prompt and solved examples before it.

    Without a system prompt, a text prompt remains text: each example is its prompt, a space (unless the prompt ends in
    white space), its answer and an empty line. Otherwise the examples are turns of a chat.
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
