"""The gap between sampler and trainer: they compute the same policy in different ways, and never agree exactly.

Measured on the student's own tokens in the forward pass of a rollout's first update, which every step makes anyway.

Shape suffixes: B rows, T tokens, N concatenated completion tokens of several rows, C those of one chunk, H hidden,
V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from stages.config.on_policy import OnPolicyConfig
from stages.losses.chunked import TokenLoss
from stages.losses.log_probabilities import token_logprobs
from stages.on_policy.rollout import Rollout


def hands_over(config: OnPolicyConfig) -> bool:
    """Whether the sampler holds its own copy of the weights, which the trainer must send to it."""
    return config.sampler.backend in ("vllm", "vllm_server")


def may_differ(config: OnPolicyConfig) -> bool:
    """Whether the results of sampler and trainer can differ by more than rounding."""
    return hands_over(config) or config.dtype != "float32"


def with_mismatch(
    objective: Callable[..., TokenLoss], rollout: Rollout, temperature: float, rows: list[int]
) -> TokenLoss:
    """The objective of some rows, with metrics of the gap between trainer and sampler on the student's tokens.

    The metric is `mismatch` for rows drawn with the trainer's current weights. For rows drawn with older weights it is
    `drift`, which also contains the effect of the updates since.
    """
    inner = objective(rows)
    cpu = torch.device("cpu")
    tokens_N, sampler_N = rollout.tokens(rows, cpu), rollout.logprobs(rows, cpu)
    stale = [rollout.on_policy[row] and rollout.staleness(row) > 0 for row in rows]
    fresh = [rollout.on_policy[row] and not old for row, old in zip(rows, stale, strict=True)]
    masks = {"mismatch": fresh, "drift": stale}
    measured = {
        name: sampler_N.masked_fill(~_by_token(rollout, rows, mask), torch.nan)
        for name, mask in masks.items()
        if any(mask)
    }

    def token_loss(logits_CV: Tensor, part: slice) -> tuple[Tensor, Mapping[str, Tensor]]:
        losses_C, metrics = inner(logits_CV, part)
        with torch.no_grad():
            here_C = tokens_N[part].to(logits_CV.device)
            trainer_C = token_logprobs(logits_CV if temperature == 1.0 else logits_CV / temperature, here_C)
            gaps = {name: (trainer_C - their_N[part].to(trainer_C.device)).abs() for name, their_N in measured.items()}
            return losses_C, {**metrics, **gaps}

    return token_loss


def _by_token(rollout: Rollout, rows: Sequence[int], mask: Sequence[bool]) -> Tensor:
    """A mask of rows as a mask [N] of their completion tokens."""
    lengths = [len(rollout.samples[row].completion_ids) for row in rows]
    return torch.tensor(mask).repeat_interleave(torch.tensor(lengths))


def largest(mismatch: Mapping[int, Tensor]) -> float:
    """The largest gap over all rows' tokens; −1 if none was measured."""
    measured = [part_N[~part_N.isnan()] for part_N in mismatch.values()]
    return max((float(part_N.max()) for part_N in measured if len(part_N)), default=-1.0)
