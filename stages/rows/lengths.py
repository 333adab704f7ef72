"""Treatment of prompts longer than a stage's limit: refused, left out, or cut, and counted. Free of torch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from base.errors import UserError
from experts.domain import Example, Prompt

# Counts the tokens of a prompt for the model.
Measure = Callable[[Prompt], int]
# Tokens that a message may have beyond its bytes and its template, such as one for a leading space.
SLACK = 2


@dataclass(frozen=True)
class Limit:
    """A stage's limit of prompts.

    Attributes:
        tokens: Longest prompt; None for any length.
        longer: Treatment of longer prompts.
    """

    tokens: int | None
    longer: Literal["refuse", "drop", "truncate"] = "refuse"

    @classmethod
    def of(cls, config: Mapping[str, Any], context: int | None, answer: int) -> "Limit":
        """The limit from a stage's config and the model's context.

        Args:
            config: The stage's config; its `max_prompt_tokens` and `longer_prompts` are used.
            context: The most tokens of a prompt and its completion together; None if unlimited or unknown.
            answer: The most tokens of the completion.
        """
        configured = config.get("max_prompt_tokens")
        limits = [limit for limit in (configured, None if context is None else context - answer) if limit is not None]
        return cls(min(limits, default=None), config.get("longer_prompts", "refuse"))


def fit(domain: str, examples: Sequence[Example], limit: Limit, measure: Measure) -> tuple[list[Example], list[str]]:
    """Apply a stage's limit to the examples of a domain.

    Args:
        domain: The domain's name.
        examples: The drawn examples.
        limit: The limit.
        measure: Counts the tokens of a prompt.

    Returns:
        The examples within the limit, and lines for the journal.

    Raises:
        UserError: longer prompts are refused, none is left, or one cannot be cut; the message names the domain.
    """
    long = {} if limit.tokens is None else longer(examples, limit.tokens, measure)
    if not long:
        return list(examples), []
    text = f"domains.{domain}: {count_message(len(long), len(examples), max(long.values()), limit.tokens)}"
    if limit.longer == "refuse":
        raise UserError(f"{text}; shorten them, raise the limit, or set longer_prompts: drop or truncate")
    assert limit.tokens is not None
    if limit.longer == "drop":
        kept = [example for at, example in enumerate(examples) if at not in long]
        if not kept:
            raise UserError(f"{text}; longer_prompts: drop leaves none")
        return kept, [f"{text}: dropped"]
    cut = [
        replace(example, prompt=shorten(example.prompt, limit.tokens, measure), asked=example.question)
        if at in long
        else example
        for at, example in enumerate(examples)
    ]
    return cut, [f"{text}: truncated"]


def count_message(count: int, total: int, longest: int, limit: int | None) -> str:
    """The message with the number of prompts that are too long."""
    return f"{count} of {total} prompts have more than {limit} tokens (the longest {longest})"


def longer(examples: Sequence[Example], limit: int, measure: Measure) -> dict[int, int]:
    """The tokens of each prompt that has more than `limit`, by the index of its example.

    A token is at least one byte of text, so prompts that are short in bytes are not measured.
    """
    overheads: dict[tuple[str, ...], int] = {}
    found: dict[int, int] = {}
    for at, example in enumerate(examples):
        messages = _messages(example.prompt)
        roles = () if isinstance(example.prompt, str) else tuple(str(message.get("role")) for message in messages)
        if roles not in overheads:
            overheads[roles] = measure(_with_texts(example.prompt, ["x"] * len(messages)))
        size = sum(len(message["content"].encode()) + SLACK for message in messages)
        if overheads[roles] + size > limit and (tokens := measure(example.prompt)) > limit:
            found[at] = tokens
    return found


def shorten(prompt: Prompt, limit: int, measure: Measure) -> Prompt:
    """The prompt with its longest message cut at the beginning, so that a question at its end is kept.

    Raises:
        UserError: the prompt is longer than `limit` even without that message.
    """
    texts = [message["content"] for message in _messages(prompt)]
    place = max(range(len(texts)), key=lambda i: len(texts[i]))

    def cut(keep: int) -> Prompt:
        whole = texts[place]
        return _with_texts(prompt, [*texts[:place], whole[len(whole) - keep :], *texts[place + 1 :]])

    low, high = 0, len(texts[place])
    if measure(cut(0)) > limit:
        raise UserError(f"a prompt has more than {limit} tokens even without its longest message: {texts[0][:60]!r}")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if measure(cut(middle)) <= limit else (low, middle)
    return cut(low)


def _messages(prompt: Prompt) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _with_texts(prompt: Prompt, texts: Sequence[str]) -> Prompt:
    if isinstance(prompt, str):
        return texts[0]
    return [{**message, "content": text} for message, text in zip(prompt, texts, strict=True)]
