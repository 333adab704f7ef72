"""Tokenizers with the chat templates of several families, and two-layer models to go with them."""

from dataclasses import dataclass, field
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from stages.model.policy import Policy

CORPUS = ["the answer is 42", "sort up 3 1 2:", "user assistant system", "what is the sum of these numbers?"] * 5

LLAMA = (
    "{{- bos_token }}{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    '{%- set date_string = strftime_now("%d %b %Y") %}{%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}'
    "{%- endif %}{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content']|trim %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set system_message = '' %}{%- endif %}"
    '{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}{{- "Today Date: " + date_string + "\\n\\n" }}'
    '{{- system_message }}{{- "<|eot_id|>" }}{%- for message in messages %}'
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{- message['content']|trim + '<|eot_id|>' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
    "{%- endif %}"
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
QWEN3 = (
    "{%- for message in messages %}{%- set content = message.content %}{%- if message.role == 'assistant' %}"
    "{%- set reasoning = '' %}{%- if '</think>' in content %}"
    "{%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
    "{{- '<|im_start|>assistant\\n' }}{%- if loop.last %}"
    "{{- '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}"
    "{%- else %}{{- content }}{%- endif %}{{- '<|im_end|>\\n' }}{%- else %}"
    "{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
    "{% endif %}{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{%- for message in messages %}{%- if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + '[/INST]' }}{%- elif message['role'] == 'system' %}"
    "{{ '[SYSTEM_PROMPT]' + message['content'] + '[/SYSTEM_PROMPT]' }}{%- else %}"
    "{{ ' ' + message['content'] + eos_token }}{%- endif %}{%- endfor %}"
)


@dataclass(frozen=True)
class Family:
    """How a family's tokenizer is made.

    Attributes:
        special: Its special tokens; first the EOS, then the BOS where it has one.
        end: The token that ends an assistant's turn.
        template: Its chat template.
        plain: Added tokens that are no special ones.
        bos: Whether the second special token is the BOS.
        model: Config of a model of the family.
        settings: More of that config.
        appends_eos: Whether the tokenizer puts EOS behind every text.
    """

    special: tuple[str, ...]
    end: str
    template: str | None
    plain: tuple[str, ...] = ()
    bos: bool = True
    model: type[PreTrainedConfig] = LlamaConfig
    settings: dict[str, Any] = field(default_factory=dict)
    appends_eos: bool = False


HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
THINK = ("<think>", "</think>")
FAMILIES = {
    "llama3": Family(("<|end_of_text|>", "<|begin_of_text|>", *HEADERS), "<|eot_id|>", LLAMA),
    "chatml_base": Family(
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), "<|im_end|>", CHATML, bos=False, model=Qwen3Config
    ),
    "qwen3": Family(
        ("<|im_end|>", "<|im_start|>", "<|endoftext|>"), "<|im_end|>", QWEN3, THINK, bos=False, model=Qwen3Config
    ),
    "gemma": Family(("<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"), "<end_of_turn>", GEMMA, model=GemmaConfig),
    "mistral": Family(
        ("</s>", "<s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
        "</s>",
        MISTRAL,
        model=MistralConfig,
        settings={"sliding_window": None},
    ),
    "base": Family(("<|endoftext|>", "<|startoftext|>"), "<|endoftext|>", None, appends_eos=True),
    "gpt2": Family(("<|endoftext|>",), "<|endoftext|>", None, bos=False, model=GPT2Config),
}
CHATS = [name for name, family in FAMILIES.items() if family.template is not None]


def make_tokenizer(name: str, *, merges: int = 60) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of the family, with its chat template.

    Args:
        name: The family.
        merges: Most merges it learns.
    """
    family = FAMILIES[name]
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=256 + merges, initial_alphabet=alphabet, show_progress=False)
    )
    raw.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in family.special])
    raw.add_tokens([AddedToken(token, normalized=False) for token in family.plain])
    eos, bos = family.special[0], family.special[1] if family.bos else None
    if bos is not None:
        end = [f"{eos}:0"] if family.appends_eos else []
        known = [(token, raw.token_to_id(token)) for token in (bos, eos)]
        raw.post_processor = processors.TemplateProcessing(single=[f"{bos}:0", "$A:0", *end], special_tokens=known)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token=eos, bos_token=bos, pad_token=eos, clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = family.template
    return tokenizer


def make_policy(name: str, *, seed: int = 0, padding: int = 0, **settings: Any) -> Policy:
    """A random model of the family.

    Args:
        name: The family.
        seed: Of its weights.
        padding: Rows of its vocabulary beyond the tokenizer's tokens.
        settings: More of its config.
    """
    family, tokenizer = FAMILIES[name], make_tokenizer(name)
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    if family.model is GPT2Config:
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 512}
    else:
        sizes |= {
            "intermediate_size": 64,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 512,
        }
    ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    torch.manual_seed(seed)
    config = family.model(
        **sizes, **ids, **family.settings, **settings, vocab_size=len(tokenizer) + padding, dtype=torch.float32
    )
    return Policy(MODEL_FOR_CAUSAL_LM_MAPPING[family.model](config).eval(), tokenizer)
