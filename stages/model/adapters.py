"""Adapters in peft's terms."""

from peft import LoraConfig as PeftLoraConfig

from stages.config.training import LoraConfig


def peft_config(lora: LoraConfig) -> PeftLoraConfig:
    """The run file's adapter shape in peft's terms."""
    return PeftLoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )
