"""Work shared out among servers, some of which may not live to finish it."""

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
    """Deal every server a first share in turn, at most `at_once`, and let it take the rest as it answers.

    So a batch that one server could take whole is still everybody's, and of a longer one the quicker take more.

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
    asked: list[tuple[VllmServer, dict[int, Answer], threading.Event]] = []
    asked += [(server, {}, threading.Event()) for server in servers]
    workers = [entry for _ in range(max(1, at_once)) for entry in asked][: len(items)]
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
        dealt = [pool.submit(work, *entry, item) for entry, item in zip(workers, items, strict=False)]
        for future in dealt:
            future.result()
    return [(server, answers, failed.is_set()) for server, answers, failed in asked]
