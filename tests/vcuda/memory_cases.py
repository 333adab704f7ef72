"""Peaks of the product's own training step and sampler on the pretended device, at the sizes of SmolLM2-135M.

    python -m tests.vcuda.memory_cases

prints a JSON object: the model's config, and peaks in bytes by phase. A process of its own: torch is patched.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from stages.config.training import SFTConfig
from stages.learner.supervised import cross_entropy
from stages.learner.training import Learner
from stages.learner.update import Row, accumulate, token_weights
from stages.learner.workspace import peak_memory
from stages.model.policy import Policy
from stages.model.tiny import character_tokenizer
from stages.sampling.sampler import sample
from stages.sampling.samples import Sampling
from studies.sizes import smollm2
from tests.vcuda.device import live, pretend, watching

# Rows of one update, two micro-batches of them.
ROWS, LENGTH, MICRO_BATCH = 4, 128, 256
PROMPTS, PROMPT, GROUP, NEW = 2, 96, 16, 4


def main() -> int:
    """Measure and print."""
    torch.set_num_threads(1)
    pretend()
    os.environ["CUDA_VISIBLE_DEVICES"] = "0"
    tokenizer, found = character_tokenizer(), {}
    with tempfile.TemporaryDirectory() as folder, watching():
        policy = Policy(AutoModelForCausalLM.from_config(smollm2()), tokenizer, None)
        learner = Learner(policy, SFTConfig(micro_batch_tokens=MICRO_BATCH), 2, Path(folder), 0)
        found["weights"] = live.bytes
        policy.model.eval()
        for dtype in ("bfloat16", "float32"):
            policy.compute_in(dtype)
            live.reset()
            sample(policy, [[5] * PROMPT] * PROMPTS, GROUP, Sampling(NEW, 0.0), 0)
            found[f"rollout in {dtype}"] = peak_memory()
        weights = token_weights([LENGTH - 1] * ROWS, "token", learner)
        rows = [Row([5] * LENGTH, 1, each) for each in weights]
        for _ in range(2):
            live.reset()
            accumulate(learner, rows, lambda batch: cross_entropy(rows, batch))
            learner.update()
        found["update"] = peak_memory()
    json.dump(found, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
