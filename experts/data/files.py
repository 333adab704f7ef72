"""Reads rows of local text files, JSON, JSONL, CSV or TSV, plain or gzipped, with every value as it is written.

No type is inferred: a CSV cell is text, and a JSON number is a `Number`, its own text. Ambiguous rows (a repeated key,
a row that is longer than its header) raise an error that names file and row.
"""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from base.errors import UserError, nearest

FORMATS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"
}  # fmt: skip
PACKED = ".gz"
# Python's own limit is 131,072 characters, which a long document exceeds.
LONGEST_CELL = 16 * 2**20

_SPLIT_WORDS = {
    "train": {"train", "training"},
    "test": {"test", "testing", "eval", "evaluation"},
    "validation": {"validation", "valid", "val", "dev"},
}

Row = Mapping[str, Any]


class Number(str):
    """A JSON number as it is written."""


@dataclass(frozen=True)
class Place:
    """The location of a row, for error messages.

    Attributes:
        file: Path or Hub id.
        row: Counts from 1.
        line: Counts from 1, in a file of lines.
    """

    file: str
    row: int
    line: int | None = None

    def __str__(self) -> str:
        line = "" if self.line is None else f" (line {self.line})"
        return f"row {self.row}{line} of '{self.file}'"


def file_format(path: Path) -> str | None:
    """The format by the ending of a file's name; None for any other ending."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == PACKED:
        kind = FORMATS.get(suffixes[-2]) if len(suffixes) > 1 else None
        return None if kind == "parquet" else kind
    return FORMATS.get(suffixes[-1]) if suffixes else None


def endings() -> str:
    """The supported endings of file names, for messages."""
    return f"{', '.join(FORMATS)}, all but the last also with {PACKED}"


def files_of_split(folder: Path, split: str) -> list[Path]:
    """The files of a folder that hold a split, by the words in their names; all files if no name has such a word.

    Raises:
        UserError: the folder has no file that can be read, or none of this split.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and file_format(path) is not None)
    if not files:
        raise UserError(f"'{folder}' holds no file that ends in {endings()}")
    by_split: dict[str | None, list[Path]] = {}
    for path in files:
        by_split.setdefault(_split_of(path.relative_to(folder), split), []).append(path)
    named = [name for name in by_split if name is not None]
    if not named and split == "train":
        return files
    if split not in by_split:
        raise UserError(f"'{folder}' holds no file of split '{split}'{nearest(split, named or ['train'])}")
    return by_split[split]


def _split_of(path: Path, asked: str) -> str | None:
    words = [word for part in reversed(path.parts) for word in re.split(r"[^a-z0-9]+", part.lower())]
    if asked.lower() in words:
        return asked
    return next((name for word in words for name, known in _SPLIT_WORDS.items() if word in known), None)


def read_rows(path: Path) -> Iterator[tuple[Place, Row]]:
    """Yield a file's rows with their places.

    Raises:
        UserError: something cannot be read; the message names file, row and field.
    """
    kind = file_format(path)
    if kind in ("csv", "tsv"):
        yield from _separated(path, "," if kind == "csv" else "\t")
    elif kind == "jsonl":
        yield from _json_lines(path, _text(path))
    else:
        yield from _json(path, _text(path))


def _text(path: Path) -> str:
    try:
        content = path.read_bytes()
        if path.suffix.lower() == PACKED:
            content = gzip.decompress(content)
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"'{path}' is not UTF-8 text: line {line}: {error.reason}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"'{path}' cannot be read: {error}") from None


def _json(path: Path, text: str) -> Iterator[tuple[Place, Row]]:
    """Rows of a list, of a single object, or of one object per line."""
    try:
        whole = _parse(text)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise UserError(f"'{path}' is not valid JSON: {error}") from None
        yield from _json_lines(path, text)
        return
    except ValueError as error:
        raise UserError(f"'{path}': {error}") from None
    for number, row in enumerate(whole if isinstance(whole, list) else [whole], 1):
        yield Place(str(path), number), _object(Place(str(path), number), row)


def _json_lines(path: Path, text: str) -> Iterator[tuple[Place, Row]]:
    number = 0
    # `splitlines` would also split at characters that may occur in a JSON text.
    for line, content in enumerate(text.split("\n"), 1):
        if not content.strip():
            continue
        number += 1
        place = Place(str(path), number, line)
        try:
            row = _parse(content)
        except ValueError as error:
            raise UserError(f"{place} is not valid JSON: {error}") from None
        yield place, _object(place, row)


def _object(place: Place, row: Any) -> Row:
    if not isinstance(row, dict):
        raise UserError(f"{place} is not a JSON object: {row!r:.60}")
    return row


def _parse(text: str) -> Any:
    try:
        return json.loads(
            text, parse_int=Number, parse_float=Number, parse_constant=Number, object_pairs_hook=_without_repeats
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"field '{repeated}' occurs twice in one object")
    return found


def _separated(path: Path, delimiter: str) -> Iterator[tuple[Place, Row]]:
    before = csv.field_size_limit(LONGEST_CELL)
    try:
        yield from _cells(path, csv.reader(io.StringIO(_text(path), newline=""), delimiter=delimiter, strict=True))
    finally:
        csv.field_size_limit(before)


def _cells(path: Path, reader: Any) -> Iterator[tuple[Place, Row]]:
    header: list[str] | None = None
    number, line = 0, 1
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise UserError(f"{Place(str(path), number + 1, line)} is not valid CSV: {error}") from None
        if cells is None:
            return
        place, line = Place(str(path), number + 1, line), reader.line_num + 1
        if not cells:
            continue
        if header is None:
            header = cells
            if repeated := [name for name in header if header.count(name) > 1]:
                raise UserError(f"'{path}': field '{repeated[0]}' occurs twice in the header")
            continue
        if len(cells) != len(header):
            raise UserError(f"{place} has {len(cells)} cells, the header has {len(header)}: {', '.join(header)}")
        number += 1
        yield place, dict(zip(header, cells, strict=True))
