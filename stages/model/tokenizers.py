"""Whether two tokenizers agree on tokens, and whether a tokenizer fits a model's embedding."""

from collections.abc import Mapping

from transformers import PreTrainedTokenizerBase

from base.errors import UserError
from experts.domain import Prompt
from stages.rows.chat import encode_demonstration

_USER = {"role": "user", "content": "What is 2 + 2?"}
# Chats on which two tokenizers are compared.
CHATS: tuple[Prompt, ...] = (
    "What is 2 + 2?",
    [{"role": "system", "content": "Be brief."}, _USER],
    [_USER, {"role": "assistant", "content": "4"}, {"role": "user", "content": "And 3 + 3?"}],
)


def tokenizer_difference(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase) -> str | None:
    """The first difference of two tokenizers that must agree on tokens; None if there is none.

    The vocabulary and the tokens of a few chats with their ends are compared. A comment in a template, or another pad
    token, is no difference.
    """
    mine, other = ours.get_vocab(), theirs.get_vocab()
    if mine != other:
        odd = sorted(set(mine.items()) ^ set(other.items()), key=lambda item: item[1])[:3]
        return f"vocabularies of {len(mine)} and {len(other)} tokens, for example {odd}"
    for chat in CHATS:
        if (mine_ids := _read(ours, chat)) != (other_ids := _read(theirs, chat)):
            kind = "chat_template" if ours.chat_template != theirs.chat_template else "tokens"
            texts = (repr(ours.decode(ids)) if ids else "a refusal" for ids in (mine_ids, other_ids))
            return f"{kind}: the same chat becomes {' and '.join(texts)}"
    return None


def _read(tokenizer: PreTrainedTokenizerBase, chat: Prompt) -> list[int] | None:
    """The tokens of a chat with an answer; None if the template refuses it."""
    try:
        return [token for part in encode_demonstration(tokenizer, chat, "the answer") for token in part]
    except UserError:
        return None


def tokens_beyond(vocabulary: Mapping[str, int], rows: int) -> str | None:
    """A message on tokens without an embedding; None if every token has one.

    Args:
        vocabulary: Token -> id.
        rows: Rows of the model's embedding.
    """
    beyond = sorted((id_, token) for token, id_ in vocabulary.items() if id_ >= rows)
    if not beyond:
        return None
    id_, token = beyond[0]
    return (
        f"its tokenizer has {len(beyond)} tokens beyond the {rows} rows of the model's embedding, the first {token!r} "
        f"with id {id_}; resize the embedding, or use the tokenizer the model was trained with"
    )
