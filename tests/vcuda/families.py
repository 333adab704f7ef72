"""Random tiny models of several architectures, as a user would bring them: a directory to be imported."""

from pathlib import Path

import torch
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from stages.model.tiny import character_tokenizer

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
}
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 64}
FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, object]]] = {
    "qwen3": (Qwen3Config, {"head_dim": 8, "tie_word_embeddings": False}),
    "qwen2": (Qwen2Config, {"tie_word_embeddings": True}),
    "llama": (LlamaConfig, {}),
    "mistral": (MistralConfig, {"sliding_window": 64}),
    "phi3": (Phi3Config, {}),
    "gemma2": (Gemma2Config, {**GEMMA, "final_logit_softcapping": None, "attn_logit_softcapping": None}),
    "gemma3": (Gemma3TextConfig, GEMMA),
}


def random_model(family: str, folder: Path) -> None:
    """Write a model of the family with its tokenizer."""
    tokenizer = character_tokenizer()
    kind, settings = FAMILIES[family]
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = kind(**SIZES, **ids, **settings, vocab_size=len(tokenizer), dtype=torch.float32)
    torch.manual_seed(0)
    MODEL_FOR_CAUSAL_LM_MAPPING[kind](config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
