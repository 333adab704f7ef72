"""The numbered starts of a run: their titles, and which of them were killed before their end was recorded.

A start is a file `runs/NAME/starts/NUMBER.open` with the identity of its process. The suffix is removed when the end of
the flow run is recorded, so a file with the suffix whose process is gone belongs to a killed start.
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from base.listeners import start_of
from base.store.checkpoint import Store
from flows.plan.lock import lock_path
from flows.plan.state_files import read_json
from flows.run_file.schema import COLD_START, RunConfig

OPEN = ".open"
SHOWN_OVERRIDES, NAME_LENGTH = 3, 100
EXPERTS = "experts/"


class Start:
    """One start of a run.

    Attributes:
        number: Number of the start, from 1.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.number = int(path.stem)

    @property
    def killed(self) -> bool:
        """Whether its end was not recorded and its process is gone; False for a start on another host."""
        try:
            kept = json.loads(self._path.read_text())
            host, pid, start = str(kept["host"]), int(kept["pid"]), int(kept["start"])
        except FileNotFoundError:
            return False
        except (ValueError, KeyError, TypeError):
            # The file is incomplete, so its process was killed while it wrote.
            return True
        return host == os.uname().nodename and start_of(pid) != start

    def close(self) -> None:
        """Mark its end as recorded; idempotent."""
        if self._path.suffix == OPEN and self._path.exists():
            self._path.rename(self._path.with_suffix(""))


def begin(home: Path, run: str) -> Start:
    """Create the file of a new start and return the start. Not safe for concurrent calls with the same name."""
    folder = _folder(home, run)
    folder.mkdir(parents=True, exist_ok=True)
    number = 1 + max((int(path.stem) for path in _files(folder)), default=0)
    path, pid = folder / f"{number}{OPEN}", os.getpid()
    path.write_text(json.dumps({"host": os.uname().nodename, "pid": pid, "start": start_of(pid)}))
    return Start(path)


def killed_starts(home: Path, run: str) -> list[Start]:
    """The killed starts of a run, in the order of their numbers."""
    opened = [path for path in _files(_folder(home, run)) if path.suffix == OPEN]
    return [start for path in sorted(opened, key=lambda path: int(path.stem)) if (start := Start(path)).killed]


def run_title(number: int, config: RunConfig, planned: Sequence[str], overrides: Sequence[str]) -> str:
    """A title that distinguishes a start from others of the same run: `lab #3, + digits, from champion`.

    Args:
        number: Number of the start.
        config: The run.
        planned: Names of the experts in the run's last lock; empty before the first lock.
        overrides: Dotted assignments that differ from the run file.
    """
    added = [name for name in config.experts if planned and name not in planned]
    gone = [name for name in planned if name not in config.experts]
    parts = [f"{config.name} #{number}", *(f"+ {name}" for name in added), *(f"- {name}" for name in gone)]
    start = config.merge.start_from if config.merge else None
    if start not in (None, COLD_START):
        parts.append(f"from {start}")
    shown = [each for each in overrides if not each.startswith(("name=", "merge.start_from="))]
    parts += shown[:SHOWN_OVERRIDES]
    title = ", ".join(parts)
    return title if len(title) <= NAME_LENGTH else title[: NAME_LENGTH - 1] + "…"


def planned_experts(home: Path, run: str) -> list[str]:
    """Names of the experts in a run's last lock; empty if there is no lock."""
    ids = [node.partition("@")[0] for node in read_json(lock_path(home, run)).get("nodes", {})]
    return list(dict.fromkeys(name.removeprefix(EXPERTS) for name in ids if name.startswith(EXPERTS)))


def _folder(home: Path, run: str) -> Path:
    return lock_path(home, run).with_name("starts")


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*") if path.stem.isdecimal() and path.suffix in ("", OPEN)]


def close_killed(home: Path, run: str) -> None:
    """Close the records that killed starts of a run left `RUNNING` in Prefect and MLflow.

    Without killed starts, no server is contacted.

    Raises:
        UserError: Prefect's server does not start, or does not answer.
    """
    killed = killed_starts(home, run)
    if not killed:
        return
    from flows.run.session import prefect_session

    sys.stderr.write(f"{run}: an earlier start was killed; closing its records\n")
    with prefect_session(home):
        from flows.run.crashed_runs import mark_crashed_runs

        mark_crashed_runs(run)
    from flows.champion.champion import send_operations

    send_operations(Store(home), run, [{"op": "close_killed"}])
    for start in killed:
        start.close()
