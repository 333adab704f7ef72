"""The product's own computations in models of transformers."""

from transformers import PreTrainedModel

from stages.model.attention import use_attention
from stages.model.experts import use_experts
from stages.model.linear import use_onednn


def use_kernels(model: PreTrainedModel) -> None:
    """Let a model use them in linear layers, attention and mixtures of experts; parameters, their names, saved files
    and the saved config do not change."""
    use_onednn(model)
    use_attention(model)
    use_experts(model)
