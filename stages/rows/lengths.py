"""Prompts longer than a stage takes: refused, left out, or cut, and counted. Free of torch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from base.errors import UserError
from experts.domain import Example, Prompt

# Tokens of a prompt as the model reads it.
Measure = Callable[[Prompt], int]
# Tokens by which a message may be longer than its bytes and its template, such as one for a leading space.
SLACK = 2


@dataclass(frozen=True)
class Limit:
    """What a stage takes.

    Attributes:
        tokens: Longest prompt; None for any.
        longer: What becomes of longer ones.
    """

    tokens: int | None
    longer: Literal["refuse", "drop", "truncate"] = "refuse"

    @classmethod
    def of(cls, config: Mapping[str, Any], context: int | None, answer: int) -> "Limit":
        """A stage's limit.

        Args:
            config: The stage's, of which `max_prompt_tokens` and `longer_prompts` are read.
            context: Tokens of a prompt and its completion together; None where that is not known.
            answer: Tokens that the completion may take.
        """
        asked = config.get("max_prompt_tokens")
        limits = [limit for limit in (asked, None if context is None else context - answer) if limit is not None]
        return cls(min(limits, default=None), config.get("longer_prompts", "refuse"))


def fit(domain: str, examples: Sequence[Example], limit: Limit, measure: Measure) -> tuple[list[Example], list[str]]:
    """The examples of a domain whose prompts a stage takes, and lines for the journal.

    Args:
        domain: Its name.
        examples: Drawn.
        limit: What is taken.
        measure: Counts the tokens of a prompt.

    Raises:
        UserError: some are longer and to be refused, none is left, or one cannot be cut; names the domain.
    """
    long = {} if limit.tokens is None else longer(examples, limit.tokens, measure)
    if not long:
        return list(examples), []
    text = f"domains.{domain}: {told(len(long), len(examples), max(long.values()), limit.tokens)}"
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


def told(count: int, total: int, longest: int, limit: int | None) -> str:
    """How many prompts are too long."""
    return f"{count} of {total} prompts have more than {limit} tokens (the longest {longest})"


def longer(examples: Sequence[Example], limit: int, measure: Measure) -> dict[int, int]:
    """Tokens of each prompt that has more than `limit`, by its place.

    A token is a byte of text or more, so prompts that are short in bytes are not measured.
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
    """The prompt with its longest message cut at the beginning, so that what is asked at its end stays.

    Raises:
        UserError: without that message it is still longer than `limit`.
    """
    texts = [message["content"] for message in _messages(prompt)]
    place = max(range(len(texts)), key=lambda i: len(texts[i]))

    def cut(keep: int) -> Prompt:
        whole = texts[place]
        return _with_texts(prompt, [*texts[:place], whole[len(whole) - keep :], *texts[place + 1 :]])

    low, high = 0, len(texts[place])
    if measure(cut(0)) > limit:
        raise UserError(f"a prompt has more than {limit} tokens also without its longest message: {texts[0][:60]!r}")
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
