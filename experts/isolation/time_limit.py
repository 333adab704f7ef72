"""A limit on what one call of somebody else's code may compute: a generator, a chat template."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from base.errors import UserError

AGAIN_SECONDS = 1.0


class _OverLimit(BaseException):
    """Not an `Exception`, which the code under the limit may catch."""


@contextlib.contextmanager
def processor_limit(seconds: float, what: str) -> Iterator[None]:
    """Stop a block of Python that computes for longer than this.

    It counts the processor time of this process, so a slow machine, a busy one and a wait for the network are no fault.
    A call into C is stopped when it returns. Outside the main thread, where Python runs no signal handler, there is no
    limit.

    Args:
        seconds: Processor time allowed.
        what: Begins the message: what took so long, and the key it stands under.

    Raises:
        UserError: the block took longer.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise _OverLimit

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, AGAIN_SECONDS)
    try:
        yield
    except _OverLimit:
        raise UserError(f"{what} takes more than {seconds:g} s of processor time") from None
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
