"""Co-evolution: the merged student is the start of the next round's experts (`merge.rounds`). Torch-free.

The last round's nodes are called as a run of one round calls them, for they are what is compared and promoted; those
before stand under `round1/`, `round2/`, …. A round that another run has made is found by its content.
"""

import re

_EARLIER = re.compile(r"round[1-9][0-9]*/")


def round_prefix(number: int, rounds: int) -> str:
    """What the names of a round's nodes begin with; nothing in the last.

    Args:
        number: The round, from 1.
        rounds: How many the run has.
    """
    return "" if number == rounds else f"round{number}/"


def without_round(name: str) -> str:
    """A node's name as its own round calls it: `experts/sort` of `round1/experts/sort`."""
    return _EARLIER.sub("", name, count=1) if _EARLIER.match(name) else name
