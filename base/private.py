"""The home's permissions: its owner's alone, or its group's where the group may write. Free of torch."""

import os
import stat
from pathlib import Path

from base.errors import UserError

OWNER = 0o700


def require_folder(place: Path) -> None:
    """See that a home, or a folder in it, is a folder if it is there.

    Raises:
        UserError: it is something else, or a link to what is not there.
    """
    if os.path.lexists(place) and not place.is_dir():
        what = "is no folder" if place.exists() else "leads to nothing"
        raise UserError(f"{place}: {what}; move it away, or choose another --home")


def keep_private(home: Path) -> None:
    """Make a home where there is none, and close it to everybody it is not for.

    A home that its group may write to is shared by a team and stays open to the group; every other one is open to its
    owner alone. What lies inside needs no permissions of its own: nobody else enters. Only the owner can change them,
    so another member of the team leaves them as they are.

    Args:
        home: `$MOPD_HOME`.
    """
    home.mkdir(mode=OWNER, parents=True, exist_ok=True)
    found = home.stat()
    mode = stat.S_IMODE(found.st_mode)
    # The group's other bits, such as the one that hands the group down, stay.
    closed = mode & ~0o007 if is_shared(home) else mode & ~0o077
    if closed != mode and found.st_uid == os.geteuid() and os.access(home, os.W_OK):
        home.chmod(closed)


def is_shared(home: Path) -> bool:
    """Whether a team shares a home: its group may write to it."""
    return bool(home.stat().st_mode & stat.S_IWGRP)
