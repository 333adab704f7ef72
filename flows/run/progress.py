"""Progress output of running nodes: a live line for each on a terminal, periodic plain lines elsewhere."""

import sys
import threading
import time
from collections.abc import Mapping, Sequence
from statistics import fmean
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from flows.plan.nodes import Node
from stages.config.kinds import STAGES

PLAIN_SECONDS = 10.0
PLAIN_SHARE = 0.1
BAR_CELLS = 20
REFRESH_PER_SECOND = 2


class Meter:
    """The progress of one job's nodes, from their journals' records.

    Attributes:
        label: The job's name in the output.
        share: The finished part, 0 to 1.
    """

    def __init__(self, label: str, nodes: Sequence[Node], now: float | None = None) -> None:
        self.label = label
        self.share = 0.0
        self._stage = nodes[0].stage
        self._steps: dict[str, tuple[int, int]] = {node.id: (0, 0) for node in nodes}
        self._measure: float | None = None
        self._started = time.time() if now is None else now
        self._first: tuple[float, float] | None = None
        self._seconds_a_share: float | None = None
        self._complete = False

    def read(self, node: Node, records: Sequence[Mapping[str, Any]]) -> None:
        """Update from a node's new records. Those of an earlier attempt set the starting point, not the speed."""
        for record in records:
            if record["kind"] == "progress":
                self._steps[node.id] = (record["step"], record["total"])
                self._moved(record["time"])
            elif record["kind"] == "metrics":
                self._measured(record["values"])

    def complete(self) -> None:
        """Mark the job as done, whatever its last step was: a stage may stop early."""
        self._complete = True
        self.share = 1.0

    @property
    def stopped_early(self) -> str:
        """`stopped early at step 40 of 100`, for a finished node that ended before its last step; else empty."""
        if not self._complete or len(self._steps) != 1:
            return ""
        step, total = next(iter(self._steps.values()))
        return f"stopped early at step {step} of {total}" if step < total else ""

    @property
    def eta_seconds(self) -> float | None:
        """Seconds until the end at the speed so far; None before there is a speed."""
        if self._seconds_a_share is None:
            return None
        return (1 - self.share) * self._seconds_a_share

    @property
    def position(self) -> str:
        """The steps of a single node, or the number of finished nodes of several."""
        if len(self._steps) == 1:
            step, total = next(iter(self._steps.values()))
            return f"{step}/{total}" if total else "done" if self._complete else "starting"
        done = sum(step == total > 0 for step, total in self._steps.values())
        return f"{done}/{len(self._steps)} domains"

    @property
    def measure(self) -> str:
        """The stage's main metric, such as `reward 0.41`; empty before its first value."""
        if self._measure is None:
            return ""
        return f"{STAGES[self._stage].metric.replace('_', ' ')} {self._measure:.3g}"

    def line(self) -> str:
        """Position, metric and time left in one line of text."""
        eta = self.eta_seconds
        left = f"ETA {duration(eta)}" if eta is not None and self.share < 1 else ""
        parts = [self.stopped_early or self.position, self.measure, left]
        return "  ".join(part for part in parts if part)

    def _moved(self, when: float) -> None:
        self.share = fmean(step / total if total else 0.0 for step, total in self._steps.values())
        if self._first is None or when <= max(self._started, self._first[0]):
            self._first = (when, self.share)
            return
        began, before = self._first
        if self.share > before:
            self._seconds_a_share = (when - began) / (self.share - before)

    def _measured(self, values: Mapping[str, float]) -> None:
        name = STAGES[self._stage].metric
        if name is None:
            return
        whole = f"{self._stage}/{name}"
        by_domain = [value for key, value in values.items() if key.startswith(f"{whole}/")]
        if whole in values:
            self._measure = values[whole]
        elif by_domain:
            self._measure = fmean(by_domain)


class ProgressDisplay:
    """The lines of all running jobs; safe to call from several threads."""

    def __init__(self, console: Console, plain: bool = False) -> None:
        """Choose live lines for a terminal, and plain lines if `plain` is set or there is no terminal."""
        self.console = console
        self.plain = plain or not console.is_terminal
        self._lock = threading.Lock()
        self._meters: dict[str, Meter] = {}
        self._printed: dict[str, tuple[float, float]] = {}
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=REFRESH_PER_SECOND)

    def __enter__(self) -> Self:
        if not self.plain:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.plain:
            self._live.stop()

    def started(self, meter: Meter) -> None:
        """Show a new job."""
        with self._lock:
            self._meters[meter.label] = meter
            self._printed[meter.label] = (time.monotonic(), 0.0)
        if self.plain:
            self.print_line(f"{meter.label}: started")

    def moved(self, meter: Meter) -> None:
        """Show a job's new position: at once on a terminal, else when the next line is due."""
        if not self.plain:
            return
        now = time.monotonic()
        when, share = self._printed[meter.label]
        if meter.share > share and (now - when >= PLAIN_SECONDS or meter.share - share >= PLAIN_SHARE):
            self._printed[meter.label] = (now, meter.share)
            self.print_line(f"{meter.label}: {meter.line()}")

    def finished(self, meter: Meter, outcome: str) -> None:
        """Remove a job's live line and print its outcome."""
        with self._lock:
            self._meters.pop(meter.label, None)
        self.print_line(f"{meter.label}: {outcome}")

    def print_line(self, text: str) -> None:
        """Print a line of text above the live lines."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)
        if self.plain:
            sys.stdout.flush()

    def _render(self) -> Group:
        with self._lock:
            meters = list(self._meters.values())
        width = max((len(meter.label) for meter in meters), default=0)
        return Group(*(_bar(meter, width) for meter in meters))


def notes(node: Node, records: Sequence[Mapping[str, Any]], since: float) -> list[str]:
    """The notes of a node for the user (alarms, an early stop), a line for each.

    Args:
        node: The node.
        records: New records of its journal.
        since: Start of this attempt, in seconds since the epoch; notes of an earlier attempt are not repeated.
    """
    found = [record for record in records if record["kind"] == "note" and record["time"] >= since]
    return [f"{node.id}: step {record['step']}: {record['text']}" for record in found]


def duration(seconds: float) -> str:
    """A readable duration: `42s`, `3m05s`, `2h10m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def _bar(meter: Meter, width: int) -> Text:
    filled = round(meter.share * BAR_CELLS)
    text = Text(f"{meter.label:<{width}}  ", no_wrap=True, overflow="ellipsis")
    text.append("━" * filled, style="green").append("━" * (BAR_CELLS - filled), style="grey37")
    return text.append(f"  {meter.line()}")
