"""From messages to tokens: prompts and demonstrations as the chat template renders them, and the end of a completion.

Data is plain text. Only the template writes control tokens, such as those that begin and end a turn. The same
characters in a message are tokenised as text, so that no message can end itself or begin another turn.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from base.errors import UserError
from experts.domain import Message, Prompt
from experts.isolation.time_limit import processor_limit
from stages.rows.literal import MARK, encode, encode_all, mark
from stages.rows.rendering import template_arguments

# Raised by Python for expressions in a template, which is untrusted.
TEMPLATES_FAULTS = (
    TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError, MemoryError
)  # fmt: skip
# Two nested loops of a template can run for years.
TEMPLATE_SECONDS = 20.0
# The contents of a sample chat whose rendering shows how the template ends a turn.
ASKED, ANSWERED = "question", "answer"


@dataclass(frozen=True)
class Controls:
    """The control tokens of a tokenizer.

    Attributes:
        names: Ids of the control tokens by name: all special tokens, and the end of a turn. Other added tokens, such as
            `<think>`, are part of a model's text.
        end_of_turn: The token that the chat template writes after an assistant's answer; None if it writes none.
    """

    names: Mapping[str, int]
    end_of_turn: int | None


_controls: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[Any, Controls]] = WeakKeyDictionary()


def controls(tokenizer: PreTrainedTokenizerBase) -> Controls:
    """The tokenizer's control tokens; read once for each tokenizer."""
    state = (len(tokenizer), tokenizer.eos_token_id, str(tokenizer.chat_template))
    cached = _controls.get(tokenizer)
    if cached is None or cached[0] != state:
        end, special = end_of_turn(tokenizer), set(tokenizer.all_special_ids)
        added = tokenizer.added_tokens_decoder
        # A token of one character, such as a newline that is the EOS, is text as well.
        names = {
            token.content: id_
            for id_, token in added.items()
            if len(token.content) > 1 and (token.special or id_ in special or id_ == end)
        }
        cached = _controls[tokenizer] = (state, Controls(names, end))
    return cached[1]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Token ids of a prompt as the chat template renders it, up to the beginning of the completion.

    Without a chat template plain text is encoded unchanged, with BOS if the tokenizer adds one, and without EOS.

    Raises:
        UserError: chat messages for a tokenizer without a chat template, or the template refuses them.
    """
    if tokenizer.chat_template is None:
        if not isinstance(prompt, str):
            raise UserError(f"the tokenizer {tokenizer.name_or_path} has no chat template for chat messages")
        return _plain_prompt(tokenizer, prompt)
    text = render(tokenizer, _marked(tokenizer, prompt), add_generation_prompt=True)
    return encode(tokenizer, text, controls(tokenizer).names)


def _plain_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """A text's ids with the tokens that the tokenizer adds before them, but without those it adds after them."""
    names = controls(tokenizer).names
    text = mark(prompt, names)
    own, whole = (encode(tokenizer, text, names, add_special_tokens=added) for added in (False, True))
    if own == whole:
        return own
    if not own:
        return [token for token in whole if token != tokenizer.eos_token_id] or whole[:1]
    before = next(at for at in range(len(whole)) if whole[at : at + len(own)] == own)
    return whole[: before + len(own)]


def encode_demonstration(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, completion: str
) -> tuple[list[int], list[int]]:
    """Token ids of one prompt and of its completion; see `encode_demonstrations`."""
    return encode_demonstrations(tokenizer, [(prompt, completion)])[0]


def encode_demonstrations(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[Prompt, str]]
) -> list[tuple[list[int], list[int]]]:
    """Token ids of prompts and of their completions, each ending with the token that ends an assistant's turn.

    A completion is the part of the rendered chat that follows the rendered prompt. If the template ends a turn
    without a token, and without a template, EOS ends it.

    Args:
        tokenizer: With an EOS.
        pairs: Prompt and completion of each demonstration. Their texts are tokenised as one batch.

    Raises:
        UserError: as for `encode_prompt`; or a rendered chat does not begin with its rendered prompt.
    """
    eos, control = int(tokenizer.eos_token_id), controls(tokenizer)
    if tokenizer.chat_template is None:
        return [(encode_prompt(tokenizer, prompt), [*encode_text(tokenizer, text), eos]) for prompt, text in pairs]
    rendered = [_rendered(tokenizer, prompt, completion) for prompt, completion in pairs]
    prompts = encode_all(tokenizer, [question for question, _ in rendered], control.names)
    chats = encode_all(tokenizer, [whole for _, whole in rendered], control.names)
    ends = {eos, control.end_of_turn}
    rows = []
    for (question, whole), prompt_ids, ids in zip(rendered, prompts, chats, strict=True):
        if ids[: len(prompt_ids)] == prompt_ids:
            target = ids[len(prompt_ids) :]
        else:
            # With a merge across the border, the completion would begin inside a token.
            target = encode(tokenizer, whole[len(question) :], control.names)
        last = next((at for at, token in enumerate(target) if token in ends), None)
        rows.append((prompt_ids, [*target, eos] if last is None else target[: last + 1]))
    return rows


def _rendered(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, completion: str) -> tuple[str, str]:
    """The text of a prompt, and of the chat in which it is answered."""
    messages = _marked(tokenizer, prompt)
    question = render(tokenizer, messages, add_generation_prompt=True)
    answer = {"role": "assistant", "content": mark(completion, controls(tokenizer).names)}
    whole = render(tokenizer, [*messages, answer], add_generation_prompt=False)
    if not whole.startswith(question):
        raise UserError(
            f"the chat template of {tokenizer.name_or_path} renders an answered prompt differently from the prompt: "
            f"{_difference(question, whole)}; set chat_template_kwargs, or use a consistent template"
        )
    return question, whole


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text, without BOS and EOS."""
    names = controls(tokenizer).names
    return encode(tokenizer, mark(text, names), names)


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that the chat template writes after an assistant's answer; None if it writes none."""
    if tokenizer.chat_template is None:
        return None
    chat = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": ANSWERED}]
    try:
        text = render(tokenizer, chat, add_generation_prompt=False)
    except UserError:  # The template refuses this sample chat; a real chat that it refuses is an error when rendered.
        return None
    tail = text.rpartition(ANSWERED)[2].lstrip()
    added = {token.content: id_ for id_, token in tokenizer.added_tokens_decoder.items()}
    found = max((token for token in added if token and tail.startswith(token)), key=len, default=None)
    return None if found is None else added[found]


def stop_ids(tokenizer: PreTrainedTokenizerBase, generation_eos: int | Sequence[int] | None) -> tuple[int, ...]:
    """The tokens that end a completion, ascending: the tokenizer's EOS, the template's end of turn, and others.

    Args:
        tokenizer: With an EOS.
        generation_eos: `eos_token_id` of the model's generation config.
    """
    own = [generation_eos] if isinstance(generation_eos, int) else generation_eos or []
    found = {int(tokenizer.eos_token_id), *map(int, own)}
    if (end := controls(tokenizer).end_of_turn) is not None:
        found.add(end)
    return tuple(sorted(found))


def generation_stops(before: int | Sequence[int] | None, stops: Sequence[int]) -> int | list[int] | None:
    """The `eos_token_id` of a generation config with which `generate` and servers stop at the same tokens as stages.

    Args:
        before: The current value; returned unchanged if it names the same tokens.
        stops: The tokens that end a completion.
    """
    own = [before] if isinstance(before, int) else list(before or [])
    if set(own) == set(stops):
        return before if isinstance(before, int) else own
    return list(stops) if len(stops) > 1 else stops[0]


def decode_completions(
    tokenizer: PreTrainedTokenizerBase, completions: Iterable[Sequence[int]], stops: Sequence[int]
) -> list[str]:
    """The text of completions, without the token that ends each and without control tokens."""
    ids = [list(each[:-1] if each and each[-1] in stops else each) for each in completions]
    # For an empty list the tokenizer would return one empty text.
    return list(tokenizer.batch_decode(ids, skip_special_tokens=True)) if ids else []


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
    """The text of a chat as the template renders it.

    Raises:
        UserError: the template refuses the messages, is not valid, or takes too long.
    """
    try:
        with processor_limit(TEMPLATE_SECONDS, f"the chat template of {tokenizer.name_or_path}: to render one chat"):
            text = tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt, **template_arguments()
            )
    except TemplateSyntaxError as error:
        raise UserError(
            f"the chat template of {tokenizer.name_or_path} is not valid: line {error.lineno}: {error.message}"
        ) from error
    except TEMPLATES_FAULTS as error:
        raise UserError(
            f"the chat template of {tokenizer.name_or_path} cannot be rendered: {type(error).__name__}: {error}"
        ) from error
    except TemplateError as error:
        roles = ", ".join(str(message.get("role")) for message in messages)
        raise UserError(
            f"the chat template of {tokenizer.name_or_path} refuses messages of the roles {roles}: {error}"
        ) from error
    return str(text)


def _marked(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[Message]:
    """The messages of a prompt, with names of control tokens marked as text."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    names = controls(tokenizer).names
    return [
        {key: mark(value, names) if isinstance(value, str) else value for key, value in message.items()}
        for message in messages
    ]


def _difference(question: str, whole: str) -> str:
    """The first difference of two texts, with some context of each."""
    at = next((i for i, pair in enumerate(zip(question, whole, strict=False)) if pair[0] != pair[1]), len(whole))
    ours, theirs = (text[max(0, at - 20) : at + 20].replace(MARK, "") for text in (question, whole))
    return f"{ours!r} and {theirs!r}"
