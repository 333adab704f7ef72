"""A table of texts, independent of its rendering."""

from dataclasses import dataclass

ABSENT = "–"


@dataclass(frozen=True)
class Grid:
    """A title, the column heads, the rows."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
