"""Which overrides the last run of a run file had, kept in the home: what `report`, `status` and `plan` speak of."""

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
    """How a run file was last run.

    Attributes:
        overrides: Dotted assignments to its keys.
        max_steps: Cap on the steps of every stage.
        time: When it was started, in seconds since the epoch.
    """

    overrides: tuple[str, ...]
    max_steps: int | None
    time: float


def remember(home: Path, run: str, file: Path, overrides: Sequence[str], max_steps: int | None) -> None:
    """Note what a run was asked for.

    Args:
        home: `$MOPD_HOME`.
        run: Name of the run.
        file: Its run file.
        overrides: Dotted assignments to its keys.
        max_steps: Cap on the steps of every stage.
    """
    path = lock_path(home, run).with_name(MEMORY_FILE)
    path.parent.mkdir(parents=True, exist_ok=True)
    asked = LastRun(tuple(overrides), max_steps, time.time())
    write_whole(path, json.dumps(read_json(path) | {os.path.realpath(file): asdict(asked)}, indent=1))


def words(overrides: Sequence[str], max_steps: int | None) -> list[str]:
    """What stands behind the run file on the command line."""
    return [*overrides, *(["--max-steps", str(max_steps)] if max_steps else [])]


def newest_of(home: Path, run: str) -> tuple[Path, LastRun] | None:
    """The run file of the last run of a name, and how it was run; None where there was none."""
    kept = read_json(lock_path(home, run).with_name(MEMORY_FILE))
    return max(((Path(file), _read(one)) for file, one in kept.items()), key=lambda pair: pair[1].time, default=None)


def last_run(home: Path, file: Path) -> LastRun | None:
    """The newest run of a file, under whatever name its overrides gave it; None where there was none."""
    place = os.path.realpath(file)
    found = [read_json(path).get(place) for path in (home / "runs").glob(f"*/{MEMORY_FILE}")]
    return max((_read(one) for one in found if one), key=lambda run: run.time, default=None)


def _read(kept: Mapping[str, Any]) -> LastRun:
    return LastRun(tuple(kept["overrides"]), kept["max_steps"], float(kept["time"]))
