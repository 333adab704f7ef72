"""Looking at processes from a test."""

import time
from collections.abc import Callable
from typing import Any

import psutil


def eventually(condition: Callable[[], Any], within: float = 60.0) -> Any:
    """Wait until the condition holds; returns its value."""
    deadline = time.monotonic() + within
    while not (value := condition()):
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)
    return value


def jobs_of(supervisor: int) -> list[psutil.Process]:
    """The node processes below a supervisor: the children of its fork servers."""
    return [job for server in psutil.Process(supervisor).children() for job in server.children()]


def ended(pid: int) -> bool:
    """Whether the process is gone, or dead and only waiting to be reaped by whoever adopted it."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
