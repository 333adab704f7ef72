"""Losses over completion tokens in bounded memory: logits exist for one chunk of tokens at a time.

Shape suffixes: N concatenated tokens, C tokens of one chunk, H hidden, V vocabulary.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from stages.model.linear import matmul_t

# Called with the logits [C, V] of the tokens in a slice; returns their losses [C] and metrics [C] by name. The names
# are the same for every slice.
TokenLoss = Callable[[Tensor, slice], tuple[Tensor, Mapping[str, Tensor]]]


# Smaller chunks lose time between kernels, larger ones do not fit the cache (`benchmarks/exact_kl.py`).
CHUNK_BYTES = 64 * 2**20


def chunk_length(vocabulary: int) -> int:
    """Tokens of a chunk: as many as have float32 logits of `CHUNK_BYTES`."""
    return max(1, CHUNK_BYTES // (4 * vocabulary))


def chunked_token_loss(
    hidden_NH: Tensor, head_VH: Tensor, weights_N: Tensor, token_loss: TokenLoss, chunk_tokens: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum of per-token losses of the logits `hidden @ head.T`, with one chunk of logits in memory at a time.

    Gradients are computed chunk by chunk in the forward pass (as in fused linear losses), so the cost is one pass over
    the head, and the peak memory is O(chunk x V) instead of O(N x V).

    Args:
        hidden_NH: Hidden states that predict each token.
        head_VH: Output head.
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
        cast_VH = head_VH.detach().to(hidden_NH.dtype)
        grad_hidden_NH = torch.empty_like(hidden_NH) if needs_hidden else None
        grad_head_VH = torch.zeros_like(head_VH, dtype=wide) if needs_head else None
        total = hidden_NH.new_zeros((), dtype=wide)
        for start in range(0, hidden_NH.shape[0], chunk_tokens):
            part = slice(start, start + chunk_tokens)
            hidden_CH = hidden_NH[part]
            logits_CV = matmul_t(hidden_CH, cast_VH).to(wide).requires_grad_(needs_hidden or needs_head)
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
                grad_hidden_NH[part] = matmul_t(grad_CV, cast_VH.T)
            if grad_head_VH is not None:
                _add_product(grad_head_VH, grad_CV.T, hidden_CH)
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


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, without a second matrix of that size if both have one precision."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
