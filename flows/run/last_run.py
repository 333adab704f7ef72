"""The overrides of the last run of each run file, kept in the home as the default of `report`, `status` and `plan`."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from base.store.checkpoint import write_whole
from flows.plan.lock import lock_path
from flows.plan.state_files import read_json

MEMORY_FILE = "asked.json"


@dataclass(frozen=True)
class LastRun:
    """The last run of a run file.

    Attributes:
        overrides: Dotted assignments to its keys.
        max_steps: Cap on the steps of every stage.
        time: Time of its start, in seconds since the epoch.
    """

    overrides: tuple[str, ...]
    max_steps: int | None
    time: float


def remember(home: Path, run: str, file: Path, overrides: Sequence[str], max_steps: int | None) -> None:
    """Save the overrides of a run.

    Args:
        home: `$MOPD_HOME`.
        run: Name of the run.
        file: The run file.
        overrides: Dotted assignments to its keys.
        max_steps: Cap on the steps of every stage.
    """
    path = lock_path(home, run).with_name(MEMORY_FILE)
    path.parent.mkdir(parents=True, exist_ok=True)
    newest = LastRun(tuple(overrides), max_steps, time.time())
    write_whole(path, json.dumps(read_json(path) | {os.path.realpath(file): asdict(newest)}, indent=1))


def words(overrides: Sequence[str], max_steps: int | None) -> list[str]:
    """The arguments that follow the run file on the command line."""
    return [*overrides, *(["--max-steps", str(max_steps)] if max_steps else [])]


def newest_of(home: Path, run: str) -> tuple[Path, LastRun] | None:
    """The run file of the last run of a name, and that run; None if there was none."""
    kept = read_json(lock_path(home, run).with_name(MEMORY_FILE))
    return max(((Path(file), _read(one)) for file, one in kept.items()), key=lambda pair: pair[1].time, default=None)


def last_run(home: Path, file: Path) -> LastRun | None:
    """The newest run of a file, under any name, as overrides may change the name; None if there was none."""
    place = os.path.realpath(file)
    found = [read_json(path).get(place) for path in (home / "runs").glob(f"*/{MEMORY_FILE}")]
    return max((_read(one) for one in found if one), key=lambda run: run.time, default=None)


def _read(kept: Mapping[str, Any]) -> LastRun:
    return LastRun(tuple(kept["overrides"]), kept["max_steps"], float(kept["time"]))
