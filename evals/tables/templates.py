"""Pages from Jinja2 templates, which are files in the folder `templates` of a room. Free of torch.

A template named `.html` escapes every value that is not `Markup`. Others are Markdown, and mark foreign texts with the
filters `plain` or `code`.
"""

import re
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from evals.tables.grid import ABSENT
from evals.tables.markdown import code, plain


def html(room: str, template: str, **values: Any) -> Markup:
    """A page or a part of one, as `text`; other templates embed it unescaped."""
    return Markup(text(room, template, **values))


def text(room: str, template: str, **values: Any) -> str:
    """A rendered template without white space around it.

    Args:
        room: The package that has the folder `templates`, such as `evals.report`.
        template: Name of the file.
        values: The template's variables; a missing one is an error.
    """
    return _environment(room).get_template(template).render(values).strip()


@cache
def _environment(room: str) -> Environment:
    environment = Environment(
        loader=PackageLoader(room),
        autoescape=lambda name: name is not None and name.endswith(".html"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"plain": plain, "code": code, "anchor": anchor, "code_spans": code_spans}
    environment.globals["ABSENT"] = ABSENT
    return environment


def anchor(title: str) -> str:
    """The `id` of a section."""
    return "".join(letter if letter.isalnum() else "-" for letter in title.lower())


def code_spans(line: str) -> Markup:
    """A line as HTML, with what is between backticks as code."""
    return Markup(re.sub("`([^`]*)`", r"<code>\1</code>", str(escape(line))))
