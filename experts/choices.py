"""Multiple choice: the choices as letters, and the letter that a completion settles on."""

import itertools
import re
import string
import unicodedata
from collections.abc import Iterator, Sequence

# Characters after "answer" within which its letter is looked for.
REACH = 120

_OPENING = r"[\s*_`\"'“‘$(\[{<>]*+(?:\\(?:text|mathrm|mathbf|textbf)\{)?[\s*_`\"'(\[]*+"
_CLOSING = r"[\s*_`\"'”’$)\]}<>.,:;!]*+"
_LONE = re.compile(rf"{_OPENING}(?:(?:option|choice|answer)[\s:]+)?{_OPENING}([A-Za-z]){_CLOSING}", re.IGNORECASE)
_BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")
_TAGS = re.compile(r"<(/?)answer>", re.IGNORECASE)
_ANCHOR = re.compile(
    r"(?i:\banswers?\b|\bchoose\b|\bpick\b|\bselect\b|\bgo\s+with\b|\bantwort\b|\bréponse\b|\brespuesta\b)|答案[是为]?|选择?|正确的?是"
)
_MENTION = re.compile(
    rf"\b(?i:(?:option|choice)(?:\s+is\b)?|it(?:'s|\s+is))\s*:?{_OPENING}([A-Z])\b(?!['’]|\s+(?i:is|was)\s+(?i:wrong|incorrect|not\b))"
)
_JUDGED = re.compile(
    r"(?<![A-Za-zÀ-ɏ\d_'’])([A-Z])[*_`)\].]*\s+(?i:is|was)\s+(?i:(?:the\s+|clearly\s+)?(?:right|correct|best|final|answer))\b"
)
# A capital that is no word of the sentence: `I think` and `A cow` are none.
_LETTER = re.compile(
    r"(?<![A-Za-zÀ-ɏ\d_'’])([A-Z])(?![A-Za-zÀ-ɏ\d_'’])"
    r"(?!\s+(?!(?:because|since|as|is|which|for|due|and|or|by|from|with|in|but|not|–|—)\b)[a-z])"
)
_SMALL = re.compile(rf"{_OPENING}(?::|(?:is|are)\b)?{_OPENING}([a-z])[*_`\"')\]}}]*(?:[.,:;!]|\s*$)")
_DENIAL = re.compile(r"(?:\bnot|n['’]t|\bnever|\bneither|\bnor|\bthan)[\s*_`(\[]*$", re.IGNORECASE)
_ANOTHER = re.compile(r"[\s*_`)\].,]*(?:\bor\b|\band\b|/|,|&)[\s*_`(\[]*([A-Z])(?!\w)", re.IGNORECASE)
_LABEL = re.compile(r"(?:^|(?<=[\s*(\[]))([A-Z])[)\].:]", re.MULTILINE)
_LEADING = re.compile(r"[\s*_`(\[]*([A-Za-z])[*_`]*[)\].:,](?=\s|\*|$)")


def lettered(choices: Sequence[str]) -> str:
    """The choices as lines `A. …`, `B. …`."""
    return "\n".join(f"{letter}. {choice}" for letter, choice in zip(string.ascii_uppercase, choices, strict=False))


def gold_letters(gold: str, is_index: bool, choices: Sequence[str], labels: Sequence[str] = ()) -> list[str]:
    """The letters of the right choice, from its text, its label in the data set, its letter or its index from 0.

    They are tried in this order, so that choices which are digits or letters themselves keep their meaning as text.

    Args:
        gold: The answer as it is written in the data.
        is_index: Whether the data hold it as a number, which is an index.
        choices: The choices' texts.
        labels: Their labels in the data set.

    Returns:
        Several where two choices have the right one's text, none where the answer names no choice.
    """
    letters = string.ascii_uppercase[: len(choices)]
    bare = gold.strip()
    if not is_index:
        for names in (choices, labels):
            if gold in names:
                right = choices[names.index(gold)]
                return [letter for letter, choice in zip(letters, choices, strict=True) if choice == right]
        if len(bare) == 1 and bare.upper() in letters:
            return [bare.upper()]
    if not bare.isdecimal() or len(bare) > 2 or int(bare) >= len(letters):
        return []
    right = choices[int(bare)]
    return [letter for letter, choice in zip(letters, choices, strict=True) if choice == right]


def chosen_letter(completion: str, choices: Sequence[str]) -> str | None:
    """The letter a completion settles on, among those on offer; None without one.

    In this order: a boxed or tagged answer, a stated one ("the answer is B", "答案：B"; the last counts), a single
    letter or a choice's own text, a leading letter ("B. cow"), "option B" where no other option is named. A list of the
    choices is not an answer.
    """
    reading = _Reading(choices)
    text = unicodedata.normalize("NFKC", completion).rpartition("</think>")[2].strip()
    if (framed := _framed(text)) is not None:
        return reading.whole(framed) or reading.stated(framed) or reading.leading(framed)
    text = reading.without_list(text)
    return reading.stated(text) or reading.whole(text) or reading.leading(text) or reading.mentioned(text)


class _Reading:
    """Reads letters among those of some choices."""

    def __init__(self, choices: Sequence[str]) -> None:
        self.letters = string.ascii_uppercase[: len(choices)]
        texts = [unicodedata.normalize("NFKC", choice) for choice in choices]
        self.texts = dict(zip(self.letters, texts, strict=True))
        self.by_text = {_folded(text): letter for letter, text in reversed(self.texts.items()) if _folded(text)}

    def whole(self, text: str) -> str | None:
        """The letter or choice that is all of a text, or the only one that is a line of it."""
        lines = {letter for line in (text, *text.splitlines()) if (letter := self._line(line)) is not None}
        return lines.pop() if len(lines) == 1 else None

    def stated(self, text: str) -> str | None:
        """The last letter that the text calls its answer."""
        found = [(match.start(), self._offered(match[1])) for match in _JUDGED.finditer(text)]
        for match in _ANCHOR.finditer(text):
            rest = text[match.end() : match.end() + REACH].lstrip(" \t\n:=")
            found.append((match.start(), self._after(rest.partition("\n")[0])))
        letters = [letter for _, letter in sorted(found, key=lambda pair: pair[0]) if letter]
        return letters[-1] if letters else None

    def leading(self, text: str) -> str | None:
        """The letter a text begins with, as in `B. cow`; none where all choices are labelled one after the other."""
        labels = [label for label in _LABEL.findall(text) if label in self.letters]
        match = _LEADING.match(text)
        if match is None or list(dict.fromkeys(labels)) == list(self.letters):
            return None
        return self._offered(match[1].upper())

    def mentioned(self, text: str) -> str | None:
        """The only option that a text names."""
        named = {letter for match in _MENTION.finditer(text) if (letter := self._offered(match[1]))}
        return named.pop() if len(named) == 1 else None

    def without_list(self, text: str) -> str:
        """A text without the choices it repeats behind their letters, where it repeats two or more."""
        found = [
            match
            for letter, choice in self.texts.items()
            if choice.strip()
            for match in re.finditer(rf"(?<!\w){letter}[)\].:*]+\s*{re.escape(choice.strip())}(?!\w)", text)
        ]
        if len({match[0][0] for match in found}) < 2:
            return text
        for match in sorted(found, key=re.Match.start, reverse=True):
            text = f"{text[: match.start()]}\n{text[match.end() :]}"
        return text.strip(" \n()[]*,;.")

    def _line(self, line: str) -> str | None:
        if match := _LONE.fullmatch(line):
            return self._offered(match[1].upper())
        return self.by_text.get(_folded(line))

    def _after(self, rest: str) -> str | None:
        """The letter of what follows "answer"; None where it names two."""
        sentence = re.sub(r"^(?:is|are|would be|should be|must be|:)\s*", "", rest.strip(), flags=re.IGNORECASE)
        for text in (sentence, re.split(r"[.,;]", sentence)[0]):
            for bare in (text, re.sub(r"^(?:an?|the)\s+", "", text, flags=re.IGNORECASE)):
                if (letter := self.by_text.get(_folded(bare))) is not None:
                    return letter
        for place, letter in self._candidates(rest):
            another = _ANOTHER.match(rest, place + 1)
            ambiguous = another is not None and another[1].upper() != letter and another[1] in self.letters
            return None if ambiguous else letter
        return None

    def _candidates(self, rest: str) -> Iterator[tuple[int, str]]:
        for match in _LETTER.finditer(rest):
            if match[1] in self.letters and not _DENIAL.search(rest, 0, match.start()):
                yield match.start(), match[1]
        small = _SMALL.match(rest)
        if small is not None and small[1].upper() in self.letters:
            yield small.start(1), small[1].upper()

    def _offered(self, letter: str) -> str | None:
        return letter if letter in self.letters else None


def _framed(text: str) -> str | None:
    """What the last box of a text holds, or else its last pair of tags."""
    if boxed := _BOXED.findall(text):
        return str(boxed[-1])
    tags = list(_TAGS.finditer(text))
    for opening, closing in reversed(list(itertools.pairwise(tags))):
        if closing[1] and not opening[1]:
            return text[opening.end() : closing.start()]
    return None


def _folded(text: str) -> str:
    """A text as choices are compared: without case, emphasis and outer punctuation."""
    return text.strip(" \t\n*_`\"'.,:;!$").casefold()
