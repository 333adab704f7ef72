"""Meters the product's own on-policy loop: seconds, tokens and the peak of memory of each phase of a step.

The loop's clock does not wait for the device, so that on a GPU a phase's work may be counted in the next one. The
meter's clock does. Nothing else of the loop changes.
"""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from stages.on_policy import loop
from stages.on_policy.clock import Clock
from studies.gpu_work import Rows

# The loop's laps of a step, in order; what follows the last one are metrics.
PHASES = ("rollout", "signal", "update")
KERNELS = 40
# Prefix of the phases' ranges in a trace.
RANGE = "mopd/"


@dataclass
class Step:
    """One step of the loop.

    Attributes:
        rows: Tokens of its prompts and completions.
        completions: Number of completions.
        seconds: By phase.
        allocated: Peak of memory by phase, in bytes: torch's on a GPU, the process's resident memory on a CPU.
        used: Memory in use on the device at the end of a phase, by all processes, with what allocators hold; 0 on a
            CPU.
    """

    rows: Rows = field(default_factory=lambda: Rows(0, 0, 0))
    completions: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    allocated: dict[str, int] = field(default_factory=dict)
    used: dict[str, int] = field(default_factory=dict)


@contextlib.contextmanager
def metered(trace: "Trace | None" = None) -> Iterator[list[Step]]:
    """A context that yields a list, to which every step of the loop inside is added."""
    steps: list[Step] = []
    original_clock, original_step = loop.Clock, loop.take_step

    class MeteredClock(Clock):
        """A clock that waits for the device and reads the peaks of memory."""

        def __init__(self) -> None:
            synchronise()
            reset_peak()
            self._range = _opened(PHASES[0])
            super().__init__()

        def lap(self, name: str) -> None:
            synchronise()
            super().lap(name)
            step = steps[-1]
            step.seconds[name] = self.seconds[f"seconds/{name}"]
            step.allocated[name], step.used[name] = peak(), used()
            self._range.__exit__(None, None, None)
            following = PHASES.index(name) + 1
            self._range = _opened(PHASES[following]) if following < len(PHASES) else contextlib.nullcontext()
            reset_peak()
            # The readings belong to no phase.
            self._last = time.monotonic()

    def take_step(task: Any, learner: Any, config: Any, number: int, *rest: Any) -> Any:
        steps.append(Step())
        with trace.of(number) if trace else contextlib.nullcontext():
            rollout, signals, metrics = original_step(task, learner, config, number, *rest)
        lengths = [(len(drawn.prompt_ids), len(drawn.completion_ids)) for drawn in rollout.samples]
        steps[-1].rows, steps[-1].completions = Rows.of(lengths), len(lengths)
        return rollout, signals, metrics

    loop.Clock, loop.take_step = MeteredClock, take_step
    try:
        yield steps
    finally:
        loop.Clock, loop.take_step = original_clock, original_step


def _opened(name: str) -> Any:
    """A range of the profiler's trace that is open."""
    opened = torch.profiler.record_function(f"{RANGE}{name}")
    opened.__enter__()
    return opened


@dataclass
class Trace:
    """torch's profiler over one step: a Chrome trace and a table of the dearest kernels.

    Attributes:
        step: The step that is profiled.
        folder: Where `trace.json.gz` and `kernels.txt` are written.
        table: The table, once the step is done.
        rows: Its first rows: name, calls, seconds of the kernel itself.
    """

    step: int
    folder: Path
    table: str = ""
    rows: list[tuple[str, int, float]] = field(default_factory=list)

    @contextlib.contextmanager
    def of(self, number: int) -> Iterator[None]:
        """A context that is profiled if it is the step's."""
        if number != self.step:
            yield
            return
        on_device = torch.cuda.is_available() and torch.profiler.ProfilerActivity.CUDA in _supported()
        activities = [torch.profiler.ProfilerActivity.CPU]
        activities += [torch.profiler.ProfilerActivity.CUDA] if on_device else []
        with torch.profiler.profile(activities=activities) as profiler:
            yield
            synchronise()
        sort = "self_device_time_total" if on_device else "self_cpu_time_total"
        events = profiler.key_averages()
        self.table = events.table(sort_by=sort, row_limit=KERNELS, max_name_column_width=90)
        # Ranges are no kernels.
        kernels = [event for event in events if not event.key.startswith(RANGE)]
        dearest = sorted(kernels, key=lambda event: -getattr(event, sort))[:KERNELS]
        self.rows = [(event.key, int(event.count), getattr(event, sort) / 1e6) for event in dearest]
        (self.folder / "kernels.txt").write_text(f"{self.table}\n")
        profiler.export_chrome_trace(str(self.folder / "trace.json.gz"))


def _supported() -> set[Any]:
    return set(torch.profiler.supported_activities())


def synchronise() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def reset_peak() -> None:
    """Let the peak of memory begin with what is held now."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        # Linux: the peak of the resident memory begins anew.
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """The peak of memory since `reset_peak`, in bytes."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1])


def used() -> int:
    """Memory in use on the device, in bytes; 0 without one."""
    if not torch.cuda.is_available():
        return 0
    free, total = torch.cuda.mem_get_info()
    return int(total - free)


def median_of(steps: Sequence[Step], read: Callable[[Step], float]) -> float:
    """The median over the steps."""
    return statistics.median(read(step) for step in steps)
