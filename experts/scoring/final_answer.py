"""Locates the answer in a completion: after the thoughts, and in the last box or `<answer>` tag if there is one.

All scorers that read free text share these rules, so that one completion has one final answer. Thoughts end at the last
`</think>`; thoughts that never end leave no answer. Zero-width characters are dropped. A text with a direction override
(U+202D, U+202E) looks different from its content, so it has no answer.
"""

import re
from dataclasses import dataclass

_OVERRIDES = frozenset("\u202d\u202e")
# Soft hyphen, zero-width space and joiners, direction marks, word joiner, byte order mark.
ZERO_WIDTH = "\u00ad\u200b\u200c\u200d\u200e\u200f\u2060\ufeff"
_DROPPED = dict.fromkeys(map(ord, ZERO_WIDTH))
# Number of characters read at the beginning and the end of a long text.
HEAD, TAIL = 2_000, 8_000
_REACH = 200
_LINES = re.compile(r"\n[ \t]*+\n\s*+")
_BLANKS = re.compile(r"[ \t\u00a0]{2,}+")
# Stop tokens written as text by a model that never learned to end.
_STOP_TOKENS = re.compile(r"(?:\s*(?:<\|[\w ]{1,30}\|>|</s>|<eos>|<end_of_turn>))+\s*$")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)
_ALTERNATIVE = re.compile(
    r"[\s$,;&/|.\\()\[\]]*+(?:\\?text\{)?\s*+(?:or|and)?\s*+\}?[\s$,;&/|\\()\[\]]*+", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class _Frame:
    start: int
    end: int
    content: str


def without_thoughts(completion: str) -> str:
    """The text behind the last `</think>`, up to thoughts that do not end."""
    return completion.rpartition("</think>")[2].partition("<think>")[0]


def visible(completion: str) -> str:
    """The answer part of a completion as a reader sees it; empty with a direction override.

    It has no stop tokens and no runs of white space, and only the beginning and end of a long text, because the time to
    search for an answer may grow with the square of the length.
    """
    text = without_thoughts(completion)
    if _OVERRIDES.intersection(text):
        return ""
    text = _BLANKS.sub(lambda run: run[0][:1], _LINES.sub("\n\n", text.translate(_DROPPED)))
    text = f"{text[:-_REACH]}{_STOP_TOKENS.sub('', text[-_REACH:])}"
    return text if len(text) <= HEAD + TAIL else f"{text[:HEAD]}\n{text[-TAIL:]}"


def framed(text: str) -> str | None:
    """The content of the last box or pair of tags; None if there is neither.

    Boxes side by side are alternatives and come back joined (`72 or 73`), and so do tags with a word or comma between
    them. A last box that is never closed was truncated and is empty. Tags may lack their end, which a stop text
    removes.
    """
    boxes, tags = _boxes(text), _tags(text)
    if tags and (not boxes or tags[-1].end >= boxes[-1].end):
        content = _joined(text, tags, blank_joins=False)
        return framed(content) if _BOX.search(content) else content
    return _joined(text, boxes, blank_joins=True) if boxes else None


def _joined(text: str, frames: list[_Frame], blank_joins: bool) -> str:
    """The last frame's content, joined with preceding frames that are alternatives to it."""
    content, start = frames[-1].content, frames[-1].start
    for frame in reversed(frames[:-1]):
        between = text[frame.end : start]
        if not _ALTERNATIVE.fullmatch(between) or not (blank_joins or between.strip()):
            break
        if frame.content.strip() != frames[-1].content.strip():
            content = f"{frame.content}{between if between.strip() else ', '}{content}"
        start = frame.start
    return content


def _boxes(text: str) -> list[_Frame]:
    found = []
    end = 0
    for match in _BOX.finditer(text):
        if match.start() < end:
            continue
        end = _closing(text, match.end())
        closed = text[end - 1 : end] == "}" and end > match.end()
        found.append(_Frame(match.start(), end, text[match.end() : end - 1] if closed else ""))
    return found


def _closing(text: str, start: int) -> int:
    """The position behind the brace that closes the group beginning at `start`; else the text's end plus one."""
    depth = 1
    for match in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.end()
    return len(text) + 1


def _tags(text: str) -> list[_Frame]:
    found: list[_Frame] = []
    tags = list(_TAG.finditer(text))
    for place, tag in enumerate(tags):
        if tag[1]:
            continue
        closing = tags[place + 1] if place + 1 < len(tags) else None
        if closing is not None and closing[1]:
            found.append(_Frame(tag.start(), closing.end(), text[tag.end() : closing.start()]))
        elif closing is None:
            found.append(_Frame(tag.start(), len(text), text[tag.end() :]))
    return found
