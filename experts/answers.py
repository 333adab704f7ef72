"""Comparing free text with a gold answer: as a value (math-verify), or as the letter of a choice."""

import logging
import re
import string
from collections.abc import Sequence
from typing import Any

from experts.untrusted import VALUES, VerifierError

_STATED_LETTER = re.compile(r"\b(?i:answer)(?:\s+is)?\s*:?\s*[*$({\[]*([A-Z])\b")
_BOXED_LETTER = re.compile(r"\\boxed\{\s*(?:\\text\{)?\s*([A-Za-z])\s*\}")
_LEADING_LETTER = re.compile(r"[*(\[]*([A-Za-z])[*)\]]*(?:[.:,]|\s*$|\s*\n)|\(([A-Za-z])\)")

logger = logging.getLogger(__name__)


def same_value(completion: str, gold: str) -> bool:
    """Whether a completion states the gold number or formula (math-verify: the last one it finds counts).

    Text in which math-verify finds nothing is wrong, as is text that takes it longer than `untrusted.SECONDS`: it
    computes what it reads, a tower of powers for hours, and therefore runs in a process that can be ended.
    """
    return _told("same_value", {"completion": completion, "gold": gold})


def has_value(gold: str) -> bool:
    """Whether math-verify finds a number or formula in a gold answer."""
    return bool(re.fullmatch(r"\s*-?\d[\d,]*(\.\d+)?\s*", gold)) or _told("has_value", {"text": gold})


def lettered(choices: Sequence[str]) -> str:
    """The choices as lines `A. …`, `B. …`."""
    return "\n".join(f"{letter}. {choice}" for letter, choice in zip(string.ascii_uppercase, choices, strict=False))


def gold_letter(gold: Any, choices: Sequence[str], labels: Sequence[str] = ()) -> str | None:
    """The letter of the right choice, from its text, its label in the data set, its index or its letter.

    They are tried in this order, so that choices which are digits or letters themselves keep their meaning as text.
    """
    letters = string.ascii_uppercase[: len(choices)]
    if isinstance(gold, bool) or not isinstance(gold, int | str):
        return None
    if isinstance(gold, str):
        for names in (choices, labels):
            if gold in names:
                return letters[names.index(gold)]
        if gold.strip().upper() in letters and len(gold.strip()) == 1:
            return gold.strip().upper()
        if not gold.strip().isdecimal():
            return None
    index = int(gold)
    return letters[index] if 0 <= index < len(letters) else None


def chosen_letter(completion: str, choices: Sequence[str]) -> str | None:
    """The letter a completion settles on, or None: a boxed or stated letter, a leading one, or a choice's own text."""
    text = completion.strip()
    for stated in (_BOXED_LETTER.findall(text), _STATED_LETTER.findall(text)):
        if stated:
            return str(stated[-1]).upper()
    leading = _LEADING_LETTER.match(text)
    if leading:
        return (leading.group(1) or leading.group(2)).upper()
    return gold_letter(text, choices) if text in choices else None


def _told(verifier: str, arguments: dict[str, str]) -> bool:
    try:
        return bool(VALUES.ask(verifier, arguments))
    except VerifierError as error:
        logger.debug("math-verify refused a text: %s", error)
        return False
