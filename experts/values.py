"""Compares the number or formula of a text with gold ones, as math-verify does, with three differences.

A percentage is compared by its value where the gold answer has no `%`: 72% is 0.72 and not 72. A number that the text
denies ("not 72", "72 is wrong") is not its answer. Numbers in italics, code or `<answer>` tags are read, as the library
reads those in bold. Only `experts.untrusted_worker` imports this module, because sympy computes what it reads.
"""

import re
from collections.abc import Sequence
from typing import Any

from math_verify import parse, verify
from math_verify.grader import get_pct_val

# Possessive and bounded, so that no text costs more than its length.
_NUMBER = r"[-+]?\$?(?:\d[\d,]*+(?:\.\d++)?+|\.\d++)%?"
_OPENING = r"(?:[*_`$({\[]|\\\(|\\boxed\{){0,6}"
_CLOSING = r"(?:[*_`$)}\]]|\\\)){0,6}"
_TERM = rf"{_OPENING}{_NUMBER}{_CLOSING}"
_FORMULA = rf"(?<![\w.,]){_TERM}(?:\s{{0,3}}[-+*/^=×÷]\s{{0,3}}{_TERM}){{0,20}}"
_NOT = r"(?:\bnot|n['’]t|\bnever|\bneither|\bnor|≠|\\neq?(?![a-z])|!=)"
_DENIED = re.compile(
    rf"{_NOT}(?:\s{{1,3}}(?:be|is|equals?|equal\s+to|exactly))?\s{{0,3}}{_FORMULA}"
    rf"|{_FORMULA}\s{{1,3}}(?:is|was|would\s+be)\s+(?:wrong|incorrect|false|not\s+(?:right|correct|the|an?)\b)",
    re.IGNORECASE,
)
# The library reads bold, and none of its siblings.
_EMPHASIS = re.compile(r"(?<![\w*_`])([*_`]{1,3})(?=[-+$.\d])([-+$.,\d\s*/^=×÷%()]{1,200}?)\1(?![\w*_`])")
_TAG = re.compile(r"</?(?:answer|b|strong|i|em|u|code)>", re.IGNORECASE)


def has_value(text: str) -> bool:
    """Whether math-verify finds a number or formula in a text."""
    return bool(_parsed(text))


def same_value(completion: str, golds: Sequence[str]) -> bool:
    """Whether a completion states one of the gold numbers or formulas (the last that math-verify finds counts)."""
    stated = _parsed(_DENIED.sub(" ", _EMPHASIS.sub(r" \2 ", _TAG.sub(" ", completion))))
    return bool(stated) and any(_same(stated, _parsed(gold)) for gold in golds)


def _same(stated: list[Any], gold: list[Any]) -> bool:
    if _is_percentage(stated) and not _is_percentage(gold):
        # Without its second entry, the text of the number alone.
        stated = [value.doit() for value in stated if not isinstance(value, str)]
    return bool(verify(gold, stated, timeout_seconds=None))


def _is_percentage(found: list[Any]) -> bool:
    return any(get_pct_val(value) is not None for value in found)


def _parsed(text: str) -> list[Any]:
    # The library's own time limit is off: the parent's also ends a single long operation in C.
    return list(parse(text, parsing_timeout=None))
