"""Co-evolution: the merged student is the start of the next round's experts (`merge.rounds`). Torch-free.

The last round's nodes are named as in a run of one round, because these are compared and promoted. Nodes of earlier
rounds have the prefixes `round1/`, `round2/`, …. A round that another run has made is found by its content keys.
"""

import re

_EARLIER = re.compile(r"round[1-9][0-9]*/")


def round_prefix(number: int, rounds: int) -> str:
    """The prefix of the names of a round's nodes; empty for the last round.

    Args:
        number: The round, from 1.
        rounds: The run's number of rounds.
    """
    return "" if number == rounds else f"round{number}/"


def without_round(name: str) -> str:
    """A node's name within its own round: `experts/sort` of `round1/experts/sort`."""
    return _EARLIER.sub("", name, count=1) if _EARLIER.match(name) else name
