"""Journals: read in a stream, thinned for curves, and damaged lines passed over."""

import json
from pathlib import Path

import pytest

from base.store import journal
from base.store.journal import Journal, JournalReader, last_records, read, thinned_records


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "journal.jsonl"


def metrics(step: int, **values: float) -> str:
    return json.dumps({"time": 1.0, "step": step, "kind": "metrics", "values": values}) + "\n"


DAMAGED = ['{"time": 1, "st\n', "garbage\n", "[]\n", '{"time": 1, "step": "x", "kind": "note", "text": "y"}\n', "\n"]


def test_damaged_lines_are_passed_over_counted_and_dropped_by_a_resumed_stage(file: Path, caplog) -> None:
    file.write_text("".join([metrics(1, loss=1.0), *DAMAGED, metrics(2, loss=2.0), '{"time": 1, "step": 3']))
    assert [record["step"] for record in read(file)] == [1, 2]
    assert f"{file}: {len(DAMAGED)} lines are damaged" in caplog.text
    assert [record["step"] for record in JournalReader(file).new_records()] == [1, 2]
    Journal(file, resume_step=2).metrics(3, {"loss": 3.0})
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2, 3]


def test_the_last_record_of_a_kind_is_found_behind_damaged_ones(file: Path) -> None:
    written = Journal(file)
    written.progress(1, 9)
    written.note(1, "hot")
    written.progress(2, 9)
    with file.open("a") as end:
        end.write('{"time": 1, "step": 3, "kind": "progress", "total": "x"}\n{"time": 1, "step": 4, "kind": "progr')
    found = last_records(file, ("progress", "note"))
    assert (found["progress"]["step"], found["note"]["text"]) == (2, "hot")
    assert last_records(file.with_name("none"), ("note",)) == {}


def test_a_short_journal_keeps_every_point(file: Path) -> None:
    file.write_text("".join(metrics(step, loss=step / 2) for step in range(100)))
    assert [(record["step"], record["values"]["loss"]) for record in thinned_records(file)] == [
        (step, step / 2) for step in range(100)
    ]


def test_a_long_journal_is_thinned_and_keeps_its_spikes(file: Path) -> None:
    spikes = {1234: 99.0, 7777: -99.0}
    with file.open("w") as out:
        for step in range(10_000):
            out.write(metrics(step, loss=spikes.get(step, step % 7), rate=1.0))
            out.write(json.dumps({"time": 1.0, "step": step, "kind": "note", "text": f"{step}"}) + "\n")
    found = thinned_records(file)
    points = {record["step"]: record["values"]["loss"] for record in found if "loss" in record.get("values", {})}
    assert spikes.items() <= points.items()
    assert 2 * journal.STRETCHES / 2 < len(points) <= 4 * journal.STRETCHES
    notes = [record["text"] for record in found if record["kind"] == "note"]
    assert len(notes) == journal.MOST_NOTES and notes[-1] == "9999"


def test_of_a_very_long_journal_only_some_lines_are_parsed(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text("".join(metrics(step, loss=step) for step in range(1000)))
    monkeypatch.setattr(journal, "MOST_PARSED", 100)
    parsed = []
    parse = json.loads
    monkeypatch.setattr(json, "loads", lambda line: parsed.append(line) or parse(line))
    assert len(thinned_records(file)) == len(parsed) == 100


def test_values_that_are_no_numbers_make_no_curve(file: Path) -> None:
    file.write_text(metrics(1, loss=float("nan")) + metrics(2, loss=float("inf")) + metrics(3, loss=2.0))
    assert thinned_records(file) == [{"kind": "metrics", "step": 3, "values": {"loss": 2.0}}]
