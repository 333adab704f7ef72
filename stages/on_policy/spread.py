"""Work shared out among servers, some of which may not live to finish it."""

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from stages.on_policy.vllm_server import ServerLostError, VllmServer

Answer = TypeVar("Answer")


def spread(
    items: Sequence[int],
    servers: Sequence[VllmServer],
    ask: Callable[[VllmServer, int], Answer],
    at_once: int,
    lost: Callable[[ServerLostError], None],
) -> list[tuple[VllmServer, dict[int, Answer], bool]]:
    """Let every server take items from one queue, `at_once` at a time; the quicker takes more.

    Args:
        items: What is to be answered.
        servers: Who may answer.
        ask: Asks one server about one item.
        at_once: Items a server works on together.
        lost: Told of a server that failed, once; what it had taken goes to the others.

    Returns:
        What each server answered, and whether it failed; an item nobody answered is missing.

    Raises:
        UserError: what `ask` raises besides losing a server.
    """
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for item in items:
        waiting.put(item)
    asked: list[tuple[VllmServer, dict[int, Answer], threading.Event]] = []
    asked += [(server, {}, threading.Event()) for server in servers]

    def work(server: VllmServer, answers: dict[int, Answer], failed: threading.Event) -> None:
        while not failed.is_set():
            try:
                item = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                answers[item] = ask(server, item)
            except ServerLostError as error:
                waiting.put(item)
                if not failed.is_set():
                    failed.set()
                    lost(error)

    workers = [entry for entry in asked for _ in range(max(1, min(at_once, len(items))))]
    with ThreadPoolExecutor(len(workers)) as pool:
        for future in [pool.submit(work, *entry) for entry in workers]:
            future.result()
    return [(server, answers, failed.is_set()) for server, answers, failed in asked]
