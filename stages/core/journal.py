"""What a node says while it works: metrics, progress and samples, appended as JSON lines.

The journal is the only way out for a stage's numbers. Whoever supervises the node reads it and forwards it to
MLflow and Prefect, so an unreachable server loses nothing.
"""

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from stages.core.checkpoint import write_whole

JOURNAL_FILE = "journal.jsonl"


class Journal:
    """Appends records `{"time", "step", "kind", ...}` to a JSON-lines file.

    Kinds: `metrics` (`values`: name -> float), `progress` (`total`), `sample` (`prompt`, `completion`, `score`, …),
    `note` (`text`). A resumed stage drops the records of the steps it will take again.
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
        """Record one prompt with its completion, to be read by a person."""
        self._write("sample", step, **fields)

    def note(self, step: int, text: str) -> None:
        """Record a line for the log."""
        self._write("note", step, text=text)

    def _write(self, kind: str, step: int, **fields: Any) -> None:
        self._file.write(json.dumps({"time": time.time(), "step": step, "kind": kind, **fields}) + "\n")


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the whole records of a journal; a last line still being written is left out."""
    with path.open() as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)


class JournalReader:
    """Reads what was appended since the last call. A journal rewritten by a resumed stage is read from its start;
    records already returned (by step) are then passed over."""

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
        records = [json.loads(line) for line in data[:end].splitlines()]
        if rewritten:
            records = [record for record in records if record["step"] > self._seen.get(record["kind"], -1)]
        for record in records:
            self._seen[record["kind"]] = max(record["step"], self._seen.get(record["kind"], -1))
        return records
