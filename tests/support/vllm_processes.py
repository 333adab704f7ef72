"""Merges of several processes, each with a vLLM engine of its own: `torchrun vllm_processes.py FOLDER CASES` writes
the facts of each process to `FOLDER/CASE-RANK.json`. `tests/integration/vllm/test_vllm_processes.py` reads them."""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState

import stages.distill
import stages.vllm.engine as engine_module
from base.store.checkpoint import Store
from base.store.journal import read
from experts.loading import load_domain
from stages.config.distill import DistillConfig
from stages.config.on_policy import SamplerConfig
from stages.config.training import LoraConfig, OptimizerConfig
from stages.learner import sharding
from stages.learner.ranks import while_others_wait
from stages.learner.workspace import Workspace
from stages.sampling.samples import Sample
from tests.support.vllm_scenario import random_checkpoint

STEPS = 3
ROLES = ("start", "teacher/sort")
SETTINGS = {
    "copies": {},
    "shards": {"sharding": "fsdp"},
    "shards-lora": {"sharding": "fsdp", "lora": LoraConfig(rank=4)},
    "shards-narrow": {"sharding": "fsdp", "dtype": "bfloat16"},
}


class Seen:
    """What happens to this process's engine and to its shards while a stage runs."""

    def __init__(self) -> None:
        self.gathered = 0
        self.whole: list[int] = []
        self.kinds: set[str] = set()
        self.settings: dict[str, object] = {}
        self.drawn: list[list[list[int]]] = []

    def watch(self) -> None:
        """Count gatherings of the whole student, and look at what is handed over and drawn."""
        gathered, weights, engine = sharding.gathered, engine_module.full_weights, engine_module.VllmEngine
        sample = engine.sample

        def counted(module):
            self.gathered += 1
            return gathered(module)

        def handed(policy, dtype=None):
            if sharding.is_sharded(policy.model):
                self.whole.append(0)
            for name, tensor in weights(policy, dtype):
                if sharding.is_sharded(policy.model):
                    self.whole[-1] += tensor.numel()
                    self.kinds |= {str(tensor.dtype)} if tensor.dim() > 1 else set()
                yield name, tensor

        def drawing(self_engine, prompts, group_size, sampling, seed):
            settings = self_engine.engine.llm_engine.vllm_config
            self.settings = {
                "executor": settings.parallel_config.distributed_executor_backend,
                "context": self_engine.engine.model_config.max_model_len,
                "rows": settings.scheduler_config.max_num_seqs,
                "dtype": str(self_engine.engine.model_config.dtype),
            }
            found: list[list[Sample]] = sample(self_engine, prompts, group_size, sampling, seed)
            self.drawn += [[drawn.completion_ids for drawn in group] for group in found]
            return found

        sharding.gathered, engine_module.full_weights, engine.sample = counted, handed, drawing
        self.undo = lambda: (
            setattr(sharding, "gathered", gathered),
            setattr(engine_module, "full_weights", weights),
            setattr(engine, "sample", sample),
        )


def run(store: Store, case: str) -> dict:
    """A short merge with the case's settings: what it logged, and what this process saw."""
    AcceleratorState._reset_state()
    parents = {role: store.get(role.replace("/", "-")) for role in ROLES}
    domains = {"sort": load_domain("sort", "strings", {"task": "sort"})}
    config = DistillConfig(
        max_steps=STEPS,
        examples=50,
        optimizer=OptimizerConfig(learning_rate=3e-3),
        prompts_per_step=5,
        group_size=4,
        max_new_tokens=8,
        sampler=SamplerConfig(backend="vllm", memory_share=0.1),
        **SETTINGS[case],
    )
    seen = Seen()
    seen.watch()
    try:
        stages.distill.train(config, Workspace(store, case, case, 0, parents, domains, {}))
    finally:
        seen.undo()
    records = list(read(store.work(case) / "journal.jsonl"))
    return {
        "metrics": [record["values"] for record in records if record["kind"] == "metrics"],
        "notes": [record["text"] for record in records if record["kind"] == "note"],
        "gathered": seen.gathered,
        "whole": seen.whole,
        "kinds": sorted(seen.kinds),
        "settings": seen.settings,
        "drawn": seen.drawn,
        "left": sorted(path.name for path in store.work(case).iterdir()),
    }


def main() -> None:
    folder, cases = Path(sys.argv[1]), sys.argv[2].split(",")
    torch.set_num_threads(1)
    store = Store(folder)

    def starts() -> None:
        for seed, role in enumerate(ROLES):
            random_checkpoint(store, role, seed)

    while_others_wait(starts)
    for case in cases:
        facts = run(store, case)
        (folder / f"{case}-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(facts))
    assert torch.distributed.is_initialized()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
