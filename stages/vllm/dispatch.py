"""Dispatches work to several servers; the items of a server that fails go to the others."""

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from stages.vllm.server import ServerLostError, VllmServer

Answer = TypeVar("Answer")


def dispatch(
    items: Sequence[int],
    servers: Sequence[VllmServer],
    ask: Callable[[VllmServer, int], Answer],
    at_once: int,
    lost: Callable[[ServerLostError], None],
) -> list[tuple[VllmServer, dict[int, Answer], bool]]:
    """Assign items to servers round robin, at most `at_once` each; a server takes another as soon as it answers one.

    So even a batch that one server could take alone is shared by all, and of a longer batch faster servers take more.

    Args:
        items: The items to process.
        servers: The servers.
        ask: Requests one item from one server.
        at_once: Items that a server processes at the same time.
        lost: Called once for each server that fails; its unfinished items go to the others.

    Returns:
        Each server with its answers by item, and whether it failed; an item without an answer is missing.

    Raises:
        UserError: raised by `ask`, as any error other than `ServerLostError`.
    """
    states: list[tuple[VllmServer, dict[int, Answer], threading.Event]] = []
    states += [(server, {}, threading.Event()) for server in servers]
    workers = [entry for _ in range(max(1, at_once)) for entry in states][: len(items)]
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for item in items[len(workers) :]:
        waiting.put(item)

    def work(server: VllmServer, answers: dict[int, Answer], failed: threading.Event, item: int) -> None:
        while not failed.is_set():
            try:
                answers[item] = ask(server, item)
            except ServerLostError as error:
                if not failed.is_set():
                    failed.set()
                    lost(error)
                break
            try:
                item = waiting.get_nowait()
            except queue.Empty:
                return
        waiting.put(item)

    with ThreadPoolExecutor(max(1, len(workers))) as pool:
        futures = [pool.submit(work, *entry, item) for entry, item in zip(workers, items, strict=False)]
        for future in futures:
            future.result()
    return [(server, answers, failed.is_set()) for server, answers, failed in states]
