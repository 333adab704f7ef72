"""The home's permissions: for its owner alone, or for its group if the group may write. Free of torch."""

import os
import stat
from pathlib import Path

from base.errors import UserError

OWNER = 0o700


def require_folder(place: Path) -> None:
    """Check that a home, or a folder in it, is a folder if it exists.

    Raises:
        UserError: it is not a folder, or a broken link.
    """
    if os.path.lexists(place) and not place.is_dir():
        fault = "is not a folder" if place.exists() else "is a broken link"
        raise UserError(f"{place}: {fault}; move it away, or choose another --home")


def keep_private(home: Path) -> None:
    """Make a home if there is none, and remove the permissions of other users.

    A home that its group may write to is shared by a team and stays open to the group; any other home is open to its
    owner alone. Files inside need no permissions of their own, because nobody else can enter. Only the owner can change
    the home's permissions, so for another member of the team they do not change.

    Args:
        home: `$MOPD_HOME`.
    """
    home.mkdir(mode=OWNER, parents=True, exist_ok=True)
    found = home.stat()
    mode = stat.S_IMODE(found.st_mode)
    # The group's other bits, such as setgid, by which new files inherit the group, are kept.
    closed = mode & ~0o007 if is_shared(home) else mode & ~0o077
    if closed != mode and found.st_uid == os.geteuid() and os.access(home, os.W_OK):
        home.chmod(closed)


def is_shared(home: Path) -> bool:
    """Whether a team shares a home, that is, whether its group may write to it."""
    return bool(home.stat().st_mode & stat.S_IWGRP)
