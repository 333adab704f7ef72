"""The journals of one process's nodes, forwarded to a listener. Free of torch."""

from collections.abc import Callable
from typing import Any

from base.store.checkpoint import Store
from base.store.journal import JOURNAL_FILE, JournalReader, append_note, note_of
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
        self._on_records(self._first, [note_of(0, line)])

    def note(self, line: str) -> None:
        """Append a note to the first node's journal, while no process owns it, and forward it.

        It has the step of the last saved state, so that a resumed stage keeps it.
        """
        work = self._store.work(self._first.key)
        steps = [int(path.name.removeprefix("step-")) for path in (work / "progress").glob("step-*")]
        append_note(work / JOURNAL_FILE, max(steps, default=0), line)
        self.forward()
