"""The normal form of a prompt, which all of its copies share.

It leaves out the features in which copies may differ: the system turn, case, white space, the style of quotes and
dashes, punctuation behind words, and the order of lettered choices. Numbers, signs, operators and
the punctuation of code stay, so that prompts with other numbers or other code have other forms.
"""

import hashlib
import re
import string
import unicodedata
from itertools import pairwise

from experts.domain import Prompt

# Unicode's compatibility form would make 2² the number 22.
_RAISED = re.compile("[\u00b2\u00b3\u00b9\u2070-\u207f]+")
_LOWERED = re.compile("[\u2080-\u208e]+")
_ONE_STYLE = str.maketrans(
    {**dict.fromkeys("‘’‚‛′`´", "'"), **dict.fromkeys("“”„‟″«»", '"'), **dict.fromkeys("‐‑‒–—―−", "-")}
)
_CHOICE = re.compile(r"(?:\(([a-z])\)|([a-z])[.)]) (\S.*)")
# Only behind a word of two letters or more: `5!` and `x.` may be mathematics, and `x,` a tuple.
_AFTER_WORD = re.compile(r"(?<=[^\W\d_]{2})(?:[.;:!?]+(?=\s|$)|,(?=[ \t]+[^\W\d_]))")
_END = " \t\n\r\f\v.?:=…"
_NUMBER = re.compile(r"\d+")


def normal_form(prompt: Prompt) -> str:
    """The text that all copies of a prompt share.

    Args:
        prompt: Plain text or chat messages. The roles of messages, except the system's, are part of the form.
    """
    if isinstance(prompt, str):
        return _text(prompt)
    asked = [message for message in prompt if message["role"] not in ("system", "developer")]
    if [message["role"] for message in asked] == ["user"]:
        return _text(asked[0]["content"])
    return "\n".join(f"{message['role']}: {_text(message['content'])}" for message in asked)


def short_hash(text: str) -> int:
    """The first 64 bits of a text's SHA-256."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def numbers(form: str) -> str:
    """The numbers of a normal form in order: near copies of an exercise have the same."""
    return " ".join(_NUMBER.findall(form))


def _text(text: str) -> str:
    if not text.isascii():
        text = _RAISED.sub(lambda match: f"^{match[0]}", text)
        text = _LOWERED.sub(lambda match: f"_{match[0]}", text)
        text = unicodedata.normalize("NFKC", text)
    lines = [_line(line) for line in text.translate(_ONE_STYLE).casefold().splitlines()]
    joined = _joined(_with_sorted_choices([line for line in lines if line]))
    if joined and any(map(str.isalnum, joined[-1])):
        joined[-1] = joined[-1].rstrip(_END)
    return "\n".join(joined)


def _line(line: str) -> str:
    """A line without what copies may differ in; a line of signs only may be a row of a picture and is kept."""
    if not any(map(str.isalnum, line)):
        return line.rstrip()
    return " ".join(_AFTER_WORD.sub("", line).split())


def _joined(lines: list[str]) -> list[str]:
    """Lines of prose joined; line breaks between rows of a grid, which have no letter, are kept."""
    joined = lines[:1]
    for before, line in pairwise(lines):
        if any(map(str.isalpha, before)) or any(map(str.isalpha, line)):
            joined[-1] = f"{joined[-1]} {line}"
        else:
            joined.append(line)
    return joined


def _with_sorted_choices(lines: list[str]) -> list[str]:
    """The lines, with lettered choices in alphabetical order and without their letters."""
    found: list[str] = []
    run: list[tuple[str, str]] = []

    def close() -> None:
        choices = sorted(f"* {choice}" for _, choice in run)
        found.extend(choices if len(run) > 1 else (line for line, _ in run))
        run.clear()

    for line in lines:
        match = _CHOICE.fullmatch(line)
        letter = (match[1] or match[2]) if match else ""
        if match and letter == string.ascii_lowercase[len(run) % 26]:
            run.append((line, match[3]))
            continue
        close()
        if match and letter == "a":
            run.append((line, match[3]))
        else:
            found.append(line)
    close()
    return found
