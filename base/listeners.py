"""Which process listens on a port. Another server may take the port of one that has ended, or has not begun yet."""

from pathlib import Path

import psutil


def start_of(pid: int) -> int:
    """When a process started, in clock ticks since the machine did: no setting of the clock moves it.

    Returns:
        0 for one that is gone, or dead and only waiting to be reaped.
    """
    try:
        # The name, in parentheses, may hold anything; the state is the field behind it.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 0 if fields[0] in "ZX" else int(fields[19])


def listens(pid: int, port: int) -> bool:
    """Whether a process or one below it listens on a port; a process of another user cannot be looked at, so False."""
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
