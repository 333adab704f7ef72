"""The settings of vLLM, for an engine in the trainer's process and for servers. Free of torch and vLLM."""

from collections.abc import Sequence
from math import ceil
from typing import Any
from urllib.parse import urlsplit

import psutil

from base.errors import UserError
from stages.config.on_policy import OnPolicyConfig, vllm_reports
from stages.config.training import LoraConfig

# Defaults of the environment: no telemetry, no binding to cores, and on a CPU no compilation, which would need a C++
# compiler and more time than a short run's rollouts.
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
CPU_ENVIRONMENT = {"TORCHDYNAMO_DISABLE": "1"}
# The model runs in the process of its engine; an API server keeps a process of its own.
ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
MAX_ROWS = 256
# Room for a prompt in the cache on a CPU; longer prompts leave room for fewer rows at a time.
PROMPT_TOKENS = 512
# Least context of an engine, with room for the preflight's and a hand-over's short rows.
LEAST_CONTEXT = 512
# On a CPU the cache is allocated in blocks of 128 tokens, and one of them is never used.
SPARE_TOKENS = 2 * 128
LEAST_BATCH_TOKENS = 2048
# Tokens of one forward pass of a teacher's server on devices. vLLM makes the logits of a row's tokens in one pass
# together (its V2 runner 1024 at a time), in memory that it does not count at its start.
SCORED_TOKENS = 2048
# For a guarded server (`stages.vllm.guard`): the version of unverified weights, the key of its fault in an answer, and
# the header of a request that may be answered without verified weights.
NO_VERSION, FAULT, PROBE_HEADER = "none", "fault", "x-mopd-probe"
# The environment variable with the key of the servers that a process serves or uses.
KEY_VARIABLE = "MOPD_SERVER_KEY"
# The lowest logit bias that vLLM accepts.
LEAST_BIAS = -100.0
# The adapter ranks that vLLM can allocate.
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def logprobs_mode(temperature: float, top_p: float) -> str:
    """The `--logprobs-mode` in which vLLM reports the policy's log-probabilities at its temperature before top-p.

    Raises:
        UserError: there is no such mode.
    """
    if not vllm_reports(temperature, top_p):
        raise UserError(
            f"vLLM cannot report log-probabilities at temperature {temperature} before top_p {top_p}; set one of them "
            f"to 1, or sample with backend: transformers"
        )
    return "raw_logprobs" if temperature in (0.0, 1.0) else "processed_logprobs"


def lora_rank(lora: LoraConfig) -> int:
    """The smallest rank that vLLM can allocate for an adapter.

    Raises:
        UserError: the adapter's rank is too large.
    """
    rank = next((rank for rank in LORA_RANKS if rank >= lora.rank), None)
    if rank is None:
        raise UserError(f"lora.rank: vLLM takes adapters of rank {LORA_RANKS[-1]} at most, not {lora.rank}")
    return rank


def model_overrides(architecture: str) -> dict[str, Any]:
    """Overrides of a model's config.

    Output heads are never tied: on a CPU vLLM multiplies by a packed copy of the head, which a reload of the embedding
    alone does not update (seen with vLLM 0.32). The config of a model made from scratch may lack `architectures`.
    """
    return {"tie_word_embeddings": False, "architectures": [architecture]}


def rows_at_a_time(config: OnPolicyConfig, processes: int = 1) -> int:
    """Completions drawn together by an engine; of several processes that each have one, by each."""
    return min(MAX_ROWS, ceil(config.prompts_per_step / processes) * config.group_size)


def cpu_batch_tokens(context: int) -> int:
    """Tokens of one forward pass on a CPU, enough that no prefill is split: vLLM 0.32's engine fails on a split prefill
    of a request with a seed."""
    return max(LEAST_BATCH_TOKENS, context)


def needed_context(limit: int | None, longest_prompt: int | None, new_tokens: int) -> int | None:
    """The context that an engine is started with: the engine demands room in its cache for a row of this length.

    Args:
        limit: The model's own context; None if its config sets none.
        longest_prompt: Tokens of the longest prompt; None if unknown, which takes the whole context.
        new_tokens: Longest completion.
    """
    if longest_prompt is None:
        return limit
    # Scoring a row takes one more token.
    wanted = max(LEAST_CONTEXT, longest_prompt + new_tokens + 1)
    return wanted if limit is None else min(limit, wanted)


def cpu_cache_bytes(
    shape: Any, dtype: str, rows: int, new_tokens: int, memory_share: float, context: int | None = None
) -> int:
    """Bytes of the cache for `rows` sequences; by default vLLM would take nine tenths of the memory, used or not.

    Args:
        shape: The model's config.
        dtype: `float32` or `bfloat16`.
        rows: Sequences at a time.
        new_tokens: Longest completion.
        memory_share: Largest share of the free memory that the cache takes.
        context: The engine's; the model's own if absent.
    """
    heads = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
    width = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    token = 2 * shape.num_hidden_layers * heads * width * (2 if dtype == "bfloat16" else 4)
    most = int(memory_share * psutil.virtual_memory().available)
    wanted = max(context or shape.max_position_embeddings, rows * (PROMPT_TOKENS + new_tokens)) + SPARE_TOKENS
    return int(min(most, token * wanted))


def barring(ids: Sequence[int]) -> dict[int, float] | None:
    """vLLM's `logit_bias` with which these ids are never drawn; None without ids."""
    return dict.fromkeys(ids, LEAST_BIAS) or None


def is_local(url: str) -> bool:
    """Whether an address is on this machine."""
    return urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")
