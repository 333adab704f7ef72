"""Reads plain numbers in text in their written forms, and the value that a piece of text states.

Supported are integers, decimals, fractions and mixed numbers, powers of ten, percentages, digits in groups (`1,234`, `1
234`, `1.234,5`), `72k` and `72 million`, in any script's digits. `72.000` is 72, `72,000` is 72,000 and `72,5` is 72.5:
the English reading if there is one. Numbers in words are not read. A formula that has not been evaluated (`70 + 2`, `8
* 9`) states no value; in a chain of equations the last side that is a number counts.
"""

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

LONGEST = 1000
_SIGNS = str.maketrans({
    "\u2212": "-", "\ufe63": "-", "\u2010": "-", "\u2011": "-", "×": "*", "·": "*", "⋅": "*", "∙": "*", "÷": "/",
    "\u2044": "/", "\u2215": "/", "\u066b": ".", "\u066c": ",", "\u2019": "'", "\u00a0": " ", "\u2007": " ",
    "\u2009": " ", "\u202f": " ", "‘": "'", "“": '"', "”": '"',
})  # fmt: skip
_LATEX = [
    (re.compile(r"\\left|\\right|\\displaystyle|\\!"), ""),
    (re.compile(r"(?<=\d)!(?=\s*\\[)\]])"), "!$"),
    (re.compile(r"\\[,;:> ]|\\q?quad\b|~(?=\S)(?<=[\w}]~)"), " "),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\([$%#&{}])"), r"\1"),
    (re.compile(r"\\(?:times|cdot|ast)(?![a-z])"), "*"),
    (re.compile(r"\\div(?![a-z])"), "/"),
    (re.compile(r"\\approx(?![a-z])|\\simeq(?![a-z])"), "≈"),
    (re.compile(r"\\pm(?![a-z])"), "±"),
    (re.compile(r"\\(?:leq?|leqslant)(?![a-z])"), "≤"),
    (re.compile(r"\\(?:geq?|geqslant)(?![a-z])"), "≥"),
    (re.compile(r"\\(?:[dtc]?frac)\s*\{\s*(-?[\d.,]+)\s*\}\s*\{\s*([\d.,]+)\s*\}"), r" \1/\2 "),
    (re.compile(r"\\(?:[dtc]?frac)\s*(\d)\s*(\d)(?!\d)"), r" \1/\2 "),
    (re.compile(r"\^\s*\{?\s*\\(?:circ|degree)\s*\}?"), "°"),
    (re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|textrm)\s*\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"\\[()\[\]]"), " "),
]
_MINUS_FRACTION = re.compile(r"([-−])\s+(?=\d+/\d+ )")
_SUPERSCRIPTS = re.compile(r"(?<=[\w)}])([⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+)")

# Groups are never possessive: Python before 3.11.5 keeps the text that a failed repetition had consumed (gh-106052).
_DECIMAL = (
    r"(?:(?<!\d )\d{1,3}(?:[ ']\d{3})+(?:[.,]\d++)?(?![ ']?\d)"  # 1 234 567,8
    r"|\d++(?:[.,'_]\d++)*|\.\d++)"
)
_POWER = r"(?:[eE][-+]?\d{1,4}(?!\w)|\s?\*\s?10\s?(?:\^|\*\*)\s?[({]?-?\d{1,4}[)}]?)"
_ATOM = rf"[-+]?[(\[{{]{{0,3}}[-+]?[$€£¥₹]?[-+]?{_DECIMAL}{_POWER}?[)\]}}]{{0,3}}(?:\s?(?:%|percent\b|pct\b))?"
_OPERATOR = r"(?:\s?(?:\*\*|==?|!=|<=|>=|[-+*/^<>≤≥≠≈])\s?)"
_FORMULA = re.compile(
    rf"(?<![\w\\])(?<![A-Za-z_]-)(?<!\d[.,:]){_ATOM}(?:\s{{0,2}}{_OPERATOR}\s{{0,2}}{_ATOM}|\s\d+\s?/\s?\d+){{0,30}}",
    re.IGNORECASE,
)
_WHOLE = re.compile(
    rf"(?P<outer>[-+]?)[(\[{{]*(?P<sign>[-+]?)[$€£¥₹]?(?P<sign2>[-+]?)(?:(?P<whole>\d+)\s(?=\d+\s?/))?(?P<number>{_DECIMAL})(?P<power>{_POWER})?"
    rf"[)\]}}]*(?:\s*/\s*[({{]*(?P<below>{_DECIMAL})[)}}]*)?\s?(?P<percent>%|percent|pct)?[)\]}}]*",
    re.IGNORECASE,
)
_POWER_OF_TEN = re.compile(r"[({]*(?P<sign>[-+]?)10\s?(?:\^|\*\*)\s?[({]?(?P<exponent>[-+]?\d{1,4})[)}]*")
_MAGNITUDES = {
    "k": 10**3, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12,
}  # fmt: skip
_MAGNITUDE = re.compile(r"(?:k|\s{0,2}(?:hundred|thousand|million|billion|trillion))(?![A-Za-z])", re.IGNORECASE)
# One letter behind a number is a unit or a variable.
_UNITS = "mshglLtCKFNVAWJ"
_VARIABLE = re.compile(
    rf"(?![{_UNITS}](?![A-Za-z]))[A-Za-z](?![A-Za-z])|\s[xyz](?![A-Za-z])|\s?(?:π|\\?pi\b|√|\\[a-z]*sqrt)|_"
)
# The number belongs to a formula with a variable: `x^5`, `x + 5`, `\\frac{x}{5}`, `f(5)`, `\\log_2 5`.
_INSIDE = re.compile(
    r"(?:\^|[A-Za-z)}\]]\s*[*/+]|(?:(?<![A-Za-z])[A-Za-z]|[)}])\s*-)\s*[({]*$|(?<![A-Za-z])[A-Za-z]\($"
    r"|(?:\\[A-Za-z]{1,10}|\blog)_(?:\{[^{}]*\}|\w)\s*[({]*$"
)
# `2^x`, `5 + x`, `5/x`, `5 - x`, `5 t^2`, and a factorial between the signs around mathematics.
_GOES_ON = re.compile(
    r"\s?\^|\s?[+*]\s?(?:\\[a-z]|[A-Za-z](?![A-Za-z]))|\s?/\s?(?![hsdmL](?!\w))[A-Za-z](?![A-Za-z])"
    r"|\s?-\s?[b-hj-z](?![A-Za-z])|\s?(?!m)[A-Za-z]\s?\^|!\s*\$"
)
_UNIT_POWER = re.compile(
    r"(?<=\s)([kcdm]?m|ft|in|yd|mi|units?|feet|inch(?:es)?|met(?:er|re)s?)\s?\^\s?[({]?[23][)}]?(?=[\s.$]*$)"
)
_OPEN_END = re.compile(
    r"[‰:]\d?|\s?(?:±|\+/?-)|\+(?!\d)|\s(?:or|and)\s(?:more|less|fewer|above|over|below|higher|lower|up)\b"
)
_FUNCTION = re.compile(
    r"(?:√|\b(?:sqrt|root|log|ln|exp|sin|cos|tan|max|min|gcd|lcm)\s?|\\[A-Za-z]+\s?(?:\[\d*\])?)[({\[]*$"
)
_BOUND = re.compile(
    r"(?:(?<![-=])>|<|≤|≥|≠|±|\+-|\b(?:at least|at most|(?:more|less|greater|fewer|larger|smaller) than|up to)"
    r"(?:\s(?:or equal to|about))?)\s*[$€£]?$",
    re.IGNORECASE,
)
_NEGATIVE = re.compile(r"\b(?:minus|negative)\s+[$€£]?$", re.IGNORECASE)
_APART = re.compile(r"(?P<before>[^\s]?)[ \t]*[-\u2013]\s+$")


@dataclass(frozen=True, slots=True)
class Stated:
    """A number or formula in a text.

    Attributes:
        start: Its position in the text.
        end: The position behind it.
        value: None if it is not a number: a formula that is not evaluated, a bound, a number with a variable.
        percent: Whether the value was written as a percentage.
        is_formula: Whether it has no value only because it is not evaluated.
        fraction: The text of a fraction; empty for other numbers.
    """

    start: int
    end: int
    value: Fraction | None
    percent: bool = False
    is_formula: bool = False
    fraction: str = ""


def written_plainly(text: str) -> str:
    """The text with ASCII digits and signs, and without LaTeX around numbers."""
    text = with_plain_signs(text)
    if "\\" in text or "~" in text or "{,}" in text:
        for pattern, replacement in _LATEX:
            text = pattern.sub(replacement, text)
        text = _MINUS_FRACTION.sub("-", text)
    return text


def with_plain_signs(text: str) -> str:
    """The text with ASCII digits and signs."""
    if not text.isascii():
        text = _SUPERSCRIPTS.sub(lambda match: f"^({unicodedata.normalize('NFKC', match[1])})", text)
        text = "".join(map(_ascii, text)).translate(_SIGNS)
        text = re.sub(r"(\S?)([ \t]*)\u2013(?=[$€£]?[\d.])", _dash, text)
    return text


def numbers_in(text: str) -> list[Stated]:
    """All numbers and formulas of a text that is `written_plainly`, in order."""
    return [_stated(text, match) for match in _FORMULA.finditer(text)]


def whole_number(text: str) -> Stated | None:
    """The number that makes up a text, apart from a unit in words and signs around it; None for any other text."""
    if len(text) > LONGEST:
        return None
    text = _UNIT_POWER.sub(r"\1", written_plainly(text)).strip().strip("$*`\"'").strip()
    found = numbers_in(text)
    if len(found) != 1 or found[0].value is None:
        return None
    rest = text[: found[0].start] + " " + text[found[0].end :]
    return found[0] if re.fullmatch(r"[\s$€£¥₹°.]*(?:[A-Za-z]{1,20}[\s.]*){0,3}", rest) else None


def same_number(left: Fraction, right: Fraction) -> bool:
    """Equality; non-integers are compared to six decimals, because a fraction may be written as a decimal."""
    if left == right or 1 in (left.denominator, right.denominator):
        return left == right
    apart = abs(left - right)
    return apart < Fraction(1, 2_000_000) and apart * 100_000 < min(abs(left), abs(right))


def _stated(text: str, match: re.Match[str]) -> Stated:
    start, end = match.span()
    before, behind = text[max(0, start - 40) : start], text[end : end + 40]
    value, percent, fraction, is_formula = _evaluated(match[0])
    # A pair or an interval, not a decimal comma.
    is_pair = match[0][0] in "([{" and re.fullmatch(r"\D*\d+,\d+\D*", match[0]) is not None
    nothing = Stated(start, end, None)
    if (
        is_pair
        or _BOUND.search(before)
        or _FUNCTION.search(before)
        or before[-1:] == "|"
        or (match[0][0] in "([{" and before[-1:].isalpha())
    ):
        return nothing
    is_group = match[0][0] == "{" and before[-1:] == "}"
    if value is not None and (_GOES_ON.match(behind) or ("=" not in match[0] and (is_group or _INSIDE.search(before)))):
        return Stated(start, end, None, is_formula=True)
    if magnitude := _MAGNITUDE.match(behind):
        value = None if value is None else value * _MAGNITUDES[magnitude[0].strip().lower()]
        end += magnitude.end()
        behind = behind[magnitude.end() :]
    if _VARIABLE.match(behind) or _OPEN_END.match(behind):
        return nothing
    if is_formula or value is None:
        return Stated(start, end, None, is_formula=is_formula)
    sign = _sign(before)
    return Stated(start, end, value * sign, percent, fraction=fraction) if sign else nothing


def _sign(before: str) -> int:
    """The sign that a word or a detached dash gives a number: 1, -1, or 0 if it is unclear."""
    if negative := _NEGATIVE.search(before):
        return 0 if before[: negative.start()].rstrip()[-1:].isdigit() else -1
    apart = _APART.search(before)
    if apart is None:
        return 1
    if apart["before"] in ("=", "(", "$"):
        return -1
    # A dash that begins a line is a sign or a bullet.
    return 1 if apart["before"] else 0


def _evaluated(formula: str) -> tuple[Fraction | None, bool, str, bool]:
    """Value, whether it is a percentage, the text of a fraction, and whether the formula is not evaluated."""
    if re.search(r"[<>≤≥≠]|!=", formula):
        return None, False, "", False
    sides = [side.strip() for side in re.split(r"==?|≈", formula)]
    for side in reversed(sides):
        if (power := _POWER_OF_TEN.fullmatch(side)) is not None:
            value = _ten_to(int(power["exponent"]))
            return (-value if power["sign"] == "-" else value), False, "", False
        found = _WHOLE.fullmatch(side)
        if found is not None and (value_of := _value(found)) is not None:
            return value_of, found["percent"] is not None, side if found["below"] else "", False
    return None, False, "", bool(re.search(r"[-+*/^=]", formula.lstrip("-+$([{")))


def _value(found: re.Match[str]) -> Fraction | None:
    value, below = _decimal(found["number"]), found["below"]
    if value is None:
        return None
    if found["power"]:
        digits = re.findall(r"[-+]?\d+", found["power"])[-1]
        value *= _ten_to(int(digits))
    if below is not None:
        divisor = _decimal(below)
        if not divisor:
            return None
        value /= divisor
    if found["whole"] is not None:
        if below is None or value >= 1:
            return None
        value += int(found["whole"])
    if found["percent"]:
        value /= 100
    signs = [found["outer"], found["sign"], found["sign2"]]
    return -value if signs.count("-") % 2 else value


def _decimal(text: str) -> Fraction | None:
    """The value of digits with their separators; None if these are inconsistent."""
    if len(text) > LONGEST:
        return None
    if re.fullmatch(r"\d{1,3}(?:[ '_]\d{3})+(?:[.,]\d+)?", text):
        text = re.sub(r"[ '_]", "", text).replace(",", ".")
    elif re.fullmatch(r"[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?|[1-9]\d?(?:,\d{2})+,\d{3}(?:\.\d+)?", text):
        text = text.replace(",", "")
    elif re.fullmatch(r"\d{1,3}(?:\.\d{3})+,\d+|\d{1,3}(?:\.\d{3}){2,}", text):
        text = text.replace(".", "").replace(",", ".")
    elif re.fullmatch(r"\d+,\d+", text):
        text = text.replace(",", ".")
    elif re.fullmatch(r"\d+(?:_\d+)+", text):
        text = text.replace("_", "")
    return Fraction(text) if re.fullmatch(r"\d*\.?\d+", text) else None


def _ten_to(exponent: int) -> Fraction:
    exponent = max(-LONGEST, min(LONGEST, exponent))
    return Fraction(10) ** exponent


def _ascii(character: str) -> str:
    """A digit or full-width sign in ASCII, a fraction such as ½ as `1/2`."""
    if character.isascii():
        return character
    if unicodedata.category(character) == "Nd":
        return str(unicodedata.decimal(character))
    if "\uff01" <= character <= "\uff5e":
        return chr(ord(character) - 0xFEE0)
    if unicodedata.decomposition(character).startswith("<fraction>"):
        return " " + unicodedata.normalize("NFKD", character)
    return character


def _dash(match: re.Match[str]) -> str:
    """An en dash before a number: a range behind a number, else a minus sign."""
    return f"{match[1]} to " if match[1] and (match[1].isalnum() or match[1] in "%)") else f"{match[1]}{match[2]}-"
