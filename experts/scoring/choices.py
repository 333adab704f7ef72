"""Multiple choice: the choices as letters, and the letter that a completion settles on."""

import re
import string
import unicodedata
from collections.abc import Callable, Iterator, Sequence

from experts.scoring.final_answer import framed, visible

# The result of a reading that found more than one letter, which counts as none.
SEVERAL = ""
# Characters after "answer" within which its letter is looked for.
REACH = 120
# Number of second thoughts examined, from the last backwards.
MOST_THOUGHTS = 10

_OPENING = r"[\s*_`\"'“‘„«$(\[{<>]*+(?:\\(?:text|mathrm|mathbf|textbf)\{)?[\s*_`\"'(\[]*+"
_CLOSING = r"[\s*_`\"'”’“»$)\]}<>.,:;!]*+"
_LONE = re.compile(rf"{_OPENING}(?:(?:option|choice|answer)[\s:]+)?{_OPENING}([A-Za-z]){_CLOSING}", re.IGNORECASE)
_ANCHOR = re.compile(
    r"(?i:\banswers?\b|\bchoose\b|\bpick\b|\bselect\b|\bgo\s+with\b|\bantwort\b|\bréponse\b|\brespuesta\b"
    r"|\bsolution\s*(?:is\b|:)|\b(?:correct|right|best)(?:\s+(?:one|letter|option|choice))?\s*(?:is\b|:))|答案[是为]?|选择?|正确的?是"
    # `So B.`, and not `So B cells divide`.
    rf"|(?i:\b(?:so|thus|hence|therefore|i\s+(?:think|believe|guess)))\b,?(?={_OPENING}[A-Z][*_`)\]\s]*(?:[.!]|$))",
    re.MULTILINE,
)
_MENTION = re.compile(
    rf"\b(?i:(?:option|choice)[\"']?(?:\s+is\b)?|it(?:'s|\s+is|\s+(?:must|should|has\s+to)\s+be))\s*:?{_OPENING}([A-Z])\b(?!['’]|\s+(?i:is|was)\s+(?i:wrong|incorrect|not\b))"
)
_JUDGED = re.compile(
    r"(?<![A-Za-zÀ-ɏ\d_'’])([A-Z])[*_`)\].]*\s+(?i:is|was)\s+(?i:(?:the\s+|clearly\s+)?(?:only\s+)?(?:right|correct|best|final|answer))\b"
)
# A capital letter that is not a word of the sentence: `I think` and `A cow` do not count.
_LETTER = re.compile(
    r"(?<![A-Za-zÀ-ɏ\d_'’])([A-Z])(?![A-Za-zÀ-ɏ\d_'’])"
    r"(?!\s+(?!(?:because|since|as|is|which|for|due|and|or|by|from|with|in|but|not|over|rather|while|whereas|instead|–|—)\b)[a-z])"
)
_SMALL = re.compile(rf"{_OPENING}(?::|(?:is|are)\b)?{_OPENING}([a-z])[*_`\"')\]}}]*(?:[.,:;!]|\s*$)")
_DENIAL = re.compile(
    r"(?:\bnot|n['’]t|\bnever|\bcannot|\bneither|\bnor|\bthan|\banything\s+but|\bexcept|\binstead\s+of|\bunlike|\bover"
    r"|\bwhile|\bwhereas|\bcompared\s+(?:with|to)|\bversus|\bvs\.?)"
    r"(?:\s+(?:be|is|the|option|choice|answer|really|definitely))*[\s*_`(\[]*$",
    re.IGNORECASE,
)
_DOUBT = re.compile(
    r"(?:(?:n['’]t|\bnot|\bnever|\bcannot)\s+(?:really\s+)?(?:think|believe|say|true|choose|pick|select|go|sure|certain)\b"
    r"|(?<!\bno\s)(?<!\bwithout\s)\bdoubt\b)[^.;!?,\n]{0,40}$",
    re.IGNORECASE,
)
_GLUE = r"[\s*_`\"'”’)\].$}]*"
# Another letter next to the first: `A or B`, `A, B`, `(A) (B)`, `A (or B)`, `A; maybe B`.
_ANOTHER = re.compile(
    rf"{_GLUE}(?:[,;/|&+]|\b(?:or|and|oder|und|ou|et)\b|[\s(])\s*\(?"
    r"(?:(?:or|and|else|also|even|either|maybe|perhaps|possibly|option|choice|the)\b[\s,]*){0,3}"
    r"[\s*_`\"'“(\[]*([A-Z])(?![\w'’])(?!\s+(?:is|was|are)\b(?!\s+(?:also|possible|correct|right)))"
    r"(?!\s+(?!(?:or|and|is|are|also|could|may|might|because|since|as|but)\b)[a-z])"
)
_ALSO = re.compile(
    r"(?<!\w)([A-Z])[)\]*]*\s+(?:is|could\s+be|may\s+be|might\s+be|would\s+be|works?)\s*(?:also|possible|too(?!\s+\w)|as\s+well|correct)\b"
)
_NO_LONGER = re.compile(
    r"(?:^|[.,;:!?…—–(-]|\s)\s*(?:wait|actually|correction|sorry|oops|scratch\s+that|i\s+mean|on\s+second\s+thought"
    r"|or\s+rather|(?<![a-z]\s)no(?=\s*[,.!:;—–-]|\s+(?:wait|it|[A-Z])\b))\b",
    re.IGNORECASE,
)
_INSTEAD = re.compile(
    rf"(?i:[\s,.:;!?—–-]|\b(?:wait|actually|sorry|no|it['’]s|it\s+is|it\s+should\s+be|it\s+must\s+be|rather|make\s+it|hmm|option"
    r"|choice|i\s+(?:mean|choose|pick))\b)*"
    rf"{_OPENING}([A-Z])(?![\w'’])(?!\s+(?!(?:because|since|as|is\s+(?:the|right|correct|best))\b)[a-z])"
)
_REASON = re.compile(rf"{_OPENING}([A-Z])[*_`)\]]*\s+(?:because|since|as)\b")
_LABEL = re.compile(r"(?:^|(?<=[\s*(\[]))([A-Z])[)\].:]", re.MULTILINE)
_LEADING = re.compile(r"[\s*_`(\[]*([A-Za-z])[*_`]*[)\].:,](?=\s|\*|$)")
_OWN_TEXT = re.compile(rf"{_OPENING}([A-Za-z])[*_`)\].:]*\s*[-–—=>→,(:]*\s*(\S.*)")
_ARTICLE = re.compile(r"^(?:it(?:['’]s|\s+is)\s+)?(?:an?|the)\s+", re.IGNORECASE)


def lettered(choices: Sequence[str]) -> str:
    """The choices as lines `A. …`, `B. …`."""
    return "\n".join(f"{letter}. {choice}" for letter, choice in zip(string.ascii_uppercase, choices, strict=False))


def gold_letters(gold: str, is_index: bool, choices: Sequence[str], labels: Sequence[str] = ()) -> list[str]:
    """The letters of the right choice, from its text, its label in the data set, its letter or its index from 0.

    They are tried in this order, so that choices that are digits or letters themselves keep their meaning as text.

    Args:
        gold: The answer as it is written in the data.
        is_index: Whether the data hold it as a number, which is an index.
        choices: The choices' texts.
        labels: Their labels in the data set.

    Returns:
        Several letters if two choices have the right text, none if the answer names no choice.
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
    """The letter that a completion gives as its answer, among those on offer; None without one.

    In this order: a boxed or tagged answer, one that takes back an earlier one ("A. No, B"), a stated one ("the answer
    is B", "答案：B"; the last counts), a single letter or a choice's own text, a leading letter ("B. cow"), "option B"
    where no other option is named. A list of the choices is not an answer. Neither is a letter next to another one
    ("A or B", "A, B", "A (B is also possible)"), a denied one ("anything but B"), a doubtful one ("I am not sure it is
    B") or one with the text of another choice ("B. dog" where dog is C).
    """
    reading = _Reading(choices)
    text = unicodedata.normalize("NFKC", visible(completion)).strip()
    if (frame := framed(text)) is not None:
        bare = re.sub(r"\\(?:text|mathrm|mathbf|textbf|textit)\s*\{([^{}]*)\}|\\[ ,;]", r"\1 ", frame)
        return reading.first(bare, reading.whole, reading.stated, reading.leading)
    text = reading.without_list(text)
    ways = (reading.taken_back, reading.stated, reading.whole, reading.leading, reading.mentioned)
    return reading.first(text, *ways)


class _Reading:
    """Reads the letter of one of the given choices in a text."""

    def __init__(self, choices: Sequence[str]) -> None:
        self.letters = string.ascii_uppercase[: len(choices)]
        texts = [unicodedata.normalize("NFKC", choice) for choice in choices]
        self.texts = dict(zip(self.letters, texts, strict=True))
        self.by_text = {_folded(text): letter for letter, text in reversed(self.texts.items()) if _folded(text)}

    def first(self, text: str, *ways: Callable[[str], str | None]) -> str | None:
        """The letter of the first way of reading that finds any; None if it finds several."""
        return next((letter for way in ways if (letter := way(text)) is not None), None) or None

    def whole(self, text: str) -> str | None:
        """The letter or choice that is the whole text, or the only one that is a whole line."""
        lines = {letter for line in (text, *text.splitlines()) if (letter := self._line(line)) is not None}
        return lines.pop() if len(lines) == 1 else SEVERAL if lines else None

    def taken_back(self, text: str) -> str | None:
        """The letter that replaces an earlier one: "A. No, B"."""
        first = re.search(r"(?<!\w)[A-Z](?!\w)", text)
        if first is None:
            return None
        for match in list(_NO_LONGER.finditer(text, first.end()))[: -MOST_THOUGHTS - 1 : -1]:
            rest = text[match.end() :]
            if (letter := self.stated(rest)) is not None:
                return letter
            instead = _INSTEAD.match(rest)
            if instead is not None and self._offered(instead[1]):
                return self._alone(instead[1], rest, instead.end(1))
        return None

    def stated(self, text: str) -> str | None:
        """The last letter that the text calls its answer."""
        found = [(match.start(), self._judged(text, match)) for match in _JUDGED.finditer(text)]
        for match in _ANCHOR.finditer(text):
            rest = text[match.end() : match.end() + REACH].lstrip(" \t\n:=")
            doubted = _DOUBT.search(text, max(0, match.start() - REACH), match.start())
            found.append((match.start(), None if doubted else self._after(rest.partition("\n")[0])))
        letters = [letter for _, letter in sorted(found, key=lambda pair: pair[0]) if letter is not None]
        return letters[-1] if letters else None

    def leading(self, text: str) -> str | None:
        """The letter at the start of a text, as in `B. cow`; None if all choices are labelled one after the other."""
        labels = [label for label in _LABEL.findall(text) if label in self.letters]
        match = _LEADING.match(text) or _REASON.match(text)
        if match is None or list(dict.fromkeys(labels)) == list(self.letters) or not self._offered(match[1].upper()):
            return None
        return self._alone(match[1].upper(), text, match.end(1))

    def mentioned(self, text: str) -> str | None:
        """The only option that a text names."""
        named = {
            self._alone(letter, text, match.end(1))
            for match in _MENTION.finditer(text)
            if (letter := self._offered(match[1]))
            and not _DOUBT.search(text, max(0, match.start() - REACH), match.start())
        }
        return named.pop() if len(named) == 1 else None

    def without_list(self, text: str) -> str:
        """A text without the choices repeated behind their letters, if it repeats two or more."""
        found = [
            match
            for letter, choice in self.texts.items()
            if choice.strip()
            for match in re.finditer(rf"(?<!\w){letter}[)\].:*]+\s*{re.escape(choice.strip())}(?!\w)", text)
            if not _DENIAL.search(text, max(0, match.start() - REACH), match.start())
        ]
        if len({match[0][0] for match in found}) < 2:
            return text
        for match in sorted(found, key=re.Match.start, reverse=True):
            text = f"{text[: match.start()]}\n{text[match.end() :]}"
        return text.strip(" \n()[]*,;.")

    def _line(self, line: str) -> str | None:
        if match := _LONE.fullmatch(line):
            return self._offered(match[1].upper())
        named = _OWN_TEXT.fullmatch(line)
        if named is not None and self.by_text.get(_folded(named[2].rstrip(")]"))) == named[1].upper():
            return named[1].upper()
        return self.by_text.get(_folded(line)) or self.by_text.get(_folded(_ARTICLE.sub("", line.strip())))

    def _judged(self, text: str, match: re.Match[str]) -> str | None:
        """The letter that "is correct"; `SEVERAL` if the sentence calls another one correct too."""
        sentence = re.split(r"[.;!?\n]", text[match.end() : match.end() + REACH])[0]
        before = re.split(r"[.;!?\n]", text[max(0, match.start() - REACH) : match.start()])[-1]
        others = {other[1] for part in (before, sentence) for other in (*_JUDGED.finditer(part), *_ALSO.finditer(part))}
        letter = self._offered(match[1])
        return SEVERAL if letter and others & (set(self.letters) - {letter}) else letter

    def _after(self, rest: str) -> str | None:
        """The letter in the text behind "answer"; `SEVERAL` if it names two."""
        sentence = re.sub(r"^(?:is|are|would be|should be|must be|:)\s*", "", rest.strip(), flags=re.IGNORECASE)
        for text in (sentence, re.split(r"[.,;]", sentence)[0]):
            for bare in (text, re.sub(r"^(?:an?|the)\s+", "", text, flags=re.IGNORECASE)):
                if (letter := self.by_text.get(_folded(bare))) is not None:
                    return letter
        for place, letter in self._candidates(rest):
            return self._alone(letter, rest, place + 1)
        return None

    def _alone(self, letter: str, text: str, end: int) -> str:
        """A letter, if no other one is offered with it and no other choice's text follows."""
        another = _ANOTHER.match(text, end)
        others = {another[1]} if another is not None else set()
        sentence = re.split(r"[.;!?\n]", text[end : end + REACH].lstrip(" *_`)].:"))[0]
        others |= {also[1] for also in _ALSO.finditer(sentence)}
        named = self.by_text.get(_folded(sentence.strip(" ()-–—=>→")))
        if others & set(self.letters) - {letter} or (named is not None and self.texts[letter] != self.texts[named]):
            return SEVERAL
        return letter

    def _candidates(self, rest: str) -> Iterator[tuple[int, str]]:
        for match in _LETTER.finditer(rest):
            if match[1] in self.letters and not _DENIAL.search(rest, 0, match.start()):
                yield match.start(), match[1]
        small = _SMALL.match(rest)
        if small is not None and small[1].upper() in self.letters:
            yield small.start(1), small[1].upper()

    def _offered(self, letter: str) -> str | None:
        return letter if letter in self.letters else None


def _folded(text: str) -> str:
    """A text in the form in which choices are compared: without case, emphasis and outer punctuation."""
    return text.strip(" \t\n*_`\"'.,:;!$").casefold()
