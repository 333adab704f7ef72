"""Random tiny models of the architectures that are supported, and of some that are not.

Windows are shorter than the rows of the tests, scales of logits are far from 1, and weights are large enough for both
to matter.
"""

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from stages.model.tiny import character_tokenizer

WINDOW = 6
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "initializer_range": 0.2,
}
ALTERNATING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, **ALTERNATING}
EXPERTS = {"num_experts_per_tok": 2}
SUPPORTED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": False}),
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    "qwen3-window": (
        "Qwen3Config",
        {"head_dim": 8, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "mistral": ("MistralConfig", {"sliding_window": WINDOW}),
    "gemma2": ("Gemma2Config", GEMMA | {"final_logit_softcapping": None, "attn_logit_softcapping": None}),
    "gemma3": ("Gemma3TextConfig", GEMMA),
    "gemma3-nested": ("Gemma3Config", GEMMA),
    "phi3": ("Phi3Config", {"sliding_window": WINDOW}),
    "olmo2": ("Olmo2Config", {}),
    "olmo3": ("Olmo3Config", ALTERNATING),
    "smollm3": ("SmolLM3Config", {}),
    "starcoder2": ("Starcoder2Config", {"sliding_window": WINDOW}),
    "granite": ("GraniteConfig", {"logits_scaling": 8.0}),
    "cohere2": ("Cohere2Config", ALTERNATING | {"logit_scale": 0.25}),
    "gpt2": ("GPT2Config", {}),
    "gpt-oss": ("GptOssConfig", ALTERNATING | EXPERTS | {"head_dim": 8, "num_local_experts": 4}),
    "qwen3-moe": ("Qwen3MoeConfig", EXPERTS | {"head_dim": 8, "num_experts": 4, "moe_intermediate_size": 16}),
    "mixtral": ("MixtralConfig", EXPERTS | {"num_local_experts": 4, "sliding_window": WINDOW}),
}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "gemma2-capped": ("Gemma2Config", GEMMA, "caps its logits (final_logit_softcapping)"),
    "gemma2-capped-scores": (
        "Gemma2Config",
        GEMMA | {"final_logit_softcapping": None},
        "caps its attention scores (attn_logit_softcapping)",
    ),
    "mamba2": ("Mamba2Config", {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1}, "recurrent state"),
    "lfm2": ("Lfm2Config", {"layer_types": ["conv", "full_attention"]}, "recurrent state"),
    "falcon-h1": ("FalconH1Config", {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64}, "recurrent state"),
    "qwen3-next": (
        "Qwen3NextConfig",
        {"head_dim": 8, "layer_types": ["linear_attention", "full_attention"]},
        "recurrent state",
    ),
    "granite-hybrid": (
        "GraniteMoeHybridConfig",
        {"layer_types": ["mamba", "attention"], "mamba_n_heads": 8},
        "recurrent state",
    ),
    "bloom": ("BloomConfig", {}, "counts positions in a mask of whole lines (ALiBi)"),
    "falcon-alibi": ("FalconConfig", {"alibi": True}, "counts positions in a mask of whole lines (ALiBi)"),
    "llama4": ("Llama4TextConfig", {"attention_chunk_size": 8}, "attends in chunks"),
}


def config_of(kind: str, settings: dict[str, Any]) -> PreTrainedConfig:
    """A config in the sizes above, for the project's character tokenizer."""
    tokenizer = character_tokenizer()
    common = {
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "dtype": torch.float32,
    }
    if kind == "GPT2Config":
        own = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.2}
        return transformers.GPT2Config(**common, **own, **settings)
    made: PreTrainedConfig = getattr(transformers, "Gemma3TextConfig" if kind == "Gemma3Config" else kind)(
        **SIZES, **common, **settings
    )
    if kind == "Gemma3Config":
        vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        whole = transformers.Gemma3Config(text_config=made.to_dict(), vision_config=vision | {"image_size": 28})
        whole.eos_token_id, whole.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
        return whole
    return made


def random_model(family: str) -> PreTrainedModel:
    """A model of a supported family."""
    kind, settings = SUPPORTED[family]
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config_of(kind, settings)).float().eval()
    return model


def write_model(family: str, folder: Path) -> None:
    """A model of a supported family with its tokenizer, as somebody publishes it."""
    random_model(family).save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)


def write_refused(family: str, folder: Path) -> None:
    """Config and tokenizer of a family that is refused; its weights are never read."""
    kind, settings, _ = REFUSED[family]
    config = config_of(kind, settings)
    config.architectures = [kind.replace("Config", "ForCausalLM")]
    config.save_pretrained(folder)
    save_file({"weight": torch.zeros(config.vocab_size, 64)}, folder / "model.safetensors")
    character_tokenizer().save_pretrained(folder)
