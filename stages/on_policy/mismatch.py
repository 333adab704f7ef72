"""How far sampler and trainer are apart: they compute the same policy by different ways, and never exactly agree.

Measured on the student's own tokens in the forward pass of a rollout's first update, which every step makes anyway.

Shape suffixes: N completion tokens of some rows laid end to end, C those of one chunk, V vocabulary.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from stages.config import OnPolicyConfig
from stages.core.loss import TokenLoss
from stages.on_policy.losses import token_logprobs
from stages.on_policy.rollout import Rollout


def may_differ(config: OnPolicyConfig) -> bool:
    """Whether sampler and trainer compute in ways that differ by more than rounding."""
    return config.sampler.backend in ("vllm", "vllm_server") or config.dtype != "float32"


def with_mismatch(
    objective: Callable[..., TokenLoss], rollout: Rollout, temperature: float, rows: list[int]
) -> TokenLoss:
    """The objective of some rows, which also tells how far the trainer is from the sampler on the student's tokens."""
    inner = objective(rows)
    cpu = torch.device("cpu")
    tokens_N, sampler_N = rollout.tokens(rows, cpu), rollout.logprobs(rows, cpu)
    own = torch.cat([torch.full((len(rollout.samples[row].completion_ids),), rollout.own[row]) for row in rows])
    sampler_N = sampler_N.masked_fill(~own, torch.nan)

    def token_loss(logits_CV: Tensor, part: slice) -> tuple[Tensor, Mapping[str, Tensor]]:
        losses_C, metrics = inner(logits_CV, part)
        with torch.no_grad():
            here_C = tokens_N[part].to(logits_CV.device)
            trainer_C = token_logprobs(logits_CV if temperature == 1.0 else logits_CV / temperature, here_C)
            return losses_C, {**metrics, "mismatch": (trainer_C - sampler_N[part].to(trainer_C.device)).abs()}

    return token_loss


def largest(mismatch: Mapping[int, Tensor]) -> float:
    """The largest gap of all rows' tokens; −1 where none was measured."""
    return max((float(part_N.nan_to_num(0.0).max()) for part_N in mismatch.values() if len(part_N)), default=-1.0)
