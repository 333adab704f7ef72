"""How vLLM is set up, in the trainer's process and as a server alike. Free of torch and vLLM."""

from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import psutil

from base.errors import UserError
from stages.config.on_policy import OnPolicyConfig
from stages.config.training import LoraConfig

# Set unless the user has: no telemetry, no cores of its own, and on a CPU nothing compiled, which would take a C++
# compiler and longer than a short run's rollouts.
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
CPU_ENVIRONMENT = {"TORCHDYNAMO_DISABLE": "1"}
MAX_ROWS = 256
# Room for a prompt in the cache of a CPU; longer ones leave room for fewer rows at a time.
PROMPT_TOKENS = 512
# The cache is counted in blocks of 128 tokens on a CPU, and one of them is never used.
SPARE_TOKENS = 2 * 128
LEAST_BATCH_TOKENS = 2048
# Of a guarded server (`stages.vllm.guard`): the version of unverified weights, the key of its
# fault in an answer, and the header of a request that may be answered without verified weights.
NO_VERSION, FAULT, PROBE_HEADER = "none", "fault", "x-mopd-probe"
# The lowest that vLLM takes.
LEAST_BIAS = -100.0
# What vLLM makes room for.
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def logprobs_mode(temperature: float, top_p: float) -> str:
    """Which of vLLM's log-probabilities are those of the policy at its temperature before top-p.

    Raises:
        UserError: none are.
    """
    if temperature in (0.0, 1.0):
        return "raw_logprobs"
    if top_p < 1.0:
        raise UserError(
            f"vLLM cannot tell log-probabilities at temperature {temperature} before top_p {top_p}; set one of them to "
            f"1, or sample with backend: transformers"
        )
    return "processed_logprobs"


def lora_rank(lora: LoraConfig) -> int:
    """The rank vLLM makes room for.

    Raises:
        UserError: there is none as large.
    """
    rank = next((rank for rank in LORA_RANKS if rank >= lora.rank), None)
    if rank is None:
        raise UserError(f"lora.rank: vLLM takes adapters of rank {LORA_RANKS[-1]} at most, not {lora.rank}")
    return rank


def model_overrides(architecture: str) -> dict[str, Any]:
    """What a model's config is to say differently.

    Output heads are never tied: on a CPU vLLM multiplies by a packed copy of the head, which a reload of the embedding
    alone leaves as it was (seen with vLLM 0.32). A model that was made here may not say in its config what it is.
    """
    return {"tie_word_embeddings": False, "architectures": [architecture]}


def rows_at_a_time(config: OnPolicyConfig) -> int:
    """Completions drawn together."""
    return min(MAX_ROWS, config.prompts_per_step * config.group_size)


def cpu_batch_tokens(context: int) -> int:
    """Tokens of one forward pass on a CPU, where no prefill may be split: vLLM 0.32 ends its engine over one that is
    and has a seed."""
    return max(LEAST_BATCH_TOKENS, context)


def cpu_cache_bytes(shape: Any, dtype: str, rows: int, new_tokens: int, memory_share: float) -> int:
    """Cache for so many rows; left alone, vLLM would take nine tenths of the memory there is, whatever it can use.

    Args:
        shape: The model's config.
        dtype: `float32` or `bfloat16`.
        rows: Sequences at a time.
        new_tokens: Longest completion.
        memory_share: Of the memory that is free, the cache takes this share at most.
    """
    heads = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
    width = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    token = 2 * shape.num_hidden_layers * heads * width * (2 if dtype == "bfloat16" else 4)
    most = int(memory_share * psutil.virtual_memory().available)
    wanted = max(shape.max_position_embeddings, rows * (PROMPT_TOKENS + new_tokens)) + SPARE_TOKENS
    return int(min(most, token * wanted))


def barring(ids: Sequence[int]) -> dict[int, float] | None:
    """vLLM's `logit_bias` by which tokens are never drawn; None where all may be."""
    return dict.fromkeys(ids, LEAST_BIAS) or None


def is_local(url: str) -> bool:
    """Whether an address is on this machine."""
    return urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")
