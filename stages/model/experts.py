"""Products of the experts of a mixture, in the number type of other products.

transformers keeps the weights of a layer's experts in tensors of three dimensions and multiplies them by a grouped
product (`grouped_mm`), which autocast leaves alone: under bfloat16 it would compute in float32. Registered with
transformers under `NAME`.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ExpertsInterface, grouped_mm_experts_forward

from stages.model.precision import computes_in_bfloat16, is_experts_weight

NAME = "mopd"


def use_experts(model: PreTrainedModel) -> None:
    """Let a model that uses transformers' grouped product compute its experts by `mix`; its saved config does not
    change."""
    if model.config._experts_implementation == "grouped_mm":
        model.set_experts_implementation(NAME)


def mix(module: nn.Module, hidden_NH: Tensor, index_NK: Tensor, weights_NK: Tensor) -> Tensor:
    """The experts' output [N, H] as transformers calls it; under bfloat16 with rounded factors.

    Args:
        module: The layer's experts.
        hidden_NH: Hidden states of N tokens.
        index_NK: The K experts of each token.
        weights_NK: Their weights.
    """
    experts = _Rounded(module) if computes_in_bfloat16(hidden_NH.device) else module
    mixed_NH: Tensor = grouped_mm_experts_forward(experts, hidden_NH, index_NK, weights_NK)
    return mixed_NH


class _Rounded:
    """A layer's experts, with weights in bfloat16."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        return value.to(torch.bfloat16) if is_experts_weight(value) else value


ExpertsInterface.register(NAME, mix)
