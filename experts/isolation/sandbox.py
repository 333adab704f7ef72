"""Runs a model's code in pydantic-monty's sandbox and returns plain values.

Only the outputs of the calls leave the sandbox. The expected outputs remain on the host and are compared there by exact
type (`same_value`), so a candidate can neither read nor shadow a test, and its own `__eq__` is never run.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.util import Finalize
from typing import Any

Value = Any
PLAIN_TYPES = (bool, int, float, complex, str, bytes, type(None))
# Repairs may sum in another order; the tests of HumanEval allow a millionth.
FLOAT_TOLERANCE = 1e-9


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one run.

    Attributes:
        seconds: Execution time of each of the two steps, definition and calls.
        memory_bytes: Heap of the interpreter.
        recursion_depth: Depth of the call stack.
    """

    seconds: float = 1.0
    memory_bytes: int = 64 * 1024 * 1024
    recursion_depth: int = 200


@dataclass(frozen=True, slots=True)
class Failure:
    """The reason why a run gave no values.

    Attributes:
        reason: The interpreter's or the host's message.
        lost: Whether the sandbox's process ended, so that the code may not be the cause.
    """

    reason: str
    lost: bool = False


def run_calls(
    code: str, entry: str, arguments: Sequence[Sequence[Value]], limits: Limits | None = None
) -> list[Value] | Failure:
    """Define `code` in a fresh sandbox and call `entry` once with each tuple of arguments.

    Printing is collected and dropped; the clock, memory and recursion are limited; sleeping is not allowed.

    Args:
        code: Untrusted source text.
        entry: Name of the function to call.
        arguments: Plain values, one sequence of positional arguments for each call.
        limits: Limits of the run; `Limits()` by default.

    Returns:
        The outputs in order, or a `Failure` if the code is malformed, raises, exceeds a limit or kills its worker.
    """
    import pydantic_monty

    if not entry.isidentifier():
        return Failure(f"not a function name: {entry!r}")
    limits = limits or Limits()
    budget: pydantic_monty.ResourceLimits = {
        "max_feed_duration_secs": limits.seconds,
        "max_memory": limits.memory_bytes,
        "max_recursion_depth": limits.recursion_depth,
        "max_total_sleep_secs": 0.0,
        "max_suspensions": 1,
    }
    silent = pydantic_monty.CollectString(max_bytes=1024 * 1024)
    calls = [tuple(call) for call in arguments]
    # If no worker is available, the host is at fault: this raises and is not scored.
    with _POOLS.get().checkout(limits=budget) as session:
        try:
            session.feed_run(code, print_callback=silent)
            outputs = session.feed_run(
                f"[{entry}(*call) for call in calls]", inputs={"calls": calls}, print_callback=silent
            )
        except (pydantic_monty.MontyError, ValueError, TypeError, OverflowError, RuntimeError, MemoryError) as error:
            return Failure(
                f"{type(error).__name__}: {error}"[:200], isinstance(error, pydantic_monty.MontyCrashedError)
            )
    if type(outputs) is not list or len(outputs) != len(calls):
        return Failure("the calls were tampered with")
    return outputs


def passes(
    code: str,
    entry: str,
    arguments: Sequence[Sequence[Value]],
    expected: Sequence[Value],
    limits: Limits | None = None,
) -> bool:
    """Whether every call of `entry` gives exactly the expected value (see `same_value`)."""
    outputs = run_calls(code, entry, arguments, limits)
    return not isinstance(outputs, Failure) and same_value(outputs, list(expected))


def same_value(left: Value, right: Value) -> bool:
    """Equality of plain values by exact type, at every depth: `True`, `1` and `1.0` all differ.

    Floats agree within a relative 1e-9, NaN with NaN.

    Anything but a plain value, list, tuple, dict, set or frozenset is unequal to everything.
    """
    kind = type(left)
    if kind is not type(right):
        return False
    if kind is float:
        return math.isclose(left, right, rel_tol=FLOAT_TOLERANCE) or (math.isnan(left) and math.isnan(right))
    if kind in PLAIN_TYPES:
        return bool(left == right)
    if kind in (list, tuple):
        return len(left) == len(right) and all(map(same_value, left, right))
    if kind in (set, frozenset, dict):
        return _same_members(left, right)
    return False


def _same_members(left: Value, right: Value) -> bool:
    if left.keys() != right.keys() if isinstance(left, dict) else left != right:
        return False
    # Equal keys may still differ in type: {1: x} == {True: x}.
    twins = {key: key for key in right}
    if not all(same_value(key, twins[key]) for key in left):
        return False
    return not isinstance(left, dict) or all(same_value(left[key], right[key]) for key in left)


class _Pools:
    """The sandbox's worker pool of this process, made at the first use and closed at exit."""

    def __init__(self) -> None:
        self._pool: Any = None
        self._pid: int | None = None

    def get(self) -> Any:
        """The pool of the current process.

        Raises:
            RuntimeError: this process was forked from one that had already run code. The pool's native runtime does not
                survive a fork (it would wait forever); merely importing this module before the fork is safe.
        """
        if self._pid is None:
            import pydantic_monty

            self._pool = pydantic_monty.Monty().__enter__()
            self._pid = os.getpid()
            # Unlike atexit, this also runs at the end of a multiprocessing child.
            Finalize(None, self.close, exitpriority=0)
        if self._pid != os.getpid():
            raise RuntimeError(
                f"process {os.getpid()} was forked from {self._pid} after that had run code in the sandbox; "
                "fork before the first run, or start processes by 'spawn' or 'forkserver'"
            )
        return self._pool

    def close(self) -> None:
        """End the workers of this process, so that none is left running; the pool cannot be used afterwards."""
        if self._pid == os.getpid():
            self._pool.__exit__(None, None, None)


_POOLS = _Pools()
