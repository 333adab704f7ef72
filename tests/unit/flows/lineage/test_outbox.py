"""The outbox keeps the order and loses nothing, whatever the server does."""

import errno
import json
from pathlib import Path

import pytest
from filelock import Timeout

from flows.tracking import outbox
from flows.tracking.outbox import Doubtful, Outbox, Rejected, Unreachable, send_left_over


class Server:
    """Takes operations, or is away; refuses those that say so; gives each run an id."""

    def __init__(self) -> None:
        self.away = False
        self.attempts = 0
        self.taken: list[int] = []

    def __call__(self, operation, ids):
        self.attempts += 1
        if self.away:
            raise Unreachable("no answer")
        if operation.get("bad"):
            raise Rejected("bad")
        ids.setdefault("run", "id-1")
        self.taken.append(operation["n"])


def submit(box: Outbox, *numbers: int) -> None:
    for number in numbers:
        box.submit({"op": "say", "n": number})


def test_what_a_server_missed_is_sent_in_order_when_it_is_back(tmp_path, monkeypatch):
    server = Server()
    box = Outbox(tmp_path / "a.jsonl", server)
    submit(box, 1)
    server.away = True
    submit(box, 2, 3, 4)
    assert server.attempts == 2, "an absent server is asked once, not for each operation"
    assert box.unsent == 3
    server.away = False
    monkeypatch.setattr(outbox, "RETRY_SECONDS", 0.0)
    assert box.flush() == 0
    submit(box, 5)
    assert server.taken == [1, 2, 3, 4, 5]
    assert not box.path.exists()


def test_an_absent_server_is_warned_of_once(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(outbox, "RETRY_SECONDS", 0.0)
    server = Server()
    server.away = True
    submit(Outbox(tmp_path / "a.jsonl", server), 1, 2, 3)
    assert server.attempts == 3
    assert [record.message.count("does not answer") for record in caplog.records] == [1]


def test_a_refused_operation_is_reported_and_does_not_hold_up_the_rest(tmp_path, caplog):
    server = Server()
    box = Outbox(tmp_path / "a.jsonl", server)
    box.submit({"op": "say", "n": 1, "bad": True})
    submit(box, 2)
    assert server.taken == [2]
    assert f"refused 'say': bad; it is kept in {tmp_path / 'a.aside'}" in caplog.text
    assert json.loads((tmp_path / "a.aside").read_text()) == {"op": "say", "n": 1, "bad": True}
    assert not box.path.exists()


def test_a_doubtful_operation_is_tried_again_and_then_no_longer_holds_up_the_rest(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(outbox, "RETRY_SECONDS", 0.0)
    taken, faults = [], [True, True, False, True, True, True]

    def server(operation, ids):
        if operation["n"] < 2 and faults.pop(0):
            raise Doubtful("the server has a fault")
        taken.append(operation["n"])

    box = Outbox(tmp_path / "a.jsonl", server)
    for _ in range(3):
        submit(box, 0) if not box.unsent else box.flush()
    assert taken == [0], "a fault that passes loses nothing"
    submit(box, 1, 2)
    assert box.unsent == 2 and taken == [0]
    assert box.flush() == 0
    assert taken == [0, 2]
    assert json.loads((tmp_path / "a.aside").read_text())["n"] == 1


def test_an_absent_server_is_no_reason_to_give_an_operation_up(tmp_path, monkeypatch):
    monkeypatch.setattr(outbox, "RETRY_SECONDS", 0.0)
    server = Server()
    server.away = True
    box = Outbox(tmp_path / "a.jsonl", server)
    submit(box, *range(10))
    assert box.unsent == 10 and not (tmp_path / "a.aside").exists()


@pytest.mark.parametrize("torn", ['{"op": "say", "n": 2{"op": "say", "n": 3}', "\x00\x00\x00", "12", '{"n": 2}'])
def test_a_torn_line_in_the_middle_is_set_aside_and_the_rest_is_sent(tmp_path, caplog, torn):
    path = tmp_path / "a.jsonl"
    path.write_text('{"ids": {"run": "id-7"}}\n{"op": "say", "n": 1}\n' + torn + '\n{"op": "say", "n": 4}\n')
    server, heard = Server(), {}
    assert send_left_over(tmp_path, lambda operation, ids: (server(operation, ids), heard.update(ids))) == 0
    assert server.taken == [1, 4] and heard == {"run": "id-7"}
    assert (tmp_path / "a.aside").read_text() == torn + "\n"
    assert f"{path}: a line cannot be read, so it is not sent; it is kept in {tmp_path / 'a.aside'}" in caplog.text
    assert not path.exists()


def test_half_a_line_on_a_disk_that_was_full_is_written_anew_before_the_next(tmp_path, monkeypatch):
    server = Server()
    server.away = True
    box = Outbox(tmp_path / "a.jsonl", server)
    submit(box, 1)
    write = Path.open

    def half(self, *arguments, **named):
        with write(self, *arguments, **named) as file:
            file.write('{"op": "sa')
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", half)
        submit(box, 2)
    submit(box, 3)
    lines = [json.loads(line) for line in box.path.read_text().splitlines()]
    assert [line.get("n") for line in lines] == [None, 1, 2, 3]


def test_a_killed_process_leaves_its_words_and_ids_to_the_next(tmp_path: Path):
    server = Server()
    box = Outbox(tmp_path / "a.jsonl", server)
    submit(box, 1)
    server.away = True
    submit(box, 2, 3)
    with box.path.open("a") as file:
        file.write(json.dumps({"op": "say", "n": 4})[:9])
    server.away = False
    assert send_left_over(tmp_path, server) == 0, "a file whose process lives is not touched"
    assert server.taken == [1]
    with pytest.raises(Timeout):
        Outbox(box.path, server)
    box._owned.release()
    heard: dict[str, str] = {}
    assert send_left_over(tmp_path, lambda operation, ids: (server(operation, ids), heard.update(ids))) == 0
    assert server.taken == [1, 2, 3]
    assert heard == {"run": "id-1"}
    assert not list(tmp_path.glob("*.jsonl"))


@pytest.mark.parametrize("left", ["", '{"op": "say", "n": 7}\n', '{"op": "say", "n": 7}\n{"op": "sa'])
def test_a_file_that_a_full_disk_cut_short_is_sent_as_far_as_it_goes(tmp_path, left):
    (tmp_path / "a.jsonl").write_text(left)
    server = Server()
    assert send_left_over(tmp_path, server) == 0
    assert server.taken == ([7] if left else [])
    assert not (tmp_path / "a.jsonl").exists()


def test_a_full_disk_keeps_what_is_unsent_in_memory(tmp_path, monkeypatch, caplog):
    server = Server()
    server.away = True
    box = Outbox(tmp_path / "a.jsonl", server)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        patch.setattr(Path, "open", full)
        submit(box, 1, 2, 3)
    assert box.unsent == 3
    assert sum("cannot be saved" in record.message for record in caplog.records) == 1
    server.away = False
    assert box.close() == 0
    assert server.taken == [1, 2, 3]
