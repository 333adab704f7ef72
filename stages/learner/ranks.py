"""Agreement of the processes of one node before a stage begins, and waits that are no collective."""

import itertools
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import PrefixStore, TCPStore

# Longest time that other ranks wait for rank 0; the launcher ends a stage that takes longer than its time-out.
_LONGEST_WAIT = timedelta(days=30)
# Shared by all threads of a process.
_limits: list[timedelta | None] = [None]
_boards: list[PrefixStore] = []
_turns = itertools.count()


def use_threads(count: int) -> None:
    """Set the number of CPU threads that torch uses in this process."""
    torch.set_num_threads(count)


@contextmanager
def collectives_limited(limit: timedelta | None) -> Iterator[None]:
    """A context in which process groups are made with this time-out of their collectives; None leaves the backend's
    default, which is 10 minutes with NCCL."""
    _limits.append(limit)
    try:
        yield
    finally:
        _limits.pop()


def collectives_limit() -> timedelta | None:
    """The time-out of collectives in the present context."""
    return _limits[-1]


def agree(decide: Callable[[], Any]) -> Any:
    """Return rank 0's decision on every rank of torchrun, before any of them enters a collective.

    Args:
        decide: Called on rank 0 only; its result must be JSON-serialisable.
    """
    if _alone():
        return decide()
    if os.environ["RANK"] == "0":
        _board().set("decision", json.dumps(decide()))
    return json.loads(_board().get("decision"))


def while_others_wait(work: Callable[[], None]) -> None:
    """Run work on rank 0 alone; the other ranks return when it has ended.

    They wait for an entry of torchrun's store, not in a collective, so the work may take longer than the time-out of
    collectives. All ranks must call it. If the work fails, rank 0 ends, and torchrun ends the others.
    """
    if _alone():
        work()
        return
    turn = f"turn-{next(_turns)}"
    if os.environ["RANK"] == "0":
        work()
        _board().set(turn, "done")
    else:
        _board().wait([turn], _LONGEST_WAIT)


def _alone() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) == 1


def _board() -> PrefixStore:
    """This process's connection to torchrun's store."""
    if not _boards:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(address, port, is_master=False, timeout=_LONGEST_WAIT)
        _boards.append(PrefixStore("mopd", store))
    return _boards[0]
