"""What a node used: all its attempts together, with the work that a kill made it do again."""

import json
import sys
import time
import types
from pathlib import Path

import pytest

from base.store.checkpoint import Store
from base.store.energy import Meter
from stages.learner.workspace import SPENT_FILE, Workspace


class Clock:
    """A monotonic clock that a test sets, and the counter of two devices that use ten joules a second each."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return clock


@pytest.fixture
def devices(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    library = types.SimpleNamespace(
        NVMLError=OSError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=str,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: 10_000 * clock.now,
    )
    monkeypatch.setitem(sys.modules, "pynvml", library)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")


def attempt(store: Store) -> Workspace:
    return Workspace(store, "key", "student", 0, {}, {}, {"stage": "test"})


def made(store: Store, place: Workspace) -> dict:
    folder = store.staging("key")
    (folder / "model.txt").write_text("weights")
    return dict(place.commit(folder, trained_on=None, metrics={}).manifest)


@pytest.mark.usefixtures("devices")
def test_what_a_killed_attempt_used_counts_with_the_work_that_is_done_again(tmp_path: Path, clock: Clock) -> None:
    store = Store(tmp_path)
    first = attempt(store).journal()
    clock.now += 20
    first.metrics(5, {"sft/loss": 1.0})
    # Killed here. The second attempt resumes at step 2, so steps 3 to 5 are taken once more; it is killed too.
    clock.now += 500
    second = attempt(store)
    clock.now += 6
    second.journal(2).progress(3, 9)
    clock.now += 500
    third = attempt(store)
    journal = third.journal(2)
    clock.now += 4
    journal.metrics(9, {"sft/loss": 0.5})
    manifest = made(store, third)
    assert manifest["seconds"] == 20 + 6 + 4
    assert manifest["device_seconds"] == 2 * manifest["seconds"]
    assert manifest["joules"] == 10 * manifest["device_seconds"]
    # A node that is made anew one day starts from nothing.
    assert not (store.work("key") / SPENT_FILE).exists()
    assert Meter(store.work("key") / SPENT_FILE).used()["seconds"] == 0


def test_an_attempt_whose_energy_nobody_told_leaves_the_sum_untold(
    tmp_path: Path, clock: Clock, request: pytest.FixtureRequest
) -> None:
    store = Store(tmp_path)
    attempt(store).journal().progress(1, 9)
    assert "joules" not in json.loads((store.work("key") / SPENT_FILE).read_text())
    request.getfixturevalue("devices")
    manifest = made(store, attempt(store))
    assert "joules" not in manifest and manifest["device_seconds"] == 0


def test_what_was_used_is_no_part_of_the_digest(tmp_path: Path, clock: Clock) -> None:
    digests = []
    for name, seconds in (("a", 1), ("b", 100)):
        store = Store(tmp_path / name)
        journal = attempt(store).journal()
        clock.now += seconds
        journal.progress(1, 2)
        digests.append(made(store, attempt(store))["digest"])
    assert digests[0] == digests[1]


def test_only_the_leading_process_keeps_count(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    store = Store(tmp_path)
    attempt(store).journal().progress(1, 9)
    assert not (store.work("key") / SPENT_FILE).exists()
