"""Every run file that is shipped loads and plans, and the claims' contrasts of slopes are what they say."""

from pathlib import Path

import pytest

from flows.plan.graph import build_graph
from flows.run_file.load import load_run_file

RUNS = Path(__file__).parents[4] / "flows" / "runs"
# Those of a base on the Hub are planned by tests/unit/flows/plan/test_real_models.py, with a pretended Hub cache.
HUB = {"qwen3_8b.yaml", "qwen3_8b_lora.yaml"}
FILES = sorted(file for file in RUNS.rglob("*.yaml") if file.name not in HUB)


@pytest.mark.parametrize("name", sorted(HUB))
def test_a_run_file_of_a_base_on_the_hub_loads(name: str) -> None:
    assert load_run_file(RUNS / name).base.checkpoint == "Qwen/Qwen3-8B"


def test_there_are_run_files() -> None:
    names = {file.relative_to(RUNS).as_posix() for file in FILES}
    assert names >= {"smoke.yaml", "demo.yaml", "lab.yaml", "lab_fair.yaml", "lab_gold.yaml", "smollm2.yaml"}
    assert names >= {f"claims/{name}.yaml" for name in ("code", "ground", "merge", "reward", "spelling")}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(RUNS).as_posix())
def test_a_run_file_loads_and_plans(file: Path, tmp_path: Path) -> None:
    config = load_run_file(file)
    graph = build_graph(config, tmp_path)
    measured = {node.name for node in graph.checkpoints}
    asked = {name for entry in config.hypotheses.values() for test in entry.tests.values() for name in test.checkpoints}
    assert asked <= {*measured, "teacher"}


@pytest.mark.parametrize(
    ("hurt", "contrast"),
    [("flips_hurt", "rl_falls_faster_with_flips"), ("length_bias_hurts", "rl_falls_faster_with_length_bias")],
)
def test_the_contrast_of_c12_is_rls_slope_less_distillations(hurt: str, contrast: str) -> None:
    tests = load_run_file(RUNS / "claims" / "reward.yaml").hypotheses["C12"].tests
    rl, distillation = (tests[f"{hurt}_{who}"].weights for who in ("rl", "distillation"))
    expected = {**rl, **{name: -weight for name, weight in distillation.items()}}
    assert tests[contrast].weights == pytest.approx(expected, abs=1e-8)
