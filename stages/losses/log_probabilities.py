"""Losses of the on-policy loop: pure functions of tensors that return losses [N] and metrics [N].

Shape suffixes: N concatenated sampled tokens, V vocabulary. `policy` is the student being trained, `sampler` the policy
that drew the tokens; advantages and teachers have no gradient. The caller weights and sums the tokens
(`stages.learner.update`).
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


def importance_weights(
    staleness_N: Tensor, mismatch_N: Tensor, correction: str, band: tuple[float, float]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Importance weights of tokens that another policy drew; k = trainer / sampler before any update of the rollout,
    r = policy / trainer since then.

    Args:
        staleness_N: log r.
        mismatch_N: log k, of the token or the mean over its sequence (the geometric mean of GSPO, Zheng et al. 2025).
        correction: `drop`: k·r inside the band, else 0 (MiMo-V2-Flash); `truncate`: min(k·r, high) (TIS, Yao et al.
            2025); `mask`: k·r where k lies inside the band, else 0 (IcePop, Ling team 2025).
        band: [low, high].

    Returns:
        Weights [N] without gradient, and the metrics `ratio` and `truncated_ratio` or `dropped`.
    """
    low, high = band
    ratio_N = (staleness_N + mismatch_N).detach().exp()
    if correction == "truncate":
        return ratio_N.clamp(max=high), {"truncated_ratio": (ratio_N > high).float(), "ratio": ratio_N}
    compared_N = mismatch_N.detach().exp() if correction == "mask" else ratio_N
    inside_N = (compared_N >= low) & (compared_N <= high)
    return torch.where(inside_N, ratio_N, 0.0), {"dropped": (~inside_N).float(), "ratio": ratio_N}


def policy_gradient(policy_logprobs_N: Tensor, advantages_N: Tensor, weights_N: Tensor) -> Tensor:
    """The score-function loss [N]: −w·A·log policy; neither weight nor advantage has a gradient."""
    return -weights_N.detach() * advantages_N.detach() * policy_logprobs_N


def sampled_advantages(policy_logprobs_N: Tensor, target_logprobs_N: Tensor, clip: float) -> Tensor:
    """The sampled token's teacher signal: clip(sg[log target − log policy], ±clip) (MiMo-V2-Flash).

    The gradient is stopped, because the log-ratio's own gradient does not depend on the teacher.
    """
    return (target_logprobs_N - policy_logprobs_N).detach().clamp(-clip, clip)


def extrapolate(teacher_N: Tensor, reference_N: Tensor, extrapolation: float) -> Tensor:
    """The target beyond the teacher: log T + (λ − 1)(log T − log R) (ExOPD), of logits or log-probabilities.

    It follows from λ(log T − log R) − (log S − log R) = log target − log S. λ = 1 is the teacher exactly, and so is
    every λ where teacher and reference agree. A token that the teacher excludes is excluded by the target too.

    Args:
        teacher_N: Values of the teacher, of any shape.
        reference_N: Values of the reference, of the same shape.
        extrapolation: λ.
    """
    target_N = teacher_N + (extrapolation - 1.0) * (teacher_N - reference_N)
    return torch.where(teacher_N == -torch.inf, teacher_N, target_N)
