"""Escapes foreign names and texts for Markdown, so that they appear literally, not as markup or HTML. Free of torch."""

import html
import re

# Not escaped: an underscore within a word, which is no markup and part of many names; a lone bracket of an interval.
_MARKUP = re.compile(r"([\\`*|#~]|\](?=[(\[:]))")


def plain(text: str) -> str:
    """A text escaped to appear literally in a line, a table's cell or the text of a link."""
    return html.escape(_MARKUP.sub(r"\\\1", " ".join(text.split())), quote=False)


def code(text: str) -> str:
    """A text as inline code, in a line or a table's cell; a backtick would end the code, a bar the cell."""
    return f"`{' '.join(text.split()).replace('`', chr(39)).replace('|', '¦')}`"
