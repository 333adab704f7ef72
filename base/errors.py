"""Errors that a user can fix, reported in one message."""

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
    """A mistake that the user can fix: the message names the file, key or domain and the valid choice.

    The command line prints it without a traceback and exits with code 2.
    """


class InfrastructureError(Exception):
    """A fault of a machine or the network; the same work may succeed in a new attempt."""


def is_unreachable(error: BaseException) -> bool:
    """Whether an error of any of the HTTP libraries means that the network or the server cannot be reached."""
    kinds = {f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__}
    return not kinds.isdisjoint(_UNREACHABLE)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type's name if it has no message."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def nearest(word: str, choices: Iterable[str]) -> str:
    """Name the valid choice closest to `word`, as the end of an error message.

    Returns:
        `" — did you mean 'x'?"`, or the list of choices if none is close.
    """
    valid = sorted(choices)
    close = difflib.get_close_matches(word, valid, n=1, cutoff=0.5)
    if close:
        return f" — did you mean '{close[0]}'?"
    return f" — valid: {', '.join(valid)}" if valid else ""
