"""Losses of the on-policy loop: pure functions of tensors that return losses [N] and metrics [N].

Shape suffixes: N sampled tokens laid end to end, V vocabulary. `policy` is the student being trained, `sampler` the
policy that drew the tokens; advantages and teachers carry no gradient. Weighting and summing the tokens is the
caller's (`stages.core.update`).
"""

import torch
from torch import Tensor

Losses = tuple[Tensor, dict[str, Tensor]]


def token_logprobs(logits_NV: Tensor, tokens_N: Tensor) -> Tensor:
    """Log-probability [N] of each token."""
    return logits_NV.log_softmax(-1).gather(1, tokens_N[:, None]).squeeze(1)


def entropy(logits_NV: Tensor) -> Tensor:
    """Entropy [N] of the distribution over the next token, in nats."""
    logprobs_NV = logits_NV.log_softmax(-1)
    return -(logprobs_NV.exp() * logprobs_NV).sum(-1)


def clipped_surrogate(
    policy_logprobs_N: Tensor, sampler_logprobs_N: Tensor, advantages_N: Tensor, clip_low: float, clip_high: float
) -> Losses:
    """PPO's clipped surrogate with an asymmetric clip (DAPO, Yu et al. 2025).

    loss = −min(r·A, clip(r, 1 − clip_low, 1 + clip_high)·A), r = policy / sampler.
    """
    ratio_N = (policy_logprobs_N - sampler_logprobs_N).exp()
    clipped_N = ratio_N.clamp(1 - clip_low, 1 + clip_high)
    losses_N = -torch.minimum(ratio_N * advantages_N, clipped_N * advantages_N)
    cut_N = ratio_N * advantages_N > clipped_N * advantages_N
    return losses_N, {"clipped": cut_N.float(), "ratio": ratio_N}


def importance_weighted_policy_gradient(
    policy_logprobs_N: Tensor, sampler_logprobs_N: Tensor, advantages_N: Tensor, band: tuple[float, float]
) -> Losses:
    """Policy gradient whose importance weight is dropped, not clipped, outside a band (MiMo-V2-Flash).

    loss = −w·A·log policy, w = sg[policy / sampler] inside [low, high], else 0.
    """
    ratio_N = (policy_logprobs_N - sampler_logprobs_N).detach().exp()
    low, high = band
    inside_N = (ratio_N >= low) & (ratio_N <= high)
    losses_N = -torch.where(inside_N, ratio_N, 0.0) * advantages_N.detach() * policy_logprobs_N
    return losses_N, {"dropped": (~inside_N).float(), "ratio": ratio_N}


def sampled_advantages(policy_logprobs_N: Tensor, teacher_logprobs_N: Tensor, clip: float) -> Tensor:
    """The sampled token's teacher signal: clip(sg[log teacher − log policy], ±clip) (MiMo-V2-Flash).

    Stopped, for the raw log-ratio's own gradient holds nothing of the teacher.
    """
    return (teacher_logprobs_N - policy_logprobs_N).detach().clamp(-clip, clip)


def reverse_kl(logits_NV: Tensor, teacher_logits_NV: Tensor) -> Losses:
    """Exact reverse KL over the full vocabulary: Σ_v policy·log(policy / teacher).

    The log-ratio is stopped: its own gradient sums to Σ_v ∇policy = 0, and leaving it out makes the gradient exactly 0
    where teacher and student are equal.
    """
    policy_NV = logits_NV.log_softmax(-1)
    teacher_NV = teacher_logits_NV.detach().log_softmax(-1)
    probabilities_NV = policy_NV.exp()
    losses_N = (probabilities_NV * (policy_NV - teacher_NV).detach()).sum(-1)
    entropy_N = -(probabilities_NV * policy_NV).sum(-1)
    return losses_N, {"reverse_kl": losses_N, "entropy": entropy_N}
