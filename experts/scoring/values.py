"""Compares the number or formula of a completion with gold ones.

A gold answer that is a plain number (`72`, `1/2`, `$1,234.50`, `72%`, `3 hours`) is compared with the one number that
the completion settles on (`experts.scoring.stated_number`), by value. Units and currencies are not compared. An
unevaluated formula is no answer to such a question: `70 + 2` and `\\sqrt{5184}` are not 72, and a fraction that occurs
in the question is not its answer. A percentage is its value (72% is 0.72) if the gold answer has no `%`; if it has one,
`72%`, `72` and `0.72` are right.

Any other gold answer is a formula and is compared by math-verify, without denied numbers. A completion that offers two
formulas by "or", or repeats one of the question's, is wrong. Only `experts.isolation.untrusted_worker` imports this
module, because sympy evaluates what it reads.
"""

import re
from collections.abc import Sequence
from typing import Any

from math_verify import parse, verify
from math_verify.grader import get_pct_val

from experts.scoring.final_answer import framed, visible
from experts.scoring.numbers import Stated, same_number, whole_number, with_plain_signs
from experts.scoring.stated_number import stated_number, without_denied

_LATEX = re.compile(r"[\\^_={}()+*/]|\d")
_OR = re.compile(r"\s(?:or|oder|ou)\s|\\text\s*\{\s*or\s*\}", re.IGNORECASE)
# Without words, except those of LaTeX.
_BARE = re.compile(r"(?:[^$\nA-Za-z]|\\[A-Za-z]+|(?<![A-Za-z])[A-Za-z](?![A-Za-z])){1,300}")
_UNIT = re.compile(r"\\(?:text|textrm|mathrm|mbox)\s*\{(?!\s*(?:and|or)\b)[^{}]*\}(?:\s*\^\s*\{?\d\}?)?")
_MARKED = re.compile(r"\$|\\[(\[]|\\boxed")
_TIME = re.compile(r"\d\s*(?:\\text\s*\{)?\s*:\s*\}?\s*\d")
_OPERATION = re.compile(r"[-+*/^=\\]")


def has_value(text: str) -> bool:
    """Whether a gold answer contains a number or formula."""
    return whole_number(text) is not None or bool(_gold(text))


def same_value(completion: str, golds: Sequence[str], question: str = "") -> bool:
    """Whether a completion states one of the gold numbers or formulas.

    Args:
        completion: The text to score.
        golds: Right answers.
        question: The prompt, parts of which do not count as an answer.
    """
    text = visible(completion)
    asked = _squeezed(question)
    if not text.strip() or (_squeezed(text) == asked and _squeezed(text) not in map(_squeezed, golds)):
        return False
    plain = {gold: number for gold in golds if (number := whole_number(gold)) is not None}
    if plain and (found := stated_number(text)) is not None:
        stated, _ = found
        if any(_same_number(stated, gold, number, asked) for gold, number in plain.items()):
            return True
    formulas = [gold for gold in golds if gold not in plain]
    return bool(formulas) and _same_formula(text, formulas, asked)


def _same_number(stated: Stated, gold: str, right: Stated, asked: str) -> bool:
    assert stated.value is not None and right.value is not None
    fraction = _squeezed(stated.fraction)
    if fraction and fraction not in _squeezed(gold) and _holds(asked, fraction):
        return False
    if right.percent and not stated.percent:
        return same_number(stated.value, right.value * 100) or same_number(stated.value, right.value)
    return same_number(stated.value, right.value)


def _same_formula(text: str, golds: Sequence[str], asked: str) -> bool:
    frame = framed(text)
    if frame is not None:
        text = frame if "$" in frame else f"${frame}$"
    parts = [text]
    if not any(_OR.search(gold) for gold in golds):
        sentence = text.strip().splitlines()[-1] if text.strip() else ""
        parts = [text, *_OR.split(sentence)] if _OR.search(sentence) else parts
    stated = [found for part in parts if (found := _formula(without_denied(part)))]
    echo = _squeezed(text)
    if _OPERATION.search(echo) and len(echo) > 2 and echo in asked and echo not in map(_squeezed, golds):
        return False
    return bool(stated) and any(all(_same(one, _gold(gold)) for one in stated) for gold in golds)


def _formula(text: str) -> list[Any]:
    """The result of math-verify for a text; a bare formula is passed as LaTeX, or it would be read only in part."""
    bare = with_plain_signs(text).strip().rstrip(".").replace("∞", "\\infty")
    bare = re.sub(r"\bsqrt\s?\(([^()]*)\)", r"\\sqrt{\1}", re.sub(r"(?<!\\)\bpi\b", r"\\pi", bare))
    bare = _UNIT.sub("", bare) if _UNIT.sub("", bare).strip() else bare
    is_bare = _BARE.fullmatch(bare) and _LATEX.search(bare)
    return (_parsed(f"${bare}$") if is_bare else []) or _parsed(text)


def _gold(text: str) -> list[Any]:
    """A gold answer as read by math-verify, with or without signs around its LaTeX; empty if it reads only a part."""
    if _TIME.search(text):
        return []
    if _MARKED.search(text):
        return _parsed(text)
    found = _formula(text)
    if "\\" in text and (not found or _is_part(text, found)):
        return _parsed(f"${text}$")
    return [] if _is_part(text, found) else found


def _is_part(text: str, found: list[Any]) -> bool:
    """Whether only a part was read: the text has more digits or signs than the formula."""
    read = found[-1] if found and isinstance(found[-1], str) else ""
    bare = re.sub(r"(?<!\\)\bpi\b", r"\\pi", with_plain_signs(text))
    rest = bare.replace(read, " ", 1) if read and read in bare else ""
    return re.search(r"[\d\\^=*/+]", _UNIT.sub("", rest)) is not None


def _same(stated: list[Any], gold: list[Any]) -> bool:
    if _is_percentage(stated) and not _is_percentage(gold):
        # Without the second entry, which is only the number's text.
        stated = [value.doit() for value in stated if not isinstance(value, str)]
    return bool(verify(gold, stated, timeout_seconds=None))


def _is_percentage(found: list[Any]) -> bool:
    return any(get_pct_val(value) is not None for value in found)


def _parsed(text: str) -> list[Any]:
    # The library's own time limit is off: the parent's also ends a single long operation in C.
    return list(parse(text, parsing_timeout=None))


def _squeezed(text: str) -> str:
    """A text without white space and the signs around formulas."""
    return re.sub(r"[\s$]", "", text).strip(".?!:").casefold()


def _holds(question: str, fraction: str) -> bool:
    return re.search(rf"(?<!\d){re.escape(fraction)}(?!\d)", question) is not None
