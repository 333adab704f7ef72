"""Names and texts of other people inside Markdown: shown as they are, neither markup nor HTML. Free of torch."""

import html
import re

# An underscore within a word marks nothing up, and is part of many names; a bracket alone, of an interval, neither.
_MARKUP = re.compile(r"([\\`*|#~]|\](?=[(\[:]))")


def plain(text: str) -> str:
    """A text as it reads, in a line, a table's cell or the text of a link."""
    return html.escape(_MARKUP.sub(r"\\\1", " ".join(text.split())), quote=False)


def code(text: str) -> str:
    """A text as code, in a line or a table's cell; a backtick would end it, a bar the cell."""
    return f"`{' '.join(text.split()).replace('`', chr(39)).replace('|', '¦')}`"
