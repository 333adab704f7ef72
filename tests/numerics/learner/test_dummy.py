"""A stage of one row and one file is a method of experts, is planned, and makes a checkpoint."""

from flows.plan.graph import build_graph
from stages.config.kinds import STAGES
from tests.unit.flows.run_file.test_config import load


def test_an_expert_is_trained_by_it(tmp_path, workspace, checkpoint, domains):
    experts = {"sort": {"domain": "sort", "train": {"dummy": {"max_steps": 2, "examples": 20, "batch_size": 4}}}}
    node = build_graph(load(tmp_path, experts=experts), tmp_path / "home").node("experts/sort@0")
    kind = STAGES[node.stage]
    assert kind.name == "dummy"
    place = workspace("dummy", {"start": checkpoint("start", 0)}, {"sort": domains["sort"]})
    assert (kind.function()(kind.config(**node.config), place).path / "model.safetensors").exists()
