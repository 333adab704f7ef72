"""Ctrl-C, TERM and a closed terminal interrupt a command in the same way, and once. Needs only the standard library."""

import contextlib
import signal
import threading
from collections.abc import Iterator

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Whether an interrupt is being handled: a second signal would abort the clean-up.
_ending = [False]


def interrupt(number: int, frame: object) -> None:
    """A signal handler: the first signal raises KeyboardInterrupt, later ones are ignored."""
    if not _ending[0]:
        _ending[0] = True
        raise KeyboardInterrupt


def interrupt_once(*, background: bool = False) -> None:
    """Let the signals of `ENDING` interrupt this process, once, from now on.

    Args:
        background: Also handle signals that are ignored, as SIGINT is in a command that a script starts in the
            background. An ignored SIGHUP stays ignored in any case, because `nohup` requested that.
    """
    for number in ENDING:
        ignored = signal.getsignal(number) is signal.SIG_IGN
        if not ignored or (background and number != signal.SIGHUP):
            signal.signal(number, interrupt)


def keep_exit_code() -> None:
    """Let this process, started by `python -m`, end with its exit code even if it was interrupted.

    CPython ends it by SIGINT instead if the interrupt came while `exec` ran a text, as it does in an import of
    dataclasses. Running another text lets CPython forget that.
    """
    exec("")


@contextlib.contextmanager
def interruptible(*, background: bool = False) -> Iterator[None]:
    """A context with `interrupt_once`; without effect outside the main thread, the only one that receives signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in ENDING}
    outermost = interrupt not in before.values()
    interrupt_once(background=background)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if outermost:
            _ending[0] = False
