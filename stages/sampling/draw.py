"""One token of each row from its logits."""

import torch
from torch import Tensor

from stages.sampling.samples import Sampling


def draw(
    logits_BV: Tensor, sampling: Sampling, generator: torch.Generator, barred: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Draw one token per row; none of the ids in `barred`.

    Returns:
        Tokens [B] and their log-probabilities [B] at the sampling temperature, before top-p and `barred` apply.
    """
    scaled_BV = logits_BV if sampling.temperature in (0.0, 1.0) else logits_BV / sampling.temperature
    logprobs_BV = scaled_BV.log_softmax(-1)
    drawable_BV = scaled_BV if barred is None else scaled_BV.index_fill(1, barred, -torch.inf)
    if sampling.temperature == 0:
        tokens_B = drawable_BV.argmax(-1)
    else:
        whole = sampling.top_p >= 1.0 and barred is None
        allowed_BV = logprobs_BV if whole else truncate(drawable_BV, sampling.top_p).log_softmax(-1)
        # With independent exponential clocks of these rates, the index of the first to ring has the softmax's
        # distribution.
        clocks_BV = torch.empty_like(allowed_BV).exponential_(generator=generator)
        tokens_B = (allowed_BV.exp() / clocks_BV).argmax(-1)
    return tokens_B, logprobs_BV.gather(1, tokens_B[:, None]).squeeze(1)


def truncate(logits_BV: Tensor, top_p: float) -> Tensor:
    """Nucleus truncation (Holtzman et al. 2020): keep the smallest set of likeliest tokens that reaches `top_p`."""
    if top_p >= 1.0:
        return logits_BV
    sorted_BV, order_BV = logits_BV.sort(-1, descending=True)
    probabilities_BV = sorted_BV.softmax(-1)
    before_BV = probabilities_BV.cumsum(-1) - probabilities_BV
    outside_BV = torch.zeros_like(before_BV, dtype=torch.bool).scatter(1, order_BV, before_BV >= top_p)
    return logits_BV.masked_fill(outside_BV, -torch.inf)
