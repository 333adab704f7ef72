"""The sampler of an evaluation: the checkpoint's own transformers model, or vLLM in the evaluation's process."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from peft import PeftModel

from stages.config.evaluation import EvaluationConfig
from stages.config.training import LoraConfig
from stages.model.policy import Policy
from stages.sampling.sampler import Sampler, TransformersSampler


@contextlib.contextmanager
def evaluation_sampler(
    config: EvaluationConfig, policy: Policy, folder: Path, longest_prompt: int
) -> Iterator[Sampler]:
    """Provide a sampler with the policy's weights, and close it at the end.

    Args:
        config: The evaluation's settings.
        policy: The evaluated checkpoint, in eval mode on its device.
        folder: Folder for an engine's files.
        longest_prompt: Tokens of the longest prompt, which sets an engine's context.

    Raises:
        UserError: vLLM is not installed, cannot run the model on this device, or computes other log-probabilities with
            these weights than the policy's own forward pass.
    """
    if config.backend == "transformers":
        yield TransformersSampler(policy)
        return
    # vLLM takes seconds to import.
    from stages.vllm.engine import EVALUATION, VllmEngine

    engine = VllmEngine(policy, config.engine(_adapter(policy)), folder, longest_prompt, use=EVALUATION)
    try:
        engine.update_weights(policy, 0)
        yield engine
    finally:
        engine.close()


def _adapter(policy: Policy) -> LoraConfig | None:
    """The shape of the policy's adapter; None for a full checkpoint."""
    if not isinstance(policy.model, PeftModel):
        return None
    own = policy.model.peft_config["default"]
    return LoraConfig(rank=max([own.r, *own.rank_pattern.values()]))
