"""The journals of one process's nodes, forwarded to a listener. Free of torch."""

import json
import time
from collections.abc import Callable
from typing import Any

from base.store.checkpoint import Store
from base.store.journal import JOURNAL_FILE, JournalReader
from flows.engines.process_spec import ProcessSpec
from flows.plan.nodes import Node

OnRecords = Callable[[Node, list[dict[str, Any]]], None]


class Journals:
    """The journals of a process's nodes, forwarded to a listener over all attempts.

    Args:
        spec: The process.
        store: The store whose work folders have the journals.
        on_records: Called with a node and its new records.
    """

    def __init__(self, spec: ProcessSpec, store: Store, on_records: OnRecords) -> None:
        self._first, self._on_records, self._store = spec.nodes[0], on_records, store
        self._readers = [(node, JournalReader(store.work(node.key) / JOURNAL_FILE)) for node in spec.nodes]

    def forward(self) -> bool:
        """Forward new records; returns whether there were any."""
        moved = False
        for node, reader in self._readers:
            if records := reader.new_records():
                moved = True
                self._on_records(node, records)
        return moved

    def report(self, line: str) -> None:
        """Report a line that is in no journal."""
        self._on_records(self._first, [_note(0, line)])

    def note(self, line: str) -> None:
        """Append a note to the first node's journal, while no process owns it, and forward it.

        It has the step of the last saved state, so that a resumed stage keeps it.
        """
        work = self._store.work(self._first.key)
        steps = [int(path.name.removeprefix("step-")) for path in (work / "progress").glob("step-*")]
        with (work / JOURNAL_FILE).open("a") as file:
            file.write(json.dumps(_note(max(steps, default=0), line)) + "\n")
        self.forward()


def _note(step: int, text: str) -> dict[str, Any]:
    return {"time": time.time(), "step": step, "kind": "note", "text": text}
