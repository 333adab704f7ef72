"""Configs of published models, whose weights are not needed to measure sizes."""

from typing import Any

from transformers import LlamaConfig, Qwen3Config


def smollm2(**over: Any) -> LlamaConfig:
    """HuggingFaceTB/SmolLM2-135M-Instruct."""
    sizes = {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    }
    return LlamaConfig(**{**sizes, **over})


def qwen3_8b(**over: Any) -> Qwen3Config:
    """Qwen/Qwen3-8B."""
    sizes = {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": False,
    }
    return Qwen3Config(**{**sizes, **over})
