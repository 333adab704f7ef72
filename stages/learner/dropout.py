"""Selects the dropout layers that are active while a policy is updated.

A model's config may have dropout (GPT-2 has 0.1). In an on-policy update it would change the policy relative to the one
that drew the completions, and to the teacher or reference it is compared with: a student equal to its teacher would
have a divergence and a gradient.
"""

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def begin_update(model: PreTrainedModel | PeftModel, *, own_dropout: bool) -> None:
    """Put a model into the mode of a training forward.

    Args:
        model: The policy's model.
        own_dropout: Whether the dropout of the model's config applies. An adapter's `lora.dropout` always applies,
            because the run file sets it explicitly.
    """
    if own_dropout:
        model.train()
        return
    model.eval()
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.lora_dropout.train()
        elif isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
            _recompute(module)


def _recompute(layer: nn.Module) -> None:
    """Let a layer recompute its activations, which it does only in training mode; its children keep their mode."""
    layer.training = True
    for name, value in vars(layer).items():
        # Layers that call the dropout function themselves store its probability in an attribute.
        if "dropout" in name and isinstance(value, float):
            setattr(layer, name, 0.0)
