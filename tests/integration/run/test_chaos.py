"""Five random kills of a scheduled run, one of each kind: it ends with the checkpoints of an undisturbed one."""

import random
from pathlib import Path

from tests.chaos import VICTIMS, disturbed, draw_victims, undisturbed


def test_a_run_that_is_killed_at_random_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    rng = random.Random(2026)
    (victims,) = draw_victims(len(VICTIMS), rng)
    expected, _ = undisturbed(tmp_path / "undisturbed")
    record = disturbed(tmp_path / "run", victims, rng, expected)
    assert sorted(victim for victim, _ in record.kills) == sorted(VICTIMS)
    assert record.differing == [] and record.faults == []
    assert {"student@0", "experts/sort@0", "experts/reverse@0"} <= expected.keys()
