"""A model defined by the code it brings: refused, but where the run file trusts it a model like any other."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import stages.distill
import stages.merge
import stages.sft
from base.errors import UserError
from base.store.source import Source
from evals.measure import shift, task_vectors
from evals.measure.evaluate import EvaluationRequest, evaluate
from flows.lineage.export import export
from stages import load
from stages.config.distill import DistillConfig
from stages.config.evaluation import EvaluationConfig
from stages.config.kinds import NoConfig
from stages.config.merge import WeightMergeConfig
from stages.config.shift import ShiftRequest
from stages.config.training import LoraConfig, SFTConfig
from stages.model.policy import load_policy
from stages.model.weights import StoredWeights
from tests.numerics.conftest import tiny_policy

OWN = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def given(tmp_path: Path) -> Source:
    """A checkpoint whose architecture only its own code knows."""
    folder = tmp_path / "given"
    tiny_policy(3).save(folder)
    config = json.loads((folder / "config.json").read_text())
    own = {"model_type": "own", "architectures": ["OwnModel"]}
    places = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config | own | {"auto_map": places}))
    (folder / "own.py").write_text(OWN)
    # Llama's attention has no norms of queries and keys.
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "q_norm" not in name and "k_norm" not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return Source("directory", str(folder))


def test_it_goes_through_every_stage_where_the_run_file_says_so(given, workspace, store, domains, tmp_path):
    small = {"max_steps": 2, "examples": 40}

    def trusted(key, parents, taught):
        return replace(workspace(key, parents, taught), remote_code=True)

    base = load.run(given, trusted("base", {}, {}))
    taught = {"sort": domains["sort"]}
    full = stages.sft.train(SFTConfig(**small, batch_size=8), trusted("full", {"start": base}, taught))
    lora = LoraConfig(rank=4)
    adapter = stages.sft.train(SFTConfig(**small, batch_size=8, lora=lora), trusted("adapter", {"start": base}, taught))
    parents = {"start": base, "teacher/sort": full, "teacher/reverse": adapter}
    two = {name: domains[name] for name in ("sort", "reverse")}
    config = DistillConfig(**small, prompts_per_step=4, max_new_tokens=8)
    student = stages.distill.train(config, trusted("student", parents, two))
    assert type(load_policy(student, store, remote_code=True).model).__name__ == "OwnModel"
    experts = {"start": base, "expert/sort": full, "expert/reverse": adapter}
    stages.merge.run(WeightMergeConfig(method="task_arithmetic"), trusted("merged", parents, {}))
    task_vectors.run(NoConfig(), trusted("cosines", experts, {}))
    measured = {"start": base, "checkpoint": adapter}
    shift.run(ShiftRequest(examples=4, max_new_tokens=8, batch_size=4), trusted("shift", measured, taught))
    place = trusted("score", {"checkpoint": student}, taught)
    asked = EvaluationConfig(examples=4, samples=0, max_new_tokens=8)
    evaluate([EvaluationRequest(place, asked, "sort", "held_out")], student, store)
    export(store, student.key, tmp_path / "out", remote_code=True)
    made = {"full", "adapter", "student", "merged", "cosines", "shift", "score"}
    assert made <= {artifact.key for artifact in store.artifacts()}
    assert (tmp_path / "out" / "own.py").exists()


def test_another_run_does_not_run_the_code_of_a_stored_checkpoint(given, workspace, store, tmp_path):
    base = load.run(given, replace(workspace("base", {}, {}), remote_code=True))
    with pytest.raises(UserError, match="base: it contains code of its own, which this run file does not permit"):
        load_policy(base, store)
    with pytest.raises(ValueError, match="trust_remote_code"):
        StoredWeights(base, store)
    with pytest.raises(ValueError, match="trust_remote_code"):
        export(store, base.key, tmp_path / "out")
