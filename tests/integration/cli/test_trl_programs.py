"""TRL's trainers as stages: experts by SFTTrainer and GRPOTrainer, a second student by DistillationTrainer."""

import json
import subprocess
import sys
from pathlib import Path

from base.store.checkpoint import Store
from base.store.journal import JOURNAL_FILE, read
from flows.plan.graph import build_graph
from flows.run_file.load import load_run_file
from tests.support.homes import clean_environment, with_databases

FILE = Path(__file__).parents[3] / "examples" / "trl" / "run.yaml"
STEPS = 6


def test_trl_trains_the_experts_and_merges_beside_the_run_and_is_measured_like_any_stage(tmp_path: Path) -> None:
    home = with_databases(tmp_path / "home")
    words = ["run", "--plain", "--home", str(home), "--max-steps", str(STEPS), str(FILE), "evaluate.examples=8"]
    environment = clean_environment()
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli.entry", *words],
        capture_output=True, text=True, env=environment | {"HF_HUB_OFFLINE": "1"}, timeout=850, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    graph, store = build_graph(load_run_file(FILE, ["evaluate.examples=8"], STEPS), home), Store(home)
    made = {
        name: store.get(graph.node(f"{name}@0").key) for name in ("experts/sort", "experts/reverse", "variants/trl")
    }
    for name, artifact in made.items():
        stage = artifact.manifest["stage"]
        records = list(read(home / "work" / artifact.key / JOURNAL_FILE))
        steps = [record["step"] for record in records if record["kind"] == "progress"]
        assert steps[-1] == STEPS, name
        assert any(f"{stage}/loss" in record["values"] for record in records if record["kind"] == "metrics"), name
        assert artifact.manifest["parents"]["start"]["name"] == "cold_start"
        assert artifact.digest != store.get(graph.node("cold_start@0").key).digest
    teachers = {role: parent["key"] for role, parent in made["variants/trl"].manifest["parents"].items()}
    assert teachers["teacher/sort"] == made["experts/sort"].key
    report = json.loads((home / "runs" / "trl" / "report.json").read_text())
    assert "variants/trl" in json.dumps(report)
