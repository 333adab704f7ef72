"""Ctrl-C, TERM and a terminal that closes end a command in the same way, and once. Free of everything but Python."""

import contextlib
import signal
import threading
from collections.abc import Iterator

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Whether an end is under way: a second signal would break off what puts things in order.
_ending = [False]


def interrupt(number: int, frame: object) -> None:
    """A signal handler: the first signal is a KeyboardInterrupt, later ones are nothing."""
    if not _ending[0]:
        _ending[0] = True
        raise KeyboardInterrupt


def interrupt_once(*, background: bool = False) -> None:
    """Let the signals of `ENDING` interrupt this process, once, from now on.

    Args:
        background: Also where they are ignored, as SIGINT is in a command that a script starts in the background.
            SIGHUP stays ignored in any case: `nohup` asked for that.
    """
    for number in ENDING:
        ignored = signal.getsignal(number) is signal.SIG_IGN
        if not ignored or (background and number != signal.SIGHUP):
            signal.signal(number, interrupt)


@contextlib.contextmanager
def interruptible(*, background: bool = False) -> Iterator[None]:
    """`interrupt_once` for as long as it lasts; nothing outside the main thread, which alone hears signals."""
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
