"""Damaged files of a home: named with what mends them; `status` and `report` go on with what can be read."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from base.store.checkpoint import Store
from tests.support.desk import MISTAKE, RUN, Desk


def _damaged(content: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(content)


def _folder(path: Path) -> None:
    path.mkdir()


LOCK, CHAMPION = "runs/tiny/lock.json", "runs/tiny/champion.json"

# What is damaged, how, and what the message names beside the place.
HOMES: dict[str, tuple[str, Callable[[Path], object], tuple[str, ...]]] = {
    "a file": ("", _damaged("x"), ("is not a folder", "choose another --home")),
    "a link to nothing": ("", lambda path: path.symlink_to("nowhere"), ("is a broken link", "choose another --home")),
    "a link to itself": ("", lambda path: path.symlink_to(path), ("is a broken link",)),
    "a store that is a file": ("store", _damaged("x"), ("is not a folder",)),
    "a lock of half a line": (LOCK, _damaged('{"pins": {'), ("not readable as JSON", "move it away", "`mopd run`")),
    "a lock that is empty": (LOCK, _damaged(""), ("not readable as JSON", "move it away")),
    "a lock of another type": (LOCK, _damaged("[]"), ("not a JSON object", "move it away")),
    "a lock of bytes": (LOCK, lambda path: path.write_bytes(b"\xff\xfe"), ("is not UTF-8 text", "move it away")),
    "a lock without keys": (LOCK, _damaged('{"nodes": {"base@0": {}}}'), ("nodes.base@0.key", "move it away")),
    "a lock with odd pins": (LOCK, _damaged('{"pins": {"champion": 3}}'), ("pins.champion", "move it away")),
    "a deep lock": (LOCK, _damaged("[" * 100_000), ("nested too deeply",)),
    "a lock that is a folder": (LOCK, _folder, ("is a folder, not a file",)),
    "a lock that is a pipe": (LOCK, os.mkfifo, ("is not a regular file",)),
    "a champion of half a line": (CHAMPION, _damaged("{"), ("not readable as JSON", "`mopd promote")),
    "a champion of another type": (CHAMPION, _damaged('{"history": [{"student": 3}]}'), ("history.0", "`mopd promote")),
    "a champion without anything": (CHAMPION, _damaged("{}"), ("history", "`mopd promote")),
}


@pytest.mark.parametrize("case", HOMES)
def test_a_damaged_home_is_named_with_what_mends_it(desk: Desk, case: str) -> None:
    name, damage, names = HOMES[case]
    place = desk.home / name if name else desk.home
    place.parent.mkdir(parents=True, exist_ok=True)
    damage(place)
    desk.write(RUN)
    done = desk.call("plan")
    assert done.exit_code == MISTAKE, (done.exit_code, done.exception, done.stderr)
    assert done.stderr.count("error: ") == 1 and done.stderr.startswith(f"error: {place}: "), done.stderr
    for each in names:
        assert each in done.stderr


@pytest.mark.parametrize("name", ["run.yaml/inside", "x" * 300])
def test_a_home_that_no_folder_can_be_is_named(desk: Desk, name: str) -> None:
    desk.write(RUN)
    desk.home = desk.folder / name
    done = desk.call("plan")
    assert done.exit_code == MISTAKE, (done.exception, done.stderr)
    assert done.stderr.startswith(f"error: {desk.home}") and done.stderr.count("error: ") == 1


@pytest.mark.parametrize("damage", [LOCK, CHAMPION])
@pytest.mark.parametrize("command", ["status", "report"])
def test_status_and_report_go_on_with_what_can_be_read(desk: Desk, command: str, damage: str) -> None:
    (desk.home / "runs" / "tiny").mkdir(parents=True)
    (desk.home / damage).write_text("{")
    desk.write(RUN)
    done = desk.call(command)
    assert done.exit_code == 0, (done.exception, done.stderr)
    assert "base@0" in done.stdout if command == "status" else "sort" in done.stdout
    if not (command == "status" and damage == CHAMPION):
        assert f"warning: {desk.home / damage}: not readable as JSON" in done.stderr
    if command == "report":
        assert (desk.home / "runs" / "tiny" / "report.html").is_file()
        words = "The gate was not run" if damage == CHAMPION else "Not judged yet"
        assert done.stdout.startswith(words), done.stdout


def key_of(desk: Desk, node: str) -> str:
    return next(entry["key"] for entry in json.loads(desk.call("plan", "--json").stdout) if entry["node"] == node)


def test_status_reads_a_damaged_journal_and_error(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    desk.write(RUN)
    work = desk.home / "work" / key_of(desk, "base@0")
    work.mkdir(parents=True)
    lines = [
        '{"time": 1, "step": 3, "kind": "progress", "total": 5}',
        '{"time": 1, "ste',
        "\x00\xff",
        '{"time": 1, "step": 4, "kind": "progress", "total": 5}',
        '{"time": 1, "step": "x", "kind": "progress", "total": 5}',
        '{"time": 1, "step": 5, "ki',
    ]
    (work / "journal.jsonl").write_text("\n".join(lines))
    (work / "error.json").write_text("{")
    done = desk.call("status")
    assert done.exit_code == 0, (done.exception, done.stderr)
    assert "4/5" in done.stdout
    assert f"warning: {work / 'error.json'}: not readable as JSON" in done.stderr
    assert f"{work / 'journal.jsonl'}: 2 lines are damaged" in caplog.text
    done = desk.call("report")
    assert done.exit_code == 0, (done.exception, done.stderr)


def test_a_stray_file_in_the_store_is_passed_over(desk: Desk) -> None:
    desk.write(RUN)
    assert desk.call("plan").exit_code == 0
    (desk.home / "store" / "notes.txt").write_text("x")
    (desk.home / "store" / "empty").mkdir()
    for command in ("plan", "status", "report"):
        done = desk.call(command)
        assert done.exit_code == 0, (done.exception, done.stderr)
    assert list(Store(desk.home).artifacts()) == []


@pytest.mark.parametrize("manifest", ["{", "[]", '{"digest": 3}', None])
def test_an_artifact_whose_manifest_is_damaged_is_named_and_the_others_are_read(
    desk: Desk, manifest: str | None
) -> None:
    desk.write(RUN)
    place = desk.home / "store" / key_of(desk, "base@0")
    if manifest is None:
        place.write_text("a file where a folder belongs")
    else:
        place.mkdir()
        (place / "manifest.json").write_text(manifest)
    done = desk.call("plan")
    assert done.exit_code == MISTAKE and str(place) in done.stderr and "--discard-corrupted" in done.stderr
    for command in ("status", "report"):
        done = desk.call(command)
        assert done.exit_code == 0, (done.exception, done.stderr)
        assert f"warning: {place}" in done.stderr and "--discard-corrupted" in done.stderr


def test_a_report_whose_place_is_taken_by_a_folder_is_named(desk: Desk) -> None:
    place = desk.home / "runs" / "tiny" / "report.html"
    place.mkdir(parents=True)
    desk.write(RUN)
    done = desk.call("report")
    assert done.exit_code == MISTAKE
    assert done.stderr.startswith(f"error: {place}: a folder in place of a file; move the existing file or folder away")
