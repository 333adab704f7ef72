"""A process that does not outlive its parent. Needs only the standard library."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)


def end_with_parent(number: signal.Signals = signal.SIGTERM) -> None:
    """Make the kernel send this process a signal when its parent dies (Linux)."""
    if _LIBC.prctl(_PR_SET_PDEATHSIG, number) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")


def die_with_parent(parent: int) -> None:
    """Make the kernel kill this process when its parent dies (Linux).

    Args:
        parent: Process id of the parent; if it is already gone, this process is killed at once.
    """
    end_with_parent(signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def main(arguments: list[str]) -> None:
    """Become another program that dies with this process's parent.

    Args:
        arguments: The parent's process id, then the program with its arguments.
    """
    die_with_parent(int(arguments[0]))
    os.execvp(arguments[1], arguments[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
