"""Two runs at once, a full disk, a store that cannot be written: nothing finished is lost, nothing is made twice."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml

from base.store.journal import JOURNAL_FILE, read
from tests.integration.run.test_pipeline import PATIENCE_SECONDS, RUN, Bench, processes_of
from tests.support.homes import with_databases

# In a name space of its own a user may mount a disk of any size, and it is gone with its last process.
OWN_MOUNTS = ("unshare", "--map-root-user", "--mount")
DISK_MEGABYTES = 300
# Fills the disk once the first checkpoint is in the store, then frees it, then makes it read-only.
SCRIPT = """
mount -t tmpfs -o size={size}m tmpfs "$HOME_FOLDER" || exit 99
{run} > "$LOGS/full" 2>&1 &
until [ -n "$(ls "$HOME_FOLDER/store" 2>/dev/null)" ]; do
    kill -0 $! 2>/dev/null || exit 98
    sleep 0.05
done
dd if=/dev/zero of="$HOME_FOLDER/filler" bs=64k 2>/dev/null
wait $!
echo $? > "$LOGS/full.code"
ls "$HOME_FOLDER/store" > "$LOGS/kept"
rm "$HOME_FOLDER/filler"
{run} > "$LOGS/again" 2>&1
echo $? > "$LOGS/again.code"
mount -o remount,ro "$HOME_FOLDER"
{run} merge.max_steps=4 > "$LOGS/read_only" 2>&1
echo $? > "$LOGS/read_only.code"
{mopd} lineage --home "$HOME_FOLDER" tiny > "$LOGS/lineage" 2>&1
echo $? > "$LOGS/lineage.code"
"""


def may_mount() -> bool:
    """Whether this user may mount a disk in a name space of its own."""
    try:
        tried = subprocess.run(
            [*OWN_MOUNTS, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, timeout=20, check=False
        )
    except FileNotFoundError:
        return False
    return tried.returncode == 0


def test_two_runs_of_the_same_stages_at_once_train_each_once(tmp_path: Path) -> None:
    one, two = Bench(tmp_path), Bench(tmp_path)
    with_databases(one.home)
    two.file = tmp_path / "two.yaml"
    two.file.write_text(yaml.safe_dump(RUN | {"name": "other"}, sort_keys=False))
    logs = [tmp_path / "one.log", tmp_path / "two.log"]
    processes = []
    for bench, log in zip((one, two), logs, strict=True):
        with log.open("w") as stream:
            processes.append(subprocess.Popen(bench.command(), stdout=stream, stderr=stream, env=bench.environment))
    codes = [process.wait(PATIENCE_SECONDS) for process in processes]
    assert codes == [0, 0], "\n".join(log.read_text()[-2000:] for log in logs)
    nodes = ("base@0", "cold_start@0", "experts/sort@0", "experts/reverse@0", "student@0")
    for node_id in nodes:
        key = one.key(node_id)
        assert two.key(node_id) == key
        steps = [r["step"] for r in read(one.home / "work" / key / JOURNAL_FILE) if r["kind"] == "progress"]
        assert steps == list(range(1, len(steps) + 1)), f"{node_id} was trained twice: steps {steps}"
    # MLflow has one model of each, whichever run was first to say it.
    keys = one.query("mlflow.db", "SELECT tag_value FROM logged_model_tags WHERE tag_key = 'key'")
    assert Counter(key for (key,) in keys) == dict.fromkeys(map(one.key, nodes), 1)
    for name in ("tiny", "other"):
        assert (one.home / "runs" / name / "report.html").exists()
    assert processes_of(one.home) == []


@pytest.mark.skipif(not may_mount(), reason="mounting a small disk needs user name spaces, which this system forbids")
def test_a_full_disk_and_a_read_only_one_cost_a_message_and_nothing_finished(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.home.mkdir()
    mopd = f'"{sys.executable}" -m flows.cli.entry'
    script = SCRIPT.format(
        size=DISK_MEGABYTES, mopd=mopd, run=f'{mopd} run --plain --home "$HOME_FOLDER" "{bench.file}"'
    )
    places = {"HOME_FOLDER": str(bench.home), "LOGS": str(tmp_path)}
    done = subprocess.run(
        [*OWN_MOUNTS, "sh", "-c", script],
        env=bench.environment | places,
        capture_output=True,
        text=True,
        timeout=3 * PATIENCE_SECONDS,
        check=False,
    )
    said = {name: (tmp_path / name).read_text() for name in ("full", "again", "read_only", "lineage")}
    assert done.returncode == 0, done.stderr + said["full"]
    codes = {name: int((tmp_path / f"{name}.code").read_text()) for name in said}
    assert codes == {"full": 1, "again": 0, "read_only": 2, "lineage": 0}, said
    assert "Traceback" not in "".join(said.values()), said
    assert f"the disk of {bench.home} is full" in said["full"]
    assert "resumes the r" in said["full"]
    # What was finished before the disk was full is not made again, and all the rest is.
    lines = {name: text.splitlines() for name, text in said.items()}
    assert "base@0: started" in lines["full"] and "base@0: started" not in lines["again"]
    assert (tmp_path / "kept").read_text().strip() and "student@0: done" in said["again"]
    assert "Read-only file system" in said["read_only"] and "--home" in said["read_only"]
    assert "student" in said["lineage"] and "experts/sort" in said["lineage"]
