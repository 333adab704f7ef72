"""Edit a run file and keep its comments and its form."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from base.documents import one_line


def _yaml() -> Any:
    """A YAML reader and writer that keeps comments, quotes and layout."""
    from ruamel.yaml import YAML

    parser = YAML()
    parser.preserve_quotes = True
    parser.width = 120
    parser.indent(mapping=2, sequence=4, offset=2)
    parser.representer.add_representer(type(None), lambda r, _: r.represent_scalar("tag:yaml.org,2002:null", "null"))
    return parser


def _read(path: Path) -> Any:
    return _yaml().load(path.read_text())


def _section(document: Any, *keys: str) -> Any:
    """The mapping at these keys, created if it is missing."""
    for key in keys:
        if document.get(key) is None:
            document[key] = {}
        document = document[key]
    return document


def _inline(names: Sequence[str]) -> Any:
    from ruamel.yaml.comments import CommentedSeq

    listed = CommentedSeq(names)
    listed.fa.set_flow_style()
    return listed


def _flow(entry: Mapping[str, Any]) -> str:
    """An entry in one line."""
    return one_line(copy.deepcopy(dict(entry)))
