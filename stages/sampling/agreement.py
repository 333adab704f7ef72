"""A plain forward pass, and the largest gap to it that another computation of the same policy may have.

Shape suffixes: B rows, T tokens, N completion tokens, H hidden, V vocabulary.
"""

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from stages.config.on_policy import OnPolicyConfig
from stages.model.policy import HiddenStates, head_weight
from stages.model.precision import Dtype, head_factor, head_logits
from stages.sampling.samples import Sample

TOLERANCES = {"float32": 1e-3, "bfloat16": 0.25}


def agreement_tolerance(config: OnPolicyConfig) -> float:
    """Largest gap between two forward passes of one model that counts as rounding, in nats."""
    return config.preflight_tolerance or TOLERANCES[config.dtype]


@torch.no_grad()
def plain_logits(model: PreTrainedModel | PeftModel, drawn: Sample, dtype: Dtype) -> Tensor:
    """Logits [N, V] of a completion by the model's own forward pass of that row alone, in the trainer's precision."""
    head_VH = head_weight(model)
    tokens_BT = torch.tensor([drawn.tokens], device=head_VH.device)
    hidden_TH = HiddenStates(model, dtype)(tokens_BT)[0, len(drawn.prompt_ids) - 1 : -1]
    if dtype == "bfloat16":
        return head_logits(hidden_TH, head_factor(head_VH, hidden_TH.dtype)).cpu()
    return (hidden_TH.float() @ head_VH.float().T).cpu()
