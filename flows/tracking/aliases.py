"""The aliases of a run's registered model, as operations of the outbox."""

from typing import TYPE_CHECKING, Any

from flows.plan.champion_history import (
    CANDIDATE_ALIAS,
    registered_name,
)
from flows.plan.graph import Node

if TYPE_CHECKING:
    pass


def alias_operations(run: str, candidate: Node | None) -> list[dict[str, Any]]:
    """What the tracker's outbox is told: whose version is the candidate, and to look who is champion."""
    said: list[dict[str, Any]] = []
    if candidate is not None:
        about = {"name": registered_name(run), "key": candidate.key}
        said.append({"op": "version", **about, "seed": str(candidate.seed)})
        said.append({"op": "alias", **about, "alias": CANDIDATE_ALIAS})
    return [*said, {"op": "champion", "run": run}]
