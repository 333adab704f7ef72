"""The number type of a model's products: float32, or bfloat16 with sums in float32.

In bfloat16 the factors of a product are rounded and its sum is accumulated in float32. Logits stay in float32: a logit
of 20 nats in bfloat16 would be rounded by up to 0.06. The residual stream, norms, embeddings, losses and trained
weights stay in float32 too; frozen weights of linear layers and experts are kept in bfloat16.

Shape suffixes: C tokens of a chunk, H hidden, V vocabulary.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.model.linear import matmul_t

Dtype = Literal["float32", "bfloat16"]
# An attribute of all modules whose experts transformers multiplies (`transformers.integrations.moe`).
EXPERTS = "_is_expert_parallel"


def precision(device: torch.device, dtype: Dtype) -> torch.autocast:
    """A context in which a model's own forward multiplies in `dtype`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


def computes_in_bfloat16(device: torch.device) -> bool:
    """Whether code on the device runs inside `precision` with bfloat16."""
    return bool(torch.is_autocast_enabled(device.type))


def as_factor(tensor: Tensor, dtype: Dtype) -> Tensor:
    """A float32 tensor rounded to the type in which it is multiplied; differentiable, and the same in float32."""
    return tensor.to(torch.bfloat16) if dtype == "bfloat16" else tensor


def head_factor(head_VH: Tensor, dtype: torch.dtype) -> Tensor:
    """The output head as a factor of `head_logits`, made once for many chunks.

    Args:
        head_VH: The head's weight, of any floating type.
        dtype: Type of the hidden states.

    Returns:
        The weight in that type, without gradient. Bfloat16 on a CPU is returned as float32, of the same values: a CPU's
        products of bfloat16 would also round their sums.
    """
    cast_VH = head_VH.detach().to(dtype)
    return _summable(cast_VH)


def head_logits(hidden_CH: Tensor, factor_VH: Tensor) -> Tensor:
    """Logits [C, V] in float32 or better, of hidden states and a `head_factor` of their type."""
    if factor_VH.dtype == torch.bfloat16:
        return torch.mm(hidden_CH, factor_VH.T, out_dtype=torch.float32)
    with torch.autocast(hidden_CH.device.type, enabled=False):
        return matmul_t(hidden_CH.to(factor_VH.dtype), factor_VH).to(
            torch.promote_types(factor_VH.dtype, torch.float32)
        )


def keep_logits_wide(model: PreTrainedModel) -> None:
    """Let a model's own forward pass under autocast return logits in float32, which autocast would round too."""
    model.get_output_embeddings().__class__ = _WideHead


class _WideHead(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        """The logits of hidden states with any leading dimensions."""
        logits_NV = head_logits(input.to(torch.bfloat16).flatten(0, -2), head_factor(self.weight, torch.bfloat16))
        return logits_NV.view(*input.shape[:-1], -1)


def hidden_gradient(gradient_CV: Tensor, factor_VH: Tensor) -> Tensor:
    """The gradient [C, H] of the hidden states from that of the logits."""
    return matmul_t(gradient_CV.to(factor_VH.dtype), factor_VH.T)


def add_head_gradient(total_VH: Tensor, gradient_CV: Tensor, hidden_CH: Tensor) -> None:
    """Add a chunk's gradient of the head to a sum in float32 or better.

    Args:
        total_VH: The sum.
        gradient_CV: Gradient of the chunk's logits, in the type of `hidden_CH`.
        hidden_CH: The chunk's hidden states.
    """
    left_VC, right_CH = _summable(gradient_CV).T, _summable(hidden_CH)
    if total_VH.dtype == left_VC.dtype:
        # Without a second matrix of the head's size.
        total_VH.addmm_(left_VC, right_CH)
    elif left_VC.dtype == torch.bfloat16:
        total_VH += torch.mm(left_VC, right_CH, out_dtype=torch.float32)
    else:
        total_VH += left_VC @ right_CH


def narrow(model: nn.Module) -> None:
    """Keep frozen weights of linear layers and of experts in bfloat16, in place.

    They would be rounded in every product, so results do not change. A head that is also the input embedding stays as
    it is: the residual stream begins with its rows.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            embedding = module.get_input_embeddings()
            break
    else:
        raise TypeError(f"{type(model).__name__} has no model of transformers")
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if any(parameter.requires_grad for parameter in own):
            continue
        if hasattr(module, EXPERTS):
            factors = [parameter for parameter in own if is_experts_weight(parameter)]
        elif isinstance(module, nn.Linear) and module.weight is not embedding.weight:
            factors = own
        else:
            continue
        for parameter in factors:
            parameter.data = parameter.data.to(torch.bfloat16)


def is_experts_weight(value: Any) -> bool:
    """Whether an attribute of a layer's experts is their weights [experts, inputs, outputs], not their biases or
    anything else."""
    return isinstance(value, Tensor) and value.dim() == 3


def _summable(tensor: Tensor) -> Tensor:
    """Bfloat16 on a CPU as float32, since products there cannot return sums in float32."""
    on_cpu = tensor.device.type == "cpu" and tensor.dtype == torch.bfloat16
    return tensor.float() if on_cpu else tensor
