"""The one number that a completion gives as its answer.

In this order: the last box or tag, a line `#### 72`, the last "answer is" or "Answer:" (a correction after a later
"wait" or "no" counts), the last number of the text. A completion that offers two different numbers there has none: `72
or 73`, `72, 73`, `between 70 and 74`, `72–73`, `5 pears and 72 apples`. Neither do bounds (`at least 72`), `72 ± 1` and
numbers that the text denies (`not 72`, `72 is wrong`). `about 72` and `≈ 72` are 72.
"""

import re
from collections.abc import Sequence

from experts.scoring.final_answer import framed
from experts.scoring.numbers import Stated, numbers_in, same_number, written_plainly

# Possessive and bounded, so that the time is linear in the length of the text.
_NUMBER = r"[-+]?\$?(?:\d[\d,]*+(?:\.\d++)?|\.\d++)%?"
_OPENING = r"(?:[*_`$({\[]|\\\(|\\boxed\{){0,6}"
_CLOSING = r"(?:[*_`$)}\]]|\\\)){0,6}"
_TERM = rf"{_OPENING}{_NUMBER}{_CLOSING}"
_FORMULA = rf"(?<![\w.,]){_TERM}(?:\s{{0,3}}[-+*/^=×÷]\s{{0,3}}{_TERM}){{0,20}}"
_NOT = (
    r"(?:\bnot|n['’]t|\bnever|\bcannot|\bneither|\bnor|≠|\\neq?(?![a-z])|!=|\banything\s+but|\bother\s+than"
    r"|\brather\s+than|\binstead\s+of|\bexcept|\bunlike)"
)
_DENIED = re.compile(
    rf"{_NOT}(?:\s{{1,3}}(?:be|is|equals?|equal\s+to|exactly|necessarily|really|definitely)){{0,2}}\s{{0,3}}{_FORMULA}"
    rf"(?:\s{{0,3}},?\s{{0,3}}\bn?or\s{{1,3}}{_FORMULA}){{0,5}}"
    rf"|{_FORMULA}\s{{1,3}}(?:is|was|would\s+be|can(?:not|['’]t)\s+be)\s+"
    r"(?:wrong|incorrect|false|right['’]?s?\s+not|not\b(?!\s+only))(?:\s+(?:right|correct))?",
    re.IGNORECASE,
)
# Emphasis around a number, and single marks left over.
_EMPHASIS = re.compile(r"(?<![\w*_`])([*_`]{1,3})(?=[-+$.\d])([-+$.,\d\s*/^=×÷%()]{1,200}?)\1(?![\w*_`])")
_MARKS = re.compile(
    r"(?<![\d)\s])(?:\s?\*{2,3}|\*|\s\*(?!\s))|`+|\*{1,3}(?![\d\s(*])|(?<![\w*])_{1,3}|_{1,3}(?!\w)|(?<=\d)\*{2,3}(?=\s|$)"
)
# HTML tags, and GSM8K's calculator annotations.
_TAG = re.compile(r"</?[a-z]{1,10}/?>|<<[^<>\n]{0,200}>>", re.IGNORECASE)
_HASHES = re.compile(r"^[ \t]*####(?!#)(.+)$", re.MULTILINE)
_ANSWER = re.compile(
    r"\banswers?\b[^.\n:=]{0,60}?(?:\bis\b|\bare\b|\bequals\b|\b(?:would|should|must)\s+be\b|[:=])"
    r"|\banswer\s*[-–—]?\s*(?=[-+$(\d])",
    re.IGNORECASE,
)
_SECOND_THOUGHT = re.compile(
    r"(?:^|[.,;:!?…—–(-]|\s)\s*(?:wait|actually|correction|sorry|oops|scratch\s+that|i\s+mean|on\s+second\s+thought)\b"
    r"|(?:^|[.,;:!?…—–(-])\s*(?:no(?=\s*[,.!:;—–-]|\s+(?:wait|it)\b|\s+[-$\d])|or\s+rather|rather)\b",
    re.IGNORECASE,
)
_CALLED_ANSWER = re.compile(
    r"\s(?:is|was|must\s+be)\s+(?:the|my|our)\s+(?:final\s+|right\s+|correct\s+)?answer\b", re.IGNORECASE
)
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|\n")
_MAYBE = r"(?:or|and|maybe|perhaps|possibly|also|even|rather|then|again)"
_JOINS = re.compile(
    rf"[ \t]*|\s*[,;/|&~–—]\s*(?:{_MAYBE}\s+){{0,2}}|(?:\s*[A-Za-z°%]+){{0,2}}\s*,?\s*\bor\b\s+(?:[A-Za-z]+\s+){{0,2}}"
    rf"|(?:\s*[A-Za-z°%]+){{0,2}}\s*,?\s*\band\b\s+(?:{_MAYBE}\s+)?|\s+(?:to|through|vs\.?|und|et|oder|ou|bis)\s+"
    rf"|\s*,?\s*(?:maybe|perhaps|possibly|alternatively)\s+",
    re.IGNORECASE,
)
# The derivation of a number, behind it: `72 (48 + 24)`, `540 meters a week (9 sprints * 60 meters)`.
_REMARK = re.compile(
    r"(?<=[\w%*$)])\s{1,3}\(\$?(?=\d)(?![^()\n]*\b(?:or|maybe|perhaps|possibly)\b)[^()\n=]{1,80}\s[-+*/]\s[^()\n=]{1,80}\)"
)
_OPERATOR_BEHIND_UNIT = re.compile(r"(?:\s?[^\W\d_]{1,20}[²³]?){1,3}\s{1,3}([+*/×÷])\s{1,3}\$?")
_FACTORIAL = re.compile(r"(?<=[\d)}])\s?!(?!=)")
_WRAPPING = re.compile(r"[()\[\]{}$\"'`*_\\]")
# `In 2020, 72 people came` has a comma but not two answers.
_AT_A_PLACE = re.compile(
    r"\b(?:in|on|by|at|since|after|before|step|question|problem|part|example|day|year)\s*$", re.IGNORECASE
)


def without_denied(text: str) -> str:
    """A text without tags, emphasis and the numbers it denies."""
    return _DENIED.sub(" ", _MARKS.sub(" ", _EMPHASIS.sub(r" \2 ", _TAG.sub(_instead, text))))


def _instead(tag: re.Match[str]) -> str:
    return "" if tag[0].startswith("<<") else " "


def stated_number(text: str) -> tuple[Stated, str] | None:
    """The number that a text gives as its answer, with the text it was read in; None if there is none or several.

    Args:
        text: The answer part of a completion; see `experts.scoring.final_answer.visible`.
    """
    frame = framed(text)
    if frame is not None and (denied := _DENIED.search(text)) and "\\boxed" in denied[0] and frame in denied[0]:
        return None
    plain = written_plainly(without_denied(text if frame is None else frame))
    plain = _REMARK.sub("", plain) if frame is None else _FACTORIAL.sub("!$", plain)
    found = numbers_in(plain)
    if frame is not None:
        stated = _only(plain, found)
    elif (hashes := _behind_hashes(plain)) is not None:
        plain, stated = hashes
    else:
        stated = _settled(plain, found)
    return None if stated is None or stated.value is None else (stated, plain)


def _behind_hashes(text: str) -> tuple[str, Stated | None] | None:
    """The number of the last line `#### 72`; a heading is not such a line."""
    lines = _HASHES.findall(text)
    found = numbers_in(lines[-1]) if lines else []
    if not found or lines[-1][: found[0].start].strip(" $:") or not found[0].value:
        return None
    return lines[-1], _only(lines[-1], found)


def _only(text: str, found: Sequence[Stated]) -> Stated | None:
    """The first number of a short text, if no other one is offered with it."""
    values = [stated for stated in found if not stated.is_formula]
    if not values or _offers_another(text, found, found.index(values[0]), forward=True):
        return None
    return values[0]


def _settled(text: str, found: Sequence[Stated]) -> Stated | None:
    if not found or _is_list(text):
        return None
    start = _anchor(text, found)
    if start is None:
        return _last(text, found)
    end = _sentence_end(text, start)
    inside = [stated for stated in found if start <= stated.start < end]
    if not inside:
        return _last(text, found)
    for match in reversed(list(_SECOND_THOUGHT.finditer(text, inside[0].end))):
        if later := [stated for stated in found if stated.start >= match.end()]:
            return _last(text, later)
    return _only(text[:end], inside)


def _anchor(text: str, found: Sequence[Stated]) -> int | None:
    """The position of the number in the last sentence that calls a number the answer."""
    places = [match.end() for match in _ANSWER.finditer(text)]
    places += [stated.start for stated in found if _CALLED_ANSWER.match(text, stated.end)]
    return max(places, default=None)


def _sentence_end(text: str, start: int) -> int:
    """The end of the sentence that begins at a position, skipping blank lines before it."""
    skipped = re.compile(r"[\s:=*]*").match(text, start)
    match = _SENTENCE_END.search(text, skipped.end() if skipped else start)
    return match.start() if match else len(text)


def _last(text: str, found: Sequence[Stated]) -> Stated | None:
    """The last number, if it is not one of several on offer; formulas that are not evaluated are skipped."""
    values = [stated for stated in found if not (stated.is_formula or _is_term(text, stated, found))]
    if not values or _offers_another(text, found, found.index(values[-1]), forward=False):
        return None
    return values[-1]


def _is_term(text: str, stated: Stated, found: Sequence[Stated]) -> bool:
    """Whether a number with its unit is the first term of a formula that `numbers_in` does not join: `8 ft * 9 ft`."""
    behind = _OPERATOR_BEHIND_UNIT.match(text, stated.end)
    return behind is not None and any(behind.start(1) <= other.start <= behind.end() for other in found)


def _offers_another(text: str, found: Sequence[Stated], place: int, forward: bool) -> bool:
    """Whether another value is joined to a number by a comma, "or", "and", "to" or blanks."""
    step = 1 if forward else -1
    while 0 <= place + step < len(found):
        left, right = (found[place], found[place + step])[:: 1 if forward else -1]
        if not _are_joined(text, left, right):
            return False
        other = found[place + step].value
        mine = found[place].value
        if mine is None or other is None or not same_number(mine, other):
            return True
        place += step
    return False


def _are_joined(text: str, left: Stated, right: Stated) -> bool:
    between = text[left.end : right.start]
    span = text[left.end : right.end + 1]
    # `72 (8 times 9)`, but not `72 (73)`.
    is_remark = span.count("(") > span.count(")") and not between.strip(" $(")
    if "\n" in between or is_remark:
        return False
    if not between.strip() or not _WRAPPING.sub("", between).strip():
        return True
    if "," in between and _AT_A_PLACE.search(text[: left.start]):
        return False
    return bool(_JOINS.fullmatch(_WRAPPING.sub(" ", between)))


def _is_list(text: str) -> bool:
    """Whether each of several lines is a number of its own."""
    lines = [line.strip(" \t-•.,;$") for line in text.splitlines() if line.strip()]
    values = {
        stated.value
        for line in lines
        for stated in numbers_in(line)
        if stated.start == 0 and stated.end == len(line) and stated.value is not None
    }
    alone = sum(
        1 for line in lines if (found := numbers_in(line)) and found[0].start == 0 and found[0].end == len(line)
    )
    return len(values) > 1 and alone == len(lines)
