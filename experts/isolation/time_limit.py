"""A limit on the processor time of one call of third-party code, such as a generator or a chat template."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from base.errors import UserError

AGAIN_SECONDS = 1.0


class _OverLimit(BaseException):
    """Not an `Exception`, because the limited code may catch those."""


@contextlib.contextmanager
def processor_limit(seconds: float, what: str) -> Iterator[None]:
    """Stop a block of Python that uses more processor time than this.

    Only the processor time of this process counts, so a busy machine or a wait for the network is not an error. A call
    into C is stopped when it returns. There is no limit outside the main thread, because Python runs no signal handlers
    there.

    Args:
        seconds: Processor time allowed.
        what: The start of the message: what took too long, and its key.

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
