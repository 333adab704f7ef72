"""A user's mistake, said in one message."""

import difflib
from collections.abc import Iterable

_UNREACHABLE = {
    "builtins.ConnectionError",
    "builtins.TimeoutError",
    "httpx.TransportError",
    "httpx2.TransportError",
    "requests.exceptions.ConnectionError",
    "requests.exceptions.Timeout",
}


class UserError(Exception):
    """A mistake the user can mend: the message names the file, key or domain and what would be valid.

    The command line prints it without a traceback and exits with code 2.
    """


def is_unreachable(error: BaseException) -> bool:
    """Whether the network, or whoever should answer, is not there; by whichever of the HTTP libraries it was asked."""
    kinds = {f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__}
    return not kinds.isdisjoint(_UNREACHABLE)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def nearest(word: str, choices: Iterable[str]) -> str:
    """Name the valid choice closest to `word`, as the tail of an error message.

    Returns:
        `" — did you mean 'x'?"`, or the list of choices when none is close.
    """
    known = sorted(choices)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f" — did you mean '{close[0]}'?"
    return f" — valid: {', '.join(known)}" if known else ""
