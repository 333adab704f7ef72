"""The champions of a run, read from their file. Free of prefect and mlflow."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from base.store.checkpoint import Store
from flows.plan.lock import lock_path
from flows.plan.state_files import CHAMPION_FILE, read_json
from flows.run_file.schema import STUDENT

CANDIDATE_ALIAS, CHAMPION_ALIAS = "candidate", "champion"

By = Literal["gate", "person"]


@dataclass(frozen=True)
class ChampionRecord:
    """One entry of the history: from `when` on, this checkpoint is champion.

    Attributes:
        student: Its content key.
        node: Its node id in the run that made it, such as `student@0` or `baselines/ties@0`.
        scores: domain -> content key of its held-out sheet, with which the next candidate is compared.
        when: UTC, ISO 8601, to the second.
        by: `gate` or `person`.
        reason: The reason of the decision.
        action: `promote`, or `rollback` for a former champion that came back.
        against: Content keys that a person decided against: the previous champion, and the run's candidate at that
            time.
    """

    student: str
    node: str
    scores: Mapping[str, str]
    when: str
    by: By
    reason: str
    action: Literal["promote", "rollback"] = "promote"
    against: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.node} (key {self.student})"

    @property
    def decision(self) -> str:
        """By whom and when it was decided, and the reason."""
        who = "by the gate" if self.by == "gate" else "by a person"
        return f"{who}, {self.when}: {self.reason}"

    @property
    def since(self) -> str:
        """Since when, by whom, and a person's reason."""
        who = "by the gate" if self.by == "gate" else f"by a person: {self.reason}"
        return f"{datetime.fromisoformat(self.when):%Y-%m-%d %H:%M} UTC, {who}"


def read_history(store: Store, run: str) -> list[ChampionRecord]:
    """The champions of a run, the present one last; empty if there was none."""
    path = champion_path(store, run)
    if not path.exists():
        return []
    entries = read_json(path)["history"]
    return [ChampionRecord(**entry | {"against": tuple(entry["against"])}) for entry in entries]


def champion_path(store: Store, run: str) -> Path:
    """The file that holds the history."""
    return lock_path(store.home, run).with_name(CHAMPION_FILE)


def registered_name(run: str) -> str:
    """The registered model of a run's merges."""
    return f"{run}-{STUDENT}"


def iso_seconds(moment: datetime) -> str:
    """A moment in ISO 8601, to the second."""
    return moment.isoformat(timespec="seconds")
