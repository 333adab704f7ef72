"""Agreement of the processes of one node before a stage begins."""

import json
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import PrefixStore, TCPStore


def use_threads(count: int) -> None:
    """Set the number of CPU threads that torch uses in this process."""
    torch.set_num_threads(count)


def agree(decide: Callable[[], Any], longest_wait: timedelta) -> Any:
    """Return rank 0's decision on every rank of torchrun, before any of them enters a collective.

    Args:
        decide: Called on rank 0 only; its result must be JSON-serialisable.
        longest_wait: Longest time that the other ranks wait for it.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return decide()
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    board = PrefixStore("mopd", TCPStore(address, port, is_master=False, timeout=longest_wait))
    if os.environ["RANK"] == "0":
        board.set("decision", json.dumps(decide()))
    return json.loads(board.get("decision"))
