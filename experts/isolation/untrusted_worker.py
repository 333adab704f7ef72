"""The child of `experts.isolation.untrusted`: runs third-party verifiers on a model's text, isolated from the machine.

It is started as `python -m experts.isolation.untrusted_worker LIBRARY PARENT_PID` with a socket as its standard input,
on which it answers each line of JSON with one line. Its restrictions, outermost first:

- The kernel kills it with its parent, and at its limits of CPU seconds and memory. It cannot write to files,
  holds few descriptors and, where a namespace is permitted, has no network. Its environment has only what Python needs.
- RLIMIT_NPROC prevents forking, except for root, which Linux exempts; the audit hook prevents it in either case.
- Once its library is imported, an audit hook refuses every event that verifying does not need: a file opened for
  writing or outside Python's own folders, a process, a socket, a signal, a foreign function. The hook cannot be
  removed. It raises before the action, so a verifier that catches the error continues without it. CPython attempts
  such actions itself: a SyntaxError in evaluated text looks for a file called `<unknown>` to show its line.

A text that is evaluated here can reach Python's attributes, and through them could still forge this process's answer.
`experts.kinds.reasoning.is_safe_to_verify` refuses such texts beforehand.
"""

import ctypes
import json
import os
import re
import resource
import signal
import socket
import sys
import sysconfig
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

MEMORY_BYTES = 2 * 1024**3
DESCRIPTORS = 64
# The parent replaces the worker before it has used this much; only a worker without a parent reaches the limit.
CPU_SECONDS = 1200
# Number of a text's refused actions that the reply names.
MOST_NAMED = 8

_PR_SET_PDEATHSIG = 1
_PR_SET_NO_NEW_PRIVS = 38
_CLONE_NEWUSER = 0x10000000
_CLONE_NEWNET = 0x40000000
_OPEN = "open"
_NEEDED_EVENTS = frozenset({
    "array.__new__", "builtins.id", "code.__new__", "compile", "exec", "function.__new__", "import", "marshal.load",
    "marshal.loads", "object.__delattr__", "object.__getattr__", "object.__setattr__", "os.listdir", "os.scandir",
    "sys._getframe",
})  # fmt: skip
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

Verifier = Callable[..., Any]


def main(library: str, parent: int) -> None:
    """Answer requests on standard input until it is closed."""
    channel = socket.socket(fileno=os.dup(0))
    lines = channel.makefile("rb")
    os.dup2(1, 0)
    _leave_the_network()
    _die_with(parent)
    _limit(resource.RLIMIT_AS, MEMORY_BYTES)
    _limit(resource.RLIMIT_CPU, CPU_SECONDS)
    _limit(resource.RLIMIT_CORE, 0)
    verifiers = _LIBRARIES[library]()
    # Earlier errors appear on the parent's standard error; the output of verifiers is discarded.
    os.dup2(1, 2)
    _send(channel, {"started": library})
    # Set after the imports, which may write caches.
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_NPROC, 0)
    _limit(resource.RLIMIT_NOFILE, DESCRIPTORS)
    warnings.simplefilter("ignore")
    refused: list[str] = []
    sys.addaudithook(_hook(refused))
    for line in lines:
        asked = json.loads(line)
        refused.clear()
        reply = _answer(verifiers[asked["verifier"]], asked["arguments"])
        _send(channel, {"token": asked["token"], "actions_refused": refused[:MOST_NAMED]} | reply)


def _answer(verifier: Verifier, arguments: Mapping[str, Any]) -> dict[str, Any]:
    try:
        reply = {"value": verifier(**arguments)}
    except Exception as error:  # noqa: BLE001 - a hundred verifiers raise whatever their parsers raise; it is sent
        reply = {"refused": f"{type(error).__name__}: {error}"[:500]}
    return reply | {"cpu_seconds": time.process_time()}


def _reasoning() -> dict[str, Verifier]:
    from experts.isolation.gym import import_reasoning_gym

    reasoning_gym = import_reasoning_gym()
    made: dict[str, Any] = {}

    def prepare(key: str, task: str, parameters: Mapping[str, Any], size: int) -> None:
        made[key] = reasoning_gym.create_dataset(task, seed=0, size=size, **parameters)

    def score(key: str, answer: str, entry: dict[str, Any]) -> float:
        return float(made[key].score_answer(answer, entry))

    return {"prepare": prepare, "score": score}


def _values() -> dict[str, Verifier]:
    from experts.scoring.values import has_value, same_value

    return {"same_value": same_value, "has_value": has_value}


def _patterns() -> dict[str, Verifier]:
    def last_span(pattern: str, text: str) -> tuple[int, int] | None:
        spans = [match.span(1) for match in re.finditer(pattern, text) if match[1] is not None]
        return spans[-1] if spans else None

    return {"last_span": last_span}


_LIBRARIES = {"patterns": _patterns, "reasoning": _reasoning, "values": _values}


def _leave_the_network() -> None:
    """Enter an empty network namespace; if a container permits neither way, only the audit hook blocks the network."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET) != 0:
        libc.unshare(_CLONE_NEWNET)


def _die_with(parent: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    for option, value in ((_PR_SET_PDEATHSIG, signal.SIGKILL), (_PR_SET_NO_NEW_PRIVS, 1)):
        if libc.prctl(option, value, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), f"prctl({option})")
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def _limit(limit: int, value: int) -> None:
    _, hard = resource.getrlimit(limit)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(limit, (value, value))


def _hook(refused: list[str]) -> Callable[[str, tuple[Any, ...]], None]:
    places = {*sys.path, *sysconfig.get_paths().values(), sys.prefix, sys.base_prefix, "/usr/share/zoneinfo"}
    folders = tuple(os.path.realpath(place) + os.sep for place in places if place)

    def hook(event: str, details: tuple[Any, ...]) -> None:
        if event in _NEEDED_EVENTS or (event == _OPEN and _only_reads(details, folders)):
            return
        if len(refused) < MOST_NAMED:
            refused.append(f"{event} {details!r}"[:300])
        raise PermissionError(f"{event}: a verifier may not do this")

    return hook


def _only_reads(details: tuple[Any, ...], folders: tuple[str, ...]) -> bool:
    path, _, flags = details
    # A subclass could show one path to this check and open another.
    return type(path) is str and not flags & _WRITING and os.path.realpath(path).startswith(folders)


def _send(channel: socket.socket, reply: Mapping[str, Any]) -> None:
    channel.sendall(json.dumps(reply).encode() + b"\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
