"""Checks whether a process listens on a port, as another server may use the port before it starts or after it ends."""

from pathlib import Path

import psutil


def start_of(pid: int) -> int:
    """The start time of a process in clock ticks since boot, which does not change when the clock is set.

    Returns:
        0 for a process that has ended, or is a zombie.
    """
    try:
        # The name, in parentheses, may contain any character; the state is the field after it.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 0 if fields[0] in "ZX" else int(fields[19])


def listens(pid: int, port: int) -> bool:
    """Whether a process or a descendant listens on a port; False for another user's, which cannot be inspected."""
    try:
        leader = psutil.Process(pid)
        family = [leader, *leader.children(recursive=True)]
    except psutil.NoSuchProcess:
        return False
    return any(port in _ports(process) for process in family)


def _ports(process: psutil.Process) -> set[int]:
    try:
        found = process.net_connections("inet")
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return set()
    return {each.laddr.port for each in found if each.status == psutil.CONN_LISTEN}
