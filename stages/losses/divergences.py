"""Divergences of the student from its teacher, token by token: exact over the vocabulary, or over its likeliest tokens.

Shape suffixes: N concatenated tokens, V vocabulary, K tokens of a support, J those and the tail's bucket.

S is the student, T the teacher, z the student's logits. A divergence with derivative g = ∂L/∂S has the gradient
∂L/∂z = S·(g − Σ S·g). It is computed here in closed form together with the value. So nothing is differentiated through
a softmax, and a teacher equal to the student has a gradient of exactly 0. Where 0·log 0 = 0 does not apply, the
logarithm of a probability is clamped at `LEAST_LOGPROB`: a token that one side excludes (−inf, a padded vocabulary) has
a large loss, not NaN.
"""

from typing import Any

import torch
from torch import Tensor

from stages.losses.log_probabilities import Losses

# The exponential of its absolute value is still finite in float32.
LEAST_LOGPROB = -87.0


def reverse_kl(logits_NV: Tensor, teacher_logits_NV: Tensor) -> Losses:
    """Exact reverse KL, Σ S·log(S/T), with ∂L/∂z = S·(log(S/T) − KL).

    Args:
        logits_NV: The student's logits; only they receive gradients.
        teacher_logits_NV: The teacher's logits.

    Returns:
        Losses [N] in nats, and, as for every full-vocabulary divergence, the metrics `reverse_kl` and the student's
        `entropy`, so that objectives can be compared.
    """
    with torch.no_grad():
        student_NV, probs_NV = _distribution(logits_NV)
        entropy_N = _expectation(probs_NV, student_NV).neg_()
        teacher_NV, _ = _distribution(teacher_logits_NV.to(student_NV.dtype), probs=False)
        ratio_NV = student_NV.sub_(teacher_NV)
        kl_N, gradient_NV = _reverse(probs_NV, ratio_NV)
    return _with_gradient(logits_NV, kl_N, gradient_NV), {"reverse_kl": kl_N, "entropy": entropy_N}


def forward_kl(logits_NV: Tensor, teacher_logits_NV: Tensor) -> Losses:
    """Exact forward KL, Σ T·log(T/S), with ∂L/∂z = S − T; arguments and metrics as for `reverse_kl`."""
    with torch.no_grad():
        student_NV, probs_NV = _distribution(logits_NV)
        entropy_N = _expectation(probs_NV, student_NV).neg_()
        teacher_NV, teacher_probs_NV = _distribution(teacher_logits_NV.to(student_NV.dtype))
        ratio_NV = student_NV.sub_(teacher_NV)
        reverse_N = _expectation(probs_NV, ratio_NV)
        losses_N = _expectation(teacher_probs_NV, ratio_NV).neg_()
        gradient_NV = probs_NV.sub_(teacher_probs_NV)
    return _with_gradient(logits_NV, losses_N, gradient_NV), {"reverse_kl": reverse_N, "entropy": entropy_N}


def jsd(logits_NV: Tensor, teacher_logits_NV: Tensor, beta: float) -> Losses:
    """Generalised JSD, β·KL(T‖m) + (1−β)·KL(S‖m), m = βT + (1−β)S (GKD, Agarwal et al. 2024).

    ∂L/∂z = (1−β)·S·(log(S/m) − Σ S·log(S/m)). The loss divided by β tends to the forward KL as β → 0, divided by 1−β
    to the reverse KL as β → 1. Arguments and metrics as for `reverse_kl`.
    """
    with torch.no_grad():
        student_NV, probs_NV = _distribution(logits_NV)
        entropy_N = _expectation(probs_NV, student_NV).neg_()
        teacher_NV, teacher_probs_NV = _distribution(teacher_logits_NV.to(student_NV.dtype))
        ratio_NV = student_NV.sub_(teacher_NV)
        reverse_N = _expectation(probs_NV, ratio_NV)
        to_mixture_NV = _log_student_over_mixture(ratio_NV, beta)
        student_half_N, gradient_NV = _reverse(probs_NV, to_mixture_NV)
        # log(T/m) = log(S/m) − log(S/T).
        teacher_half_N = _expectation(teacher_probs_NV, to_mixture_NV.sub_(ratio_NV))
        losses_N = beta * teacher_half_N + (1 - beta) * student_half_N
        gradient_NV *= 1 - beta
    return _with_gradient(logits_NV, losses_N, gradient_NV), {"reverse_kl": reverse_N, "entropy": entropy_N}


def entropy_aware(logits_NV: Tensor, teacher_logits_NV: Tensor, threshold: float) -> Losses:
    """Reverse KL, plus the forward KL where the teacher is unsure: Σ S·log(S/T) + 1[H(T) > threshold]·Σ T·log(T/S).

    It counters the loss of diversity under reverse KL where many continuations are right. Arguments and metrics as for
    `reverse_kl`, plus the metric `unsure`: whether the forward KL was added.
    """
    with torch.no_grad():
        student_NV, probs_NV = _distribution(logits_NV)
        entropy_N = _expectation(probs_NV, student_NV).neg_()
        teacher_NV, teacher_probs_NV = _distribution(teacher_logits_NV.to(student_NV.dtype))
        unsure_N = (_expectation(teacher_probs_NV, teacher_NV).neg_() > threshold).to(probs_NV.dtype)
        ratio_NV = student_NV.sub_(teacher_NV)
        reverse_N, gradient_NV = _reverse(probs_NV, ratio_NV)
        losses_N = reverse_N - unsure_N * _expectation(teacher_probs_NV, ratio_NV)
        gradient_NV.addcmul_(probs_NV.sub_(teacher_probs_NV), unsure_N[:, None])
    metrics = {"reverse_kl": reverse_N, "entropy": entropy_N, "unsure": unsure_N}
    return _with_gradient(logits_NV, losses_N, gradient_NV), metrics


def support(logits_NV: Tensor, teacher_logits_NV: Tensor, k: int, source: str) -> tuple[Tensor, Tensor]:
    """The tokens of a top-k divergence.

    Args:
        logits_NV: The student's logits.
        teacher_logits_NV: The teacher's logits.
        k: Likeliest tokens of a model; at most V are used.
        source: `student`, `teacher`, `union` (the student's, then the teacher's that are not among them) or
            `intersection` (the teacher's that are among the student's).

    Returns:
        Token ids [N, K], and a mask [N, K] of the valid ones; K is 2·k for the union. Valid ids are distinct.
    """
    with torch.no_grad():
        k = min(k, logits_NV.shape[1])
        if source == "student":
            indices_NK = logits_NV.topk(k).indices
            return indices_NK, torch.ones_like(indices_NK, dtype=torch.bool)
        teachers_NK = teacher_logits_NV.topk(k).indices
        every_NK = torch.ones_like(teachers_NK, dtype=torch.bool)
        if source == "teacher":
            return teachers_NK, every_NK
        students_NK = logits_NV.topk(k).indices
        shared_NK = _among(teachers_NK, students_NK, logits_NV.shape[1])
        if source == "intersection":
            return teachers_NK, shared_NK
        if source == "union":
            return torch.cat([students_NK, teachers_NK], 1), torch.cat([every_NK, ~shared_NK], 1)
        raise ValueError(f"no support {source!r}; valid: student, teacher, union, intersection")


def top_k_divergence(
    logits_NV: Tensor,
    teacher_logprobs_NK: Tensor,
    indices_NK: Tensor,
    valid_NK: Tensor,
    divergence: str,
    remainder: str,
    beta: float,
) -> Losses:
    """A divergence over a support; it needs only those of the teacher's log-probabilities that a server can send.

    Every token of the support adds D = S·log(S/T) − S + T (`reverse_kl`), T·log(T/S) − T + S (`forward_kl`), or for
    `jsd` the same form of both halves, β·[T·log(T/m) − T + m] + (1−β)·[S·log(S/m) − S + m]. For `jsd` the corrections
    cancel, which leaves the plain truncated sum. Over distributions that sum to 1 they cancel for all three.

    Args:
        logits_NV: The student's logits; only they receive gradients.
        teacher_logprobs_NK: The teacher's log-probabilities of the support's tokens, normalised over its vocabulary.
        indices_NK: Token ids of the support; the valid ones are distinct.
        valid_NK: Mask of the valid ids.
        divergence: `reverse_kl`, `forward_kl` or `jsd`.
        remainder: Treatment of the other tokens. `correct`: they add nothing, and −S + T keeps each term at 0 or more;
            `renormalise`: both distributions are restricted to the support and renormalised (an empty support has loss
            and gradient 0); `tail`: they share one bucket.
        beta: The teacher's weight in `jsd`.

    Returns:
        Losses [N], and the metrics `entropy` and `teacher_mass`, the teacher's probability of the support.
    """
    with torch.no_grad():
        student_NV, probs_NV = _distribution(logits_NV)
        entropy_N = _expectation(probs_NV, student_NV).neg_()
        both = (student_NV.gather(1, indices_NK), teacher_logprobs_NK.to(student_NV.dtype).clamp(min=LEAST_LOGPROB))
        # Invalid ids get the least log-probability on both sides, so that they add no loss.
        student_NK, teacher_NK = (logprobs_NK.masked_fill(~valid_NK, LEAST_LOGPROB) for logprobs_NK in both)
        mass_N = (teacher_NK.exp() * valid_NK).sum(1)
        student_NJ, teacher_NJ = (_with_remainder(x_NK, valid_NK, remainder) for x_NK in (student_NK, teacher_NK))
        values_NJ, flow_NJ = _pointwise(divergence, student_NJ, teacher_NJ, beta)
        mean_N = flow_NJ.sum(1)
        centred_NJ = flow_NJ - student_NJ.exp() * mean_N[:, None]
        # Keep only the other tokens in probs_NV. They share the bucket's gradient in proportion to their probabilities,
        # or have no term of their own.
        probs_NV.scatter_reduce_(1, indices_NK, (~valid_NK).to(probs_NV.dtype), "prod")
        if remainder == "tail":
            outside_N = centred_NJ[:, -1] / probs_NV.sum(1).clamp(min=torch.finfo(probs_NV.dtype).tiny)
        else:
            outside_N = -mean_N if remainder == "correct" else torch.zeros_like(mean_N)
        inside_NK = centred_NJ[:, : indices_NK.shape[1]] * valid_NK
        gradient_NV = probs_NV.mul_(outside_N[:, None]).scatter_add_(1, indices_NK, inside_NK)
    metrics = {"entropy": entropy_N, "teacher_mass": mass_N}
    return _with_gradient(logits_NV, values_NJ.sum(1), gradient_NV), metrics


def diagnose(logits_NV: Tensor, teacher_logits_NV: Tensor, k: int) -> dict[str, Tensor]:
    """Metrics of the agreement of student and teacher.

    Returns:
        `top_k_overlap` [N], the share of the student's k likeliest tokens among the teacher's; `entropy_gap` [N], the
        student's entropy minus the teacher's; `teacher_entropy` [N]; entropies in nats.
    """
    with torch.no_grad():
        entropies = []
        for logits in (logits_NV, teacher_logits_NV):
            logprobs_NV, probs_NV = _distribution(logits)
            entropies.append(_expectation(probs_NV, logprobs_NV).neg_())
        _, shared_NK = support(logits_NV, teacher_logits_NV, k, "intersection")
    student_N, teacher_N = entropies
    return {
        "top_k_overlap": shared_NK.to(student_N.dtype).mean(1),
        "entropy_gap": student_N - teacher_N,
        "teacher_entropy": teacher_N,
    }


class _GivenGradient(torch.autograd.Function):
    """Values [N] whose gradient with respect to logits [N, V] is already computed."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, losses_N: Tensor, gradient_NV: Tensor) -> Tensor:
        """Save the gradient for the backward pass."""
        ctx.save_for_backward(gradient_NV)
        ctx.dtype = logits_NV.dtype
        return losses_N.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Return the saved gradient, scaled row by row."""
        (gradient_NV,) = ctx.saved_tensors
        return (gradient_NV * grad_outputs[0][:, None]).to(ctx.dtype), None, None


def _with_gradient(logits_NV: Tensor, losses_N: Tensor, gradient_NV: Tensor) -> Tensor:
    attached_N: Tensor = _GivenGradient.apply(logits_NV, losses_N, gradient_NV)
    return attached_N


def _distribution(logits_NV: Tensor, probs: bool = True) -> tuple[Tensor, Tensor]:
    """Log-probabilities, clamped at `LEAST_LOGPROB`, and probabilities, in float32 or better."""
    dtype = torch.promote_types(logits_NV.dtype, torch.float32)
    logprobs_NV = logits_NV.detach().log_softmax(-1, dtype=dtype)
    probs_NV = logprobs_NV.exp() if probs else logprobs_NV
    return logprobs_NV.clamp_(min=LEAST_LOGPROB), probs_NV


def _expectation(probs_NV: Tensor, values_NV: Tensor) -> Tensor:
    return (probs_NV * values_NV).sum(-1)


def _reverse(probs_NV: Tensor, ratio_NV: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of a log-ratio under the student, and S·(ratio − mean)."""
    flow_NV = probs_NV * ratio_NV
    mean_N = flow_NV.sum(-1)
    return mean_N, flow_NV.addcmul_(probs_NV, mean_N[:, None], value=-1)


def _log_student_over_mixture(ratio: Tensor, beta: float) -> Tensor:
    """log(S/m) from log(S/T): −log(1 + β·(T/S − 1)), which is exactly 0 where S = T."""
    return torch.expm1(-ratio).mul_(beta).log1p_().neg_()


def _pointwise(divergence: str, student_NJ: Tensor, teacher_NJ: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Each token's term D [N, J] of the corrected form, and S·∂D/∂S [N, J], from log-probabilities."""
    probs_NJ, teacher_probs_NJ = student_NJ.exp(), teacher_NJ.exp()
    ratio_NJ = student_NJ - teacher_NJ
    if divergence == "reverse_kl":
        flow_NJ = probs_NJ * ratio_NJ
        return flow_NJ - probs_NJ + teacher_probs_NJ, flow_NJ
    if divergence == "forward_kl":
        flow_NJ = probs_NJ - teacher_probs_NJ
        return flow_NJ - teacher_probs_NJ * ratio_NJ, flow_NJ
    if divergence == "jsd":
        to_mixture_NJ = _log_student_over_mixture(ratio_NJ, beta)
        flow_NJ = (1 - beta) * probs_NJ * to_mixture_NJ
        return flow_NJ + beta * teacher_probs_NJ * (to_mixture_NJ - ratio_NJ), flow_NJ
    raise ValueError(f"no top-k form of {divergence!r}; valid: reverse_kl, forward_kl, jsd")


def _with_remainder(logprobs_NK: Tensor, valid_NK: Tensor, remainder: str) -> Tensor:
    if remainder == "correct":
        return logprobs_NK
    if remainder == "renormalise":
        return _renormalised(logprobs_NK, valid_NK)
    if remainder == "tail":
        return _with_tail(logprobs_NK)
    raise ValueError(f"no remainder {remainder!r}; valid: renormalise, correct, tail")


def _with_tail(logprobs_NK: Tensor) -> Tensor:
    """Append the log-probability of all other tokens, log(1 − Σ p), at least that of the rounding error.

    Computed by log1mexp, which is stable at both ends (Mächler 2012).
    """
    mass_N1 = logprobs_NK.logsumexp(1, keepdim=True).clamp(max=-torch.finfo(logprobs_NK.dtype).eps)
    small_N1, large_N1 = torch.log(-torch.expm1(mass_N1)), torch.log1p(-torch.exp(mass_N1))
    return torch.cat([logprobs_NK, torch.where(mass_N1 > -0.6931, small_N1, large_N1)], 1)


def _renormalised(logprobs_NK: Tensor, valid_NK: Tensor) -> Tensor:
    """Log-probabilities normalised over the valid ids; invalid ids get `LEAST_LOGPROB`, also in rows without any valid
    id."""
    mass_N1 = logprobs_NK.masked_fill(~valid_NK, -torch.inf).logsumexp(1, keepdim=True)
    return torch.where(valid_NK, logprobs_NK - mass_N1, LEAST_LOGPROB)


def _among(indices_NK: Tensor, others_NK: Tensor, vocabulary: int) -> Tensor:
    marked_NV = torch.zeros(len(indices_NK), vocabulary, dtype=torch.bool, device=indices_NK.device)
    return marked_NV.scatter_(1, others_NK, True).gather(1, indices_NK)
