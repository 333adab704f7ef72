"""How far sampler and trainer are apart: they compute the same policy by different ways, and never exactly agree.

Measured on the student's own tokens in the forward pass of a rollout's first update, which every step makes anyway.

Shape suffixes: B rows, T tokens, N completion tokens of some rows laid end to end, C those of one chunk, H hidden,
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
    """Whether the sampler has weights of its own, which it is handed."""
    return config.sampler.backend in ("vllm", "vllm_server")


def may_differ(config: OnPolicyConfig) -> bool:
    """Whether sampler and trainer compute in ways that differ by more than rounding."""
    return hands_over(config) or config.dtype != "float32"


def with_mismatch(
    objective: Callable[..., TokenLoss], rollout: Rollout, temperature: float, rows: list[int]
) -> TokenLoss:
    """The objective of some rows, which also tells how far the trainer is from the sampler on the student's tokens.

    `mismatch` where both have the same weights; `drift`, which holds what the updates since have moved as well, where
    the sampler's are older.
    """
    inner = objective(rows)
    cpu = torch.device("cpu")
    tokens_N, sampler_N = rollout.tokens(rows, cpu), rollout.logprobs(rows, cpu)
    stale = [rollout.own[row] and rollout.staleness(row) > 0 for row in rows]
    fresh = [rollout.own[row] and not old for row, old in zip(rows, stale, strict=True)]
    told = {"mismatch": fresh, "drift": stale}
    measured = {
        name: sampler_N.masked_fill(~_by_token(rollout, rows, which), torch.nan)
        for name, which in told.items()
        if any(which)
    }

    def token_loss(logits_CV: Tensor, part: slice) -> tuple[Tensor, Mapping[str, Tensor]]:
        losses_C, metrics = inner(logits_CV, part)
        with torch.no_grad():
            here_C = tokens_N[part].to(logits_CV.device)
            trainer_C = token_logprobs(logits_CV if temperature == 1.0 else logits_CV / temperature, here_C)
            gaps = {name: (trainer_C - their_N[part].to(trainer_C.device)).abs() for name, their_N in measured.items()}
            return losses_C, {**metrics, **gaps}

    return token_loss


def _by_token(rollout: Rollout, rows: Sequence[int], which: Sequence[bool]) -> Tensor:
    """A row's answer for each of its completion tokens [N]."""
    lengths = [len(rollout.samples[row].completion_ids) for row in rows]
    return torch.tensor(which).repeat_interleave(torch.tensor(lengths))


def largest(mismatch: Mapping[int, Tensor]) -> float:
    """The largest gap of all rows' tokens; −1 where none was measured."""
    known = [part_N[~part_N.isnan()] for part_N in mismatch.values()]
    return max((float(part_N.max()) for part_N in known if len(part_N)), default=-1.0)
