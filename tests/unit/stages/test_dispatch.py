"""Work dealt to servers: everybody's from the start, the quicker takes more, and what one leaves others do."""

import threading
from dataclasses import dataclass, field

import pytest

from base.errors import UserError
from stages.vllm.dispatch import dispatch
from stages.vllm.server import ServerLostError


@dataclass
class Fake:
    """Answers with its name, once it may."""

    url: str
    may: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self):
        self.may.set()


def answer(server: Fake, item: int) -> str:
    server.may.wait(60)
    return f"{server.url}{item}"


@pytest.fixture
def pair() -> tuple[Fake, Fake]:
    return Fake("a"), Fake("b")


def by_server(found) -> dict[str, list[int]]:
    return {server.url: sorted(answers) for server, answers, _ in found}


def test_a_batch_one_server_could_take_whole_is_dealt_in_turn(pair):
    found = dispatch(range(8), pair, answer, 8, pytest.fail)
    assert by_server(found) == {"a": [0, 2, 4, 6], "b": [1, 3, 5, 7]}
    assert found[1][1][3] == "b3"


def test_what_is_not_dealt_goes_to_whoever_is_quicker(pair):
    left = set(range(4, 20))

    def ask(server: Fake, item: int) -> str:
        told = answer(server, item)
        left.discard(item)
        if not left:
            pair[1].may.set()
        return told

    pair[1].may.clear()
    assert by_server(dispatch(range(20), pair, ask, 2, pytest.fail)) == {"a": [0, 2, *range(4, 20)], "b": [1, 3]}


def test_what_a_lost_server_was_dealt_others_answer(pair):
    lost: list[ServerLostError] = []
    over = threading.Event()

    def ask(server: Fake, item: int) -> str:
        if server.url == "b":
            raise ServerLostError("b is gone")
        # Until the other is known to be lost, this one is busy.
        assert over.wait(60)
        return answer(server, item)

    def tell(error: ServerLostError) -> None:
        lost.append(error)
        over.set()

    (_, answers, failed), (_, none, gone) = dispatch(range(40), pair, ask, 1, tell)
    assert (failed, gone, none, [str(error) for error in lost]) == (False, True, {}, ["b is gone"])
    # The one that it failed at is missing at most: it may come back when nobody works any more.
    assert set(range(40)) - set(answers) <= {1}


def test_with_nobody_left_the_rest_is_missing_and_without_work_nothing_is_asked(pair):
    def ask(server: Fake, item: int) -> str:
        if item > 1:
            raise ServerLostError("gone")
        return answer(server, item)

    found = dispatch(range(9), pair, ask, 1, lambda error: None)
    assert by_server(found) == {"a": [0], "b": [1]} and all(failed for *_, failed in found)
    assert by_server(dispatch([], pair, ask, 4, pytest.fail)) == {"a": [], "b": []}


def test_what_no_retry_helps_is_raised(pair):
    def ask(server: Fake, item: int) -> str:
        raise UserError("refused")

    with pytest.raises(UserError, match="refused"):
        dispatch(range(3), pair, ask, 2, pytest.fail)
