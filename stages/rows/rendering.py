"""Settings of chat templates in a run: the run file's `chat_template_kwargs`, and a fixed date.

Templates of Llama 3, Mistral, SmolLM3 and Granite write today's date into each prompt (`strftime_now`). A run renders
them with the date that its lock pins. Free of torch.

All code that renders a chat passes `template_arguments()`, so the settings are made once per process.
"""

import datetime
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

# Names by which a template reads the date.
DATE_WORDS = ("strftime_now", "date_string")
# Arguments of `apply_chat_template` that are no template variables, and those that stages pass themselves.
OWN_ARGUMENTS = frozenset(
    (
        *("conversation", "messages", "tools", "documents", "chat_template", "strftime_now", "tokenizer_kwargs"),
        *("add_generation_prompt", "continue_final_message", "tokenize", "padding", "truncation", "max_length"),
        *("return_tensors", "return_dict", "return_assistant_tokens_mask"),
    )
)


@dataclass(frozen=True)
class Rendering:
    """The arguments of templates, besides the messages.

    Attributes:
        arguments: The run file's `chat_template_kwargs`.
        date: Today's date for templates, `YYYY-MM-DD`; the machine's date when absent.
    """

    arguments: Mapping[str, Any] = field(default_factory=dict)
    date: str | None = None


# Shared by all threads.
_rendering = [Rendering()]


@contextmanager
def rendering(chosen: Rendering) -> Iterator[None]:
    """A context in which templates are rendered with these settings."""
    _rendering.append(chosen)
    try:
        yield
    finally:
        _rendering.pop()


def template_arguments() -> dict[str, Any]:
    """Arguments for a tokenizer's `apply_chat_template`."""
    chosen = _rendering[-1]
    if chosen.date is None:
        return dict(chosen.arguments)
    today = datetime.datetime.fromisoformat(chosen.date)
    return {"strftime_now": today.strftime, **chosen.arguments}


def reads_date(template: str) -> bool:
    """Whether a chat template, or a file that contains one, reads today's date."""
    return any(word in template for word in DATE_WORDS)
