"""A model defined by the code it brings: refused, but where the run file trusts it a model like any other."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import stages.distill
import stages.sft
from base.errors import UserError
from base.store.source import Source
from evals.measure.evaluate import EvaluationRequest, evaluate
from flows.lineage.export import export
from stages import load
from stages.config.distill import DistillConfig
from stages.config.training import EvaluationConfig, LoraConfig, SFTConfig
from stages.model.policy import load_policy
from stages.model.remote_code import options, remote_code
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
    with remote_code(True):
        base = load.run(given, workspace("base", {}, {}))
        taught = {"sort": domains["sort"]}
        full = stages.sft.train(SFTConfig(**small, batch_size=8), workspace("full", {"start": base}, taught))
        lora = LoraConfig(rank=4)
        adapter = stages.sft.train(
            SFTConfig(**small, batch_size=8, lora=lora), workspace("adapter", {"start": base}, taught)
        )
        parents = {"start": base, "teacher/sort": full, "teacher/reverse": adapter}
        two = {name: domains[name] for name in ("sort", "reverse")}
        config = DistillConfig(**small, prompts_per_step=4, max_new_tokens=8)
        student = stages.distill.train(config, workspace("student", parents, two))
        assert type(load_policy(student, store).model).__name__ == "OwnModel"
        place = workspace("score", {"checkpoint": student}, taught)
        asked = EvaluationConfig(examples=4, samples=0, max_new_tokens=8)
        evaluate([EvaluationRequest(place, asked, "sort", "held_out")], student, store)
        export(store, student.key, tmp_path / "out")
    assert {"full", "adapter", "student", "score"} <= {artifact.key for artifact in store.artifacts()}
    assert (tmp_path / "out" / "own.py").exists()
    # Another run, that does not trust it, does not run what stands in the store either.
    assert options() == {"trust_remote_code": False}
    with pytest.raises(UserError, match="student: it contains code of its own, which this run file does not permit"):
        load_policy(student, store)
