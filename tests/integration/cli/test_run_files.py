"""The shipped run files at work: the smoke run whole, and real SmolLM2 weights for two steps of every stage."""

import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from base.store.checkpoint import Store
from base.store.journal import read
from flows.plan.graph import build_graph
from flows.plan.nodes import StageGraph
from flows.run_file.load import load_run_file
from tests.support.homes import clean_environment, with_databases

RUNS = Path(__file__).parents[3] / "flows" / "runs"
FEW_STEPS = [
    "resources.gpus=0",
    "domains={general: {kind: reasoning, options: {tasks: {gcd: {max_value: 50}}}}, "
    "letters: {kind: reasoning, options: {tasks: {spell_backward: {min_word_len: 3, max_word_len: 4}}}}}",
    "cold_start.sft.domains=[letters]",
    # In float32, for without instructions for bfloat16 a processor emulates it.
    "cold_start.sft.dtype=float32",
    "merge.dtype=float32",
    "cold_start.sft.batch_size=2",
    "cold_start.sft.examples=20",
    "experts={letters: {domain: letters, train: {rl: {examples: 20, prompts_per_step: 2, group_size: 2, "
    "max_new_tokens: 8, lora: {rank: 32, alpha: 64}}}}}",
    "merge.prompts_per_step=2",
    "merge.group_size=1",
    "merge.examples=20",
    "merge.max_new_tokens=8",
    "evaluate.domains=[letters]",
    "evaluate.examples=2",
    "evaluate.samples=0",
    "evaluate.max_new_tokens=8",
    "evaluate.shift=null",
]


def run(file: str, home: Path, overrides: list[str], *options: str) -> StageGraph:
    """Run a shipped file through the command line; all of it must be in the store afterwards."""
    with_databases(home)
    environment = clean_environment()
    command = [sys.executable, "-m", "flows.cli.entry", "run", "--plain", "--home", str(home), *options]
    done = subprocess.run(
        [*command, str(RUNS / file), *overrides], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Report:" in done.stdout
    steps = int(options[1]) if options else None
    graph = build_graph(load_run_file(RUNS / file, overrides, steps), home)
    assert all(Store(home).find(node.key) for node in graph.nodes)
    return graph


def test_the_smoke_run_reaches_its_reward(tmp_path: Path) -> None:
    graph = run("smoke.yaml", tmp_path, [])
    journal = tmp_path / "work" / graph.node("experts/reverse@0").key / "journal.jsonl"
    rewards = [r["values"]["rl/reward"] for r in read(journal) if r["kind"] == "metrics"]
    # Rewarded now and then from the start, and more often at the end.
    assert 0 < statistics.fmean(rewards[:10]) < statistics.fmean(rewards[-10:])
    kl = tmp_path / "work" / graph.node("student@0").key / "journal.jsonl"
    divergence = [r["values"]["distill/reverse_kl"] for r in read(kl) if r["kind"] == "metrics"]
    assert statistics.fmean(divergence[-5:]) < 0.5 * divergence[0]


@pytest.mark.timeout(2400)
def test_smollm2_takes_real_steps_on_a_cpu(tmp_path: Path) -> None:
    graph = run("smollm2.yaml", tmp_path, FEW_STEPS, "--max-steps", "2")
    store = Store(tmp_path)
    base = store.get(graph.node("base").key)
    assert base.manifest["parameters"] == 134_515_008
    for name in ("cold_start@0", "experts/letters@0", "student@0"):
        checkpoint = store.get(graph.node(name).key)
        # Adapters alone, all on the one base.
        assert checkpoint.manifest["adapter_base"] == base.key
        assert "model.safetensors" not in checkpoint.manifest["files"]
    student = store.get(graph.node("student@0").key)
    with safe_open(student.path / "adapter_model.safetensors", "pt") as file:
        moved = [name for name in file.keys() if "lora_B" in name and file.get_tensor(name).abs().max() > 0]  # noqa: SIM118
    assert moved
