"""Comparing free text with gold answers, as values or as text."""

import logging
import unicodedata
from collections.abc import Sequence

from experts.isolation.untrusted import PATTERNS, VALUES, VerifierError, VerifierLostError
from experts.scoring.final_answer import ZERO_WIDTH, without_thoughts
from experts.scoring.numbers import whole_number

logger = logging.getLogger(__name__)

_BREAKS = str.maketrans({"\u00a0": " ", "\u202f": " "})


def same_text(completion: str, golds: Sequence[str]) -> bool:
    """Whether a completion is one of the gold answers.

    The comparison ignores thoughts before the answer, white space and zero-width characters around it, the form of line
    ends and no-break spaces, and Unicode's form (NFC, NFD). Case, punctuation, quotes and fences count. An empty text
    is no answer and matches no gold answer.
    """
    given = _composed(completion)
    return bool(given) and any(given == _composed(gold) for gold in golds)


def is_blank(gold: str) -> bool:
    """Whether a gold answer is empty after normalisation."""
    return not _composed(gold)


def same_value(completion: str, golds: Sequence[str], question: str = "") -> bool:
    """Whether a completion states one of the gold numbers or formulas; see `experts.scoring.values`.

    sympy evaluates what it reads, which takes hours for a tower of powers, so it runs in a process that can be ended.

    Raises:
        VerifierLostError: that process ended or took longer than `untrusted.SECONDS`.
    """
    return _asked("same_value", {"completion": completion, "golds": list(golds), "question": question})


def has_value(gold: str) -> bool:
    """Whether a gold answer contains a number or formula.

    Raises:
        VerifierLostError: see `same_value`.
    """
    return whole_number(gold) is not None or _asked("has_value", {"text": gold})


def last_match(pattern: str, completion: str) -> str | None:
    """The group of the last match of a pattern in a completion; None without a match.

    A pattern may run forever on a text that its author did not foresee, so it runs in a process that can be ended.

    Raises:
        VerifierLostError: that process ended or took longer than `untrusted.SECONDS`.
    """
    span = PATTERNS.ask("last_span", {"pattern": pattern, "text": completion})
    return None if span is None else completion[slice(*span)]


def _composed(text: str) -> str:
    answer = without_thoughts(text).replace("\r\n", "\n").translate(_BREAKS)
    while answer != (answer := answer.strip().strip(ZERO_WIDTH)):
        pass
    return unicodedata.normalize("NFC", answer)


def _asked(verifier: str, arguments: dict[str, str | list[str]]) -> bool:
    try:
        return bool(VALUES.ask(verifier, arguments))
    except VerifierLostError:
        raise
    except VerifierError as error:
        logger.debug("math-verify refused a text: %s", error)
        return False
