"""A new expert joins a finished run by the command line: it, the merge and the evaluations run, and nothing else."""

import json
import subprocess
import sys
from pathlib import Path

from base.store.checkpoint import Store, hash_file
from tests.integration.run.test_pipeline import PATIENCE_SECONDS, Bench
from tests.support.homes import with_databases

FROM_CHAMPION = "merge.start_from=champion"


def mopd(bench: Bench, *words: str) -> str:
    """Output of a command over the bench's home."""
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli.entry", *words, "--home", str(bench.home)],
        env=bench.environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def started(log: str) -> set[str]:
    """The jobs a run has started."""
    return {line.removesuffix(": started") for line in log.splitlines() if line.endswith(": started")}


def test_an_added_expert_costs_itself_the_merge_and_the_evaluations(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    with_databases(bench.home)
    assert bench.run().returncode == 0
    mopd(bench, "promote", str(bench.file), "student", "--reason", "the start of what follows")
    store, champion = Store(bench.home), bench.key("student@0")
    files = {path for artifact in store.artifacts() for path in artifact.path.iterdir() if path.is_file()}
    before = {path: (hash_file(path), path.stat().st_mtime_ns) for path in files}

    mopd(bench, *f"add-expert {bench.file} double --domain strings --task double --like reverse".split())
    run = bench.run(FROM_CHAMPION)
    assert run.returncode == 0, run.stderr
    jobs = started(run.stderr)
    assert {job for job in jobs if not job.startswith(("eval/", "shift/", "cosines"))} == {
        "experts/double@0",
        "student@0",
    }
    # What was there is scored on the new domain, which nobody has seen of it yet.
    assert {"eval/base@0", "eval/experts/sort@0", "eval/experts/double@0", "eval/student@0"} <= jobs
    assert {path: (hash_file(path), path.stat().st_mtime_ns) for path in files} == before
    assert "merged from the champion:" in run.stdout and "2 experts made before that champion were reused" in run.stdout

    student = store.get(bench.key("student@0", FROM_CHAMPION))
    assert student.manifest["parents"]["start"]["key"] == champion
    taught = {role for role in student.manifest["parents"] if role.startswith("teacher/")}
    assert taught == {"teacher/sort", "teacher/reverse", "teacher/double", "teacher/general"}
    # The gate compares it with the champion before it.
    said = json.loads((bench.home / "runs" / "tiny" / "report.json").read_text())["verdict"]
    assert "champion" in json.dumps(said)

    # The name stays pinned, so the same command again has nothing to do; the expert can leave, its lineage stays.
    again = bench.run(FROM_CHAMPION)
    assert again.returncode == 0 and "Everything is in the store already" in again.stdout
    mopd(bench, "remove-expert", str(bench.file), "double")
    assert "experts/double" in mopd(bench, "lineage", student.key)
    back = bench.run()
    assert back.returncode == 0 and "Everything is in the store already" in back.stdout
