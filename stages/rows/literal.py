"""Tokenises data that contains a control token's characters as text.

A tokenizer replaces the characters of a control token by its id everywhere. So such characters in data are marked
before the template is rendered. A second tokenizer, whose control tokens have other names, encodes the rendered text:
the template's control tokens are renamed for it, those in data are not. It is built only if data contains such
characters.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from base.errors import UserError

# Private code points: no text contains them, no template reads them, and normalisation keeps them.
MARK, NAME = "\uf8fe", "\uf8fd"

_twins: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[Mapping[str, int], Tokenizer]] = WeakKeyDictionary()


def mark(text: str, names: Iterable[str]) -> str:
    """The text with a mark inside each name of a control token.

    Args:
        text: A text from data.
        names: The names of the control tokens.
    """
    if not any(name in text for name in names):
        return text
    # A name may begin within another, so a mark follows each name's first character.
    starts = sorted({match.start() for name in names for match in re.finditer(f"(?={re.escape(name)})", text)})
    cuts = [0, *(start + 1 for start in starts), len(text)]
    return MARK.join(text[first:last] for first, last in pairwise(cuts))


def encode(
    tokenizer: PreTrainedTokenizerBase, text: str, names: Mapping[str, int], *, add_special_tokens: bool = False
) -> list[int]:
    """Token ids of a text; marked names of control tokens are encoded as text, others as control tokens.

    Args:
        tokenizer: The tokenizer.
        text: Rendered from marked messages.
        names: The control tokens' ids by name.
        add_special_tokens: Whether the tokenizer adds BOS and EOS according to its settings.

    Raises:
        UserError: the text has marked names, and this tokenizer cannot encode them as text.
    """
    if MARK not in text:
        return list(tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])
    cached = _twins.get(tokenizer)
    if cached is None or cached[0] != names:
        cached = _twins[tokenizer] = (names, _twin(tokenizer, names))
    pattern = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    renamed = re.sub(pattern, lambda match: _renamed(match.group()), text).replace(MARK, "")
    return list(cached[1].encode(renamed, add_special_tokens=add_special_tokens).ids)


def encode_all(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], names: Mapping[str, int]) -> list[list[int]]:
    """Token ids of each text, as `encode` gives them without BOS and EOS; texts without marks are one batch."""
    plain = [text for text in texts if MARK not in text]
    batch = iter(tokenizer(plain, add_special_tokens=False, return_attention_mask=False)["input_ids"] if plain else [])
    return [encode(tokenizer, text, names) if MARK in text else list(next(batch)) for text in texts]


def _renamed(name: str) -> str:
    return f"{NAME}{name}{NAME}"


def _twin(tokenizer: PreTrainedTokenizerBase, names: Mapping[str, int]) -> Tokenizer:
    """The same tokenizer with other names for its control tokens."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            f"the data contains control tokens of the tokenizer {tokenizer.name_or_path}, one of {', '.join(names)}; "
            f"{type(tokenizer).__name__} cannot encode them as text; remove such rows"
        )
    written: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in written["added_tokens"]:
        if token["content"] in names:
            token["content"] = _renamed(token["content"])
    model = written["model"]
    words = model.get("vocab")
    if isinstance(words, dict):
        model["vocab"] = {_renamed(word) if word in names else word: id_ for word, id_ in words.items()}
    elif isinstance(words, list):
        model["vocab"] = [[_renamed(word) if word in names else word, score] for word, score in words]
    if model.get("unk_token") in names:
        model["unk_token"] = _renamed(model["unk_token"])
    if "merges" in model:
        model["merges"] = [pair for pair in model["merges"] if not {*_halves(pair), "".join(_halves(pair))} & {*names}]
    twin = Tokenizer.from_str(json.dumps(written))
    if wrong := [name for name, id_ in names.items() if twin.token_to_id(_renamed(name)) != id_]:
        raise UserError(
            f"the data contains control tokens of the tokenizer {tokenizer.name_or_path}, and {wrong[0]!r} cannot be "
            f"encoded as text; remove such rows"
        )
    return twin


def _halves(pair: str | list[str]) -> list[str]:
    return pair.split(" ") if isinstance(pair, str) else pair
