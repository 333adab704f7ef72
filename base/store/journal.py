"""The journal of a node: metrics, progress and samples, appended as JSON lines.

A stage reports its numbers only through the journal. The node's supervisor reads it and forwards it to MLflow and
Prefect, so that nothing is lost if a server is unreachable. Lines that a crash or a full disk left damaged are skipped
and counted in the log.
"""

import json
import logging
import math
import re
import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from base.store.checkpoint import write_whole

JOURNAL_FILE = "journal.jsonl"
# Stretches of steps; a thinned curve has the lowest and the highest value of each.
STRETCHES = 160
MOST_NOTES = 500
# The most lines of metrics parsed for curves; in a longer journal, only every n-th is.
MOST_PARSED = 20_000
# A longer line is not a record of a journal.
LONGEST_LINE = 16 * 2**20
# The kind is within this many bytes of a line's start.
KIND_BY = 100
_FIELDS: Mapping[str, Mapping[str, type]] = {
    "metrics": {"values": dict},
    "progress": {"total": int},
    "note": {"text": str},
    "sample": {},
}
_KIND = re.compile(rb'"kind": "(\w+)"')
logger = logging.getLogger(__name__)


class Journal:
    """Appends records `{"time", "step", "kind", ...}` to a JSON-lines file.

    Kinds: `metrics` (`values`: name -> float), `progress` (`total`), `sample` (`prompt`, `completion`, `score`, …),
    `note` (`text`). A resumed stage drops damaged lines, and the records of steps that it will repeat.
    """

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            kept = [record for record in read(path) if record["step"] <= resume_step]
            write_whole(path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = path.open("a", buffering=1)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Record metrics of one step, keyed `stage/name/domain`."""
        self._write("metrics", step, values={name: float(value) for name, value in values.items()})

    def progress(self, step: int, total: int) -> None:
        """Record that `step` of `total` steps are done."""
        self._write("progress", step, total=total)

    def sample(self, step: int, **fields: Any) -> None:
        """Record one prompt with its completion, for readers."""
        self._write("sample", step, **fields)

    def note(self, step: int, text: str) -> None:
        """Record a line for the log."""
        self._write("note", step, text=text)

    def _write(self, kind: str, step: int, **fields: Any) -> None:
        self._file.write(json.dumps({"time": time.time(), "step": step, "kind": kind, **fields}) + "\n")


def note_of(step: int, text: str) -> dict[str, Any]:
    """The record of a line for the log."""
    return {"time": time.time(), "step": step, "kind": "note", "text": text}


def append_note(path: Path, step: int, text: str) -> None:
    """Append a line for the log to a journal without opening it as its owner, which rewrites it."""
    with path.open("a") as file:
        file.write(json.dumps(note_of(step, text)) + "\n")


def read(path: Path, kinds: Collection[str] = tuple(_FIELDS), every: int = 1) -> Iterator[dict[str, Any]]:
    """Yield the complete records of a journal, line by line.

    A last line that is still being written is left out. Damaged lines are left out too, and counted in the log.

    Args:
        path: The journal.
        kinds: Kinds of records to yield; lines of other kinds are not parsed.
        every: Parse only every n-th line of metrics.
    """
    damaged = passed = 0
    with path.open("rb") as file:
        for line in _lines(file):
            kind = _kind(line)
            if kind in _FIELDS and kind not in kinds:
                continue
            if kind == "metrics":
                passed += 1
                if passed % every:
                    continue
            record = _record(line)
            if record is None:
                damaged += 1
            elif record["kind"] in kinds:
                yield record
    _warn_damaged(path, damaged)


def last_records(path: Path, kinds: Collection[str]) -> dict[str, dict[str, Any]]:
    """The last record of each kind in a journal; empty if there is no journal."""
    if not path.is_file():
        return {}
    # Several of each kind, since the very last may be damaged.
    ends: dict[str, deque[bytes]] = {kind: deque(maxlen=8) for kind in kinds}
    damaged = 0
    with path.open("rb") as file:
        for line in _lines(file):
            kind = _kind(line)
            damaged += kind not in _FIELDS
            if kind in ends:
                ends[kind].append(line)
    _warn_damaged(path, damaged)
    found = {}
    for kind, last in ends.items():
        whole = [record for line in last if (record := _record(line)) is not None and record["kind"] == kind]
        if whole:
            found[kind] = whole[-1]
    return found


def thinned_records(path: Path) -> list[dict[str, Any]]:
    """A bounded number of records of a journal of any length: metrics for curves, and notes.

    Returns:
        `{"step", "values"}`, with at most `4 * STRETCHES` finite values of each metric: the lowest and the highest of
        each stretch of steps (of the parsed lines), so that spikes are kept; and the last `MOST_NOTES` notes.
    """
    with path.open("rb") as file:
        count = sum(_kind(line) == "metrics" for line in _lines(file))
    curves: dict[str, _Curve] = {}
    notes: deque[dict[str, Any]] = deque(maxlen=MOST_NOTES)
    for record in read(path, ("metrics", "note"), every=math.ceil(count / MOST_PARSED) or 1):
        if record["kind"] == "note":
            notes.append(record)
            continue
        for name, value in record["values"].items():
            if isinstance(value, int | float) and math.isfinite(value):
                curves.setdefault(name, _Curve()).add(record["step"], value)
    steps: dict[int, dict[str, float]] = {}
    for name, curve in curves.items():
        for step, value in curve.points():
            steps.setdefault(step, {})[name] = value
    return [*({"kind": "metrics", "step": step, "values": steps[step]} for step in sorted(steps)), *notes]


class _Curve:
    """The lowest and the highest point of each stretch; if there are too many stretches, pairs of them are merged."""

    def __init__(self) -> None:
        self._stretches: list[tuple[_Point, _Point]] = []
        self._size, self._in_last = 1, 0

    def add(self, step: int, value: float) -> None:
        point = (step, value)
        if not self._stretches or self._in_last >= self._size:
            if len(self._stretches) >= 2 * STRETCHES:
                pairs = zip(self._stretches[::2], self._stretches[1::2], strict=True)
                self._stretches = [
                    (min(one[0], other[0], key=_value), max(one[1], other[1], key=_value)) for one, other in pairs
                ]
                self._size *= 2
            self._stretches.append((point, point))
            self._in_last = 1
            return
        self._in_last += 1
        low, high = self._stretches[-1]
        if value < low[1]:
            self._stretches[-1] = (point, high)
        elif value > high[1]:
            self._stretches[-1] = (low, point)

    def points(self) -> Iterator["_Point"]:
        for stretch in self._stretches:
            yield from sorted(set(stretch))


_Point = tuple[int, float]


def _value(point: _Point) -> float:
    return point[1]


class JournalReader:
    """Reads the records appended since the last call. A journal rewritten by a resumed stage is read from its start;
    records that were already returned (by step) are skipped then."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0
        self._inode = 0
        self._seen: dict[str, int] = {}

    def new_records(self) -> list[dict[str, Any]]:
        """Return the records that were not returned before, in order."""
        if not self.path.exists():
            return []
        inode = self.path.stat().st_ino
        rewritten = self._inode not in (0, inode)
        if rewritten:
            self._offset = 0
        self._inode = inode
        with self.path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        end = data.rfind(b"\n") + 1
        self._offset += end
        read_lines = [_record(line) for line in data[:end].splitlines()]
        records = [record for record in read_lines if record is not None]
        _warn_damaged(self.path, len(read_lines) - len(records))
        if rewritten:
            records = [record for record in records if record["step"] > self._seen.get(record["kind"], -1)]
        for record in records:
            self._seen[record["kind"]] = max(record["step"], self._seen.get(record["kind"], -1))
        return records


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Complete lines; of a line that is too long only the beginning, which is not a valid record."""
    whole = True
    while line := file.readline(LONGEST_LINE):
        ends = line.endswith(b"\n")
        if whole and (ends or len(line) == LONGEST_LINE):
            yield line
        whole = ends


def _kind(line: bytes) -> str:
    """The kind at the beginning of a line; empty if the line is damaged there."""
    found = _KIND.search(line, 0, KIND_BY)
    return found[1].decode() if found else ""


def _record(line: bytes) -> dict[str, Any] | None:
    """The record in a line; None if it is damaged."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        return None
    wanted = {"step": int, "time": int | float, **_FIELDS.get(record["kind"], {})}
    fine = all(isinstance(record.get(name), kind) for name, kind in wanted.items())
    return record if fine else None


def _warn_damaged(path: Path, count: int) -> None:
    if count:
        logger.warning(
            "%s: %d lines are damaged and skipped; the next `mopd run` that resumes this stage drops them",
            path,
            count,
        )
