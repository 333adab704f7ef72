"""A user's mistake, said in one message."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake the user can mend: the message names the file, key or domain and what would be valid.

    The command line prints it without a traceback and exits with code 2.
    """


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
