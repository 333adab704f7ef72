"""Losses over completion tokens in bounded memory: logits exist for one chunk of tokens at a time.

Shape suffixes: N concatenated tokens, C tokens of one chunk, H hidden, V vocabulary.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from stages.config.chunks import CHUNK_BYTES, chunk_bytes
from stages.model.precision import add_head_gradient, head_factor, head_logits, hidden_gradient

# Called with the logits [C, V] of the tokens in a slice; returns their losses [C] and metrics [C] by name. The names
# are the same for every slice.
TokenLoss = Callable[[Tensor, slice], tuple[Tensor, Mapping[str, Tensor]]]


def chunk_length(vocabulary: int, device: torch.device) -> int:
    """Tokens of a chunk: as many as have float32 logits of the device's chunk in bytes."""
    return max(1, _device_chunk_bytes(device) // (4 * vocabulary))


def _device_chunk_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return CHUNK_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    # What torch holds and no tensor uses is free too.
    return chunk_bytes(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


def chunked_token_loss(
    hidden_NH: Tensor, head_VH: Tensor, weights_N: Tensor, token_loss: TokenLoss, chunk_tokens: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum of per-token losses of the logits `hidden @ head.T`, with one chunk of logits in memory at a time.

    Gradients are computed chunk by chunk in the forward pass (as in fused linear losses), so the cost is one pass over
    the head, and the peak memory is O(chunk x V) instead of O(N x V).

    Args:
        hidden_NH: Hidden states that predict each token; their type is that of the products.
        head_VH: Output head, of any floating type.
        weights_N: Weight of each token's loss in the sum.
        token_loss: Pure function of logits; gradients flow through the losses only, metrics are detached.
        chunk_tokens: C.

    Returns:
        The scalar loss, in float32 or better, and each metric as a vector [N]. The loss can be differentiated once.
    """
    metrics: dict[str, Tensor] = {}
    loss: Tensor = _ChunkedTokenLoss.apply(hidden_NH, head_VH, weights_N, token_loss, chunk_tokens, metrics)
    return loss, metrics


class _ChunkedTokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        head_VH: Tensor,
        weights_N: Tensor,
        token_loss: TokenLoss,
        chunk_tokens: int,
        metrics: dict[str, Tensor],
    ) -> Tensor:
        """Sum the losses and compute their gradients, one chunk at a time."""
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        hidden_NH, wide = hidden_NH.detach(), torch.promote_types(hidden_NH.dtype, torch.float32)
        # The product is computed in the hidden states' precision; the head is cast once, not in every chunk.
        factor_VH = head_factor(head_VH, hidden_NH.dtype)
        grad_hidden_NH = torch.empty_like(hidden_NH) if needs_hidden else None
        grad_head_VH = torch.zeros_like(head_VH, dtype=wide) if needs_head else None
        total = hidden_NH.new_zeros((), dtype=wide)
        for start in range(0, hidden_NH.shape[0], chunk_tokens):
            part = slice(start, start + chunk_tokens)
            hidden_CH = hidden_NH[part]
            logits_CV = head_logits(hidden_CH, factor_VH).requires_grad_(needs_hidden or needs_head)
            with torch.enable_grad():
                losses_C, values = token_loss(logits_CV, part)
                chunk_loss = (losses_C * weights_N[part]).sum()
            total += chunk_loss.detach()
            # Copied: a small tensor kept from every chunk would occupy memory that the next chunk's logits need.
            for name, value_C in values.items():
                metric_N = metrics.setdefault(name, value_C.new_empty(len(hidden_NH)))
                metric_N[part] = value_C.detach()
            if not logits_CV.requires_grad:
                continue
            grad_CV = torch.autograd.grad(chunk_loss, logits_CV)[0].to(hidden_NH.dtype)
            del logits_CV, losses_C, chunk_loss
            if grad_hidden_NH is not None:
                grad_hidden_NH[part] = hidden_gradient(grad_CV, factor_VH)
            if grad_head_VH is not None:
                add_head_gradient(grad_head_VH, grad_CV, hidden_CH)
        ctx.gradients = [grad_hidden_NH, None if grad_head_VH is None else grad_head_VH.to(head_VH.dtype)]
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients, scaled in place, which is possible only once."""
        if ctx.gradients is None:
            raise RuntimeError("a chunked loss can be differentiated only once: its gradients are not kept")
        gradients, ctx.gradients = ctx.gradients, None
        for gradient in gradients:
            if gradient is not None:
                gradient.mul_(grad_outputs[0])
        return (*gradients, None, None, None, None)
