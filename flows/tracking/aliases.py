"""The aliases of a run's registered model, as operations of the outbox."""

from typing import Any

from flows.plan.champion_history import CANDIDATE_ALIAS, registered_name
from flows.plan.nodes import Node


def alias_operations(run: str, candidate: Node | None) -> list[dict[str, Any]]:
    """Operations that set the alias of the candidate's version, if there is one, and update the champion's."""
    operations: list[dict[str, Any]] = []
    if candidate is not None:
        about = {"name": registered_name(run), "key": candidate.key}
        operations.append({"op": "version", **about, "seed": str(candidate.seed)})
        operations.append({"op": "alias", **about, "alias": CANDIDATE_ALIAS})
    return [*operations, {"op": "champion", "run": run}]
