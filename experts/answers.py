"""Comparing free text with gold answers, as values (math-verify) or as text."""

import logging
import re
import unicodedata
from collections.abc import Sequence

from experts.untrusted import PATTERNS, VALUES, VerifierError, VerifierLostError

logger = logging.getLogger(__name__)

_PLAIN_NUMBER = re.compile(r"\s*-?\d[\d,]*(\.\d+)?\s*")


def same_text(completion: str, golds: Sequence[str]) -> bool:
    """Whether a completion is one of the gold answers, outer white space and Unicode's form (NFC, NFD) ignored."""
    given = _composed(completion)
    return any(given == _composed(gold) for gold in golds)


def same_value(completion: str, golds: Sequence[str]) -> bool:
    """Whether a completion states one of the gold numbers or formulas; see `experts.values`.

    math-verify computes what it reads, a tower of powers for hours, and therefore runs in a process that can be ended.

    Raises:
        VerifierLostError: that process ended or took longer than `untrusted.SECONDS`.
    """
    return _asked("same_value", {"completion": completion, "golds": list(golds)})


def has_value(gold: str) -> bool:
    """Whether math-verify finds a number or formula in a gold answer.

    Raises:
        VerifierLostError: see `same_value`.
    """
    return bool(_PLAIN_NUMBER.fullmatch(gold)) or _asked("has_value", {"text": gold})


def last_match(pattern: str, completion: str) -> str | None:
    """The group of the last match of a pattern in a completion; None where it matches nowhere.

    A pattern may take for ever on a text that its author never saw, so it runs in a process that can be ended.

    Raises:
        VerifierLostError: that process ended or took longer than `untrusted.SECONDS`.
    """
    span = PATTERNS.ask("last_span", {"pattern": pattern, "text": completion})
    return None if span is None else completion[slice(*span)]


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text.strip())


def _asked(verifier: str, arguments: dict[str, str | list[str]]) -> bool:
    try:
        return bool(VALUES.ask(verifier, arguments))
    except VerifierLostError:
        raise
    except VerifierError as error:
        logger.debug("math-verify refused a text: %s", error)
        return False
