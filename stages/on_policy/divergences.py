"""Divergences of the student from a target distribution: pure functions of logits, with gradients in closed form.

Shape suffixes: N tokens, V vocabulary, K tokens of a support. S is the student, T the target; T carries no gradient.

With g_v the derivative of a divergence by S_v, its gradient by the student's logits is S·(g − Σ_v S_v·g_v). Written
out it takes a few passes over [N, V] where autograd through two log-softmaxes takes many, and it is exactly 0 where
student and target are equal. Every function returns the losses [N] and, for the log, the `reverse_kl` and the
student's `entropy`, so that objectives can be compared.
"""

from typing import Any

import torch
from torch import Tensor

from stages.on_policy.losses import Losses

# Stands for log 0, so that 0·log 0 is 0: a padded vocabulary may carry logits of -inf.
LOG_ZERO = -1e4


def reverse_kl(logits_NV: Tensor, target_logits_NV: Tensor) -> Losses:
    """KL(S‖T) = Σ_v S·log(S/T), the student's own modes; gradient S·(log(S/T) − KL)."""
    with torch.no_grad():
        student_NV, target_NV = _log(logits_NV), _log(target_logits_NV)
        probabilities_NV = student_NV.exp()
        entropy_N = -torch.linalg.vecdot(probabilities_NV, student_NV)
        ratio_NV = student_NV.sub_(target_NV)
        losses_N = torch.linalg.vecdot(probabilities_NV, ratio_NV)
        gradient_NV = ratio_NV.sub_(losses_N[:, None]).mul_(probabilities_NV)
    return _attach(logits_NV, losses_N, gradient_NV), {"reverse_kl": losses_N, "entropy": entropy_N}


def forward_kl(logits_NV: Tensor, target_logits_NV: Tensor) -> Losses:
    """KL(T‖S) = Σ_v T·log(T/S), all of the target's modes; gradient S − T."""
    with torch.no_grad():
        student_NV, target_NV = _log(logits_NV), _log(target_logits_NV)
        probabilities_NV, metrics = _compared(student_NV, target_NV)
        target_probabilities_NV = target_NV.exp()
        losses_N = torch.linalg.vecdot(target_probabilities_NV, target_NV.sub_(student_NV))
        gradient_NV = probabilities_NV.sub_(target_probabilities_NV)
    return _attach(logits_NV, losses_N, gradient_NV), metrics


def jsd(logits_NV: Tensor, target_logits_NV: Tensor, beta: float) -> Losses:
    """Generalised JSD β·KL(T‖m) + (1 − β)·KL(S‖m) with m = β·T + (1 − β)·S (GKD, Agarwal et al. 2024).

    Divided by β it tends to KL(T‖S) as β → 0, divided by 1 − β to KL(S‖T) as β → 1. Gradient (1 − β)·S·(log(S/m) −
    Σ_v S·log(S/m)): of the derivative by S the terms that come from m cancel.
    """
    with torch.no_grad():
        student_NV, target_NV = _log(logits_NV), _log(target_logits_NV)
        probabilities_NV, metrics = _compared(student_NV, target_NV)
        target_probabilities_NV = target_NV.exp()
        mixture_NV = _log_mixture(student_NV, target_NV, beta)
        from_target_N = torch.linalg.vecdot(target_probabilities_NV, target_NV.sub_(mixture_NV))
        ratio_NV = student_NV.sub_(mixture_NV)
        from_student_N = torch.linalg.vecdot(probabilities_NV, ratio_NV)
        losses_N = beta * from_target_N + (1.0 - beta) * from_student_N
        gradient_NV = ratio_NV.sub_(from_student_N[:, None]).mul_(probabilities_NV).mul_(1.0 - beta)
    return _attach(logits_NV, losses_N, gradient_NV), metrics


def entropy_aware(logits_NV: Tensor, target_logits_NV: Tensor, threshold: float) -> Losses:
    """KL(S‖T), plus KL(T‖S) where the target's entropy passes `threshold` nats: where the teacher sees several ways on,
    the student keeps them all."""
    losses_N, metrics = reverse_kl(logits_NV, target_logits_NV)
    with torch.no_grad():
        target_NV = _log(target_logits_NV)
        unsure_N = (-torch.linalg.vecdot(target_NV.exp(), target_NV) > threshold).to(losses_N.dtype)
    covering_N, _ = forward_kl(logits_NV, target_logits_NV)
    return losses_N + unsure_N * covering_N, metrics | {"teacher_unsure": unsure_N}


def support(logits_NV: Tensor, target_logits_NV: Tensor, k: int, source: str) -> tuple[Tensor, Tensor]:
    """The tokens a top-k divergence looks at.

    Args:
        logits_NV: The student's logits.
        target_logits_NV: The target's.
        k: Tokens taken from a model; at most V.
        source: `student`, `teacher`, `union` or `intersection` of their k likeliest.

    Returns:
        Indices [N, K] and which of them count [N, K]; K is 2k for the union, else k.
    """
    k = min(k, logits_NV.shape[-1])
    if source == "student":
        students_NK = logits_NV.detach().topk(k).indices
        return students_NK, torch.ones_like(students_NK, dtype=torch.bool)
    targets_NK = target_logits_NV.detach().topk(k).indices
    if source == "teacher":
        return targets_NK, torch.ones_like(targets_NK, dtype=torch.bool)
    students_NK = logits_NV.detach().topk(k).indices
    shared_NK = (targets_NK[:, :, None] == students_NK[:, None, :]).any(-1)
    if source == "intersection":
        return targets_NK, shared_NK
    return torch.cat([students_NK, targets_NK], 1), torch.cat([torch.ones_like(shared_NK), ~shared_NK], 1)


def top_k_divergence(
    logits_NV: Tensor,
    target_logprobs_NK: Tensor,
    indices_NK: Tensor,
    valid_NK: Tensor,
    divergence: str,
    remainder: str,
    beta: float = 0.5,
) -> Losses:
    """A divergence over a support instead of the vocabulary; of the target it needs no more than the support.

    Args:
        logits_NV: The student's logits.
        target_logprobs_NK: The target's log-probabilities of the support's tokens, over the whole vocabulary.
        indices_NK: The support.
        valid_NK: Which of its tokens count.
        divergence: `reverse_kl`, `forward_kl` or `jsd`.
        remainder: What becomes of the other tokens. `renormalise`: both distributions are renormalised over the
            support (an empty one gives 0). `correct`: the sum over the support has − S + T added to reverse KL and
            − T + S to forward KL, which makes each term non-negative and 0 only at equality; in the JSD these
            cancel. `tail`: all others are one token more.
        beta: Of the JSD.

    Returns:
        Losses [N], equal to the exact divergence where the support is the vocabulary.
    """
    student_NV = logits_NV.log_softmax(-1)
    student_NK = student_NV.gather(1, indices_NK).masked_fill(~valid_NK, -torch.inf)
    target_NK = target_logprobs_NK.detach().masked_fill(~valid_NK, -torch.inf)
    if remainder == "renormalise":
        counts_NK = valid_NK | ~valid_NK.any(-1, keepdim=True)
        student_NK = student_NK.masked_fill(counts_NK & ~valid_NK, 0.0).log_softmax(-1)
        target_NK = target_NK.masked_fill(counts_NK & ~valid_NK, 0.0).log_softmax(-1)
    elif remainder == "tail":
        student_NK = torch.cat([student_NK, _log_rest(student_NK)], 1)
        target_NK = torch.cat([target_NK, _log_rest(target_NK)], 1)
    student_NK, target_NK = student_NK.clamp(min=LOG_ZERO), target_NK.clamp(min=LOG_ZERO)
    losses_N = _divergence(student_NK, target_NK, divergence, remainder == "correct", beta)
    with torch.no_grad():
        reverse_N = torch.linalg.vecdot(student_NK.exp(), student_NK - target_NK)
        student_NV = student_NV.clamp(min=LOG_ZERO)
        entropy_N = -torch.linalg.vecdot(student_NV.exp(), student_NV)
    return losses_N, {"reverse_kl": reverse_N, "entropy": entropy_N}


def diagnose(logits_NV: Tensor, target_logits_NV: Tensor, k: int) -> dict[str, Tensor]:
    """How student and target agree on each token.

    Returns:
        `top_k_overlap`: share of the target's k likeliest tokens that are among the student's; `teacher_entropy` in
        nats; `entropy_gap`: the student's entropy less the target's.
    """
    with torch.no_grad():
        _, shared_NK = support(logits_NV, target_logits_NV, k, "intersection")
        student_NV, target_NV = _log(logits_NV), _log(target_logits_NV)
        target_N = -torch.linalg.vecdot(target_NV.exp(), target_NV)
        student_N = -torch.linalg.vecdot(student_NV.exp(), student_NV)
        overlap_N = shared_NK.to(student_N.dtype).mean(-1)
    return {"top_k_overlap": overlap_N, "teacher_entropy": target_N, "entropy_gap": student_N - target_N}


def _divergence(student_NK: Tensor, target_NK: Tensor, divergence: str, corrected: bool, beta: float) -> Tensor:
    """The sum over a support of log-probabilities; autograd differentiates the few columns.

    Factors whose derivative the normalisation cancels are stopped, which keeps the gradient 0 at equality.
    """
    student_probabilities_NK, target_probabilities_NK = student_NK.exp(), target_NK.exp()
    if divergence == "reverse_kl":
        terms_NK = student_probabilities_NK * (student_NK - target_NK).detach()
        return (terms_NK + (target_probabilities_NK - student_probabilities_NK).detach() * corrected).sum(-1)
    if divergence == "forward_kl":
        # S − T added and its value taken away again where it is not asked for: its gradient makes each term's exact.
        excess_NK = student_probabilities_NK - target_probabilities_NK
        terms_NK = target_probabilities_NK * (target_NK - student_NK) + excess_NK
        return (terms_NK if corrected else terms_NK - excess_NK.detach()).sum(-1)
    mixture_NK = _log_mixture(student_NK, target_NK, beta).detach()
    from_target_NK = target_probabilities_NK * (target_NK - mixture_NK)
    from_student_NK = student_probabilities_NK * (student_NK.detach() - mixture_NK)
    return (beta * from_target_NK + (1.0 - beta) * from_student_NK).sum(-1)


def _log(logits_NV: Tensor) -> Tensor:
    """Log-probabilities, safe to multiply with a probability of 0."""
    return logits_NV.log_softmax(-1).clamp_(min=LOG_ZERO)


def _compared(student_NV: Tensor, target_NV: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The student's probabilities, its reverse KL and its entropy."""
    probabilities_NV = student_NV.exp()
    entropy_N = -torch.linalg.vecdot(probabilities_NV, student_NV)
    reverse_N = torch.linalg.vecdot(probabilities_NV, student_NV - target_NV)
    return probabilities_NV, {"reverse_kl": reverse_N, "entropy": entropy_N}


def _log_mixture(student_NV: Tensor, target_NV: Tensor, beta: float) -> Tensor:
    """log(β·T + (1 − β)·S); where the two are equal it is exactly that."""
    # log S + log(1 + beta (T/S - 1)), or the same from T: whichever keeps the ratio at most 1.
    high_NV = torch.maximum(student_NV, target_NV)
    below_NV = (target_NV < student_NV).to(student_NV.dtype)
    low_share_NV = beta * below_NV + (1.0 - beta) * (1.0 - below_NV)
    return high_NV + torch.log1p(low_share_NV * torch.expm1(torch.minimum(student_NV, target_NV) - high_NV))


def _log_rest(logprobs_NK: Tensor) -> Tensor:
    """Log-probability [N, 1] of all tokens outside a support."""
    tiny = torch.finfo(logprobs_NK.dtype).eps
    inside_N1 = logprobs_NK.logsumexp(-1, keepdim=True).clamp(max=-tiny)
    return torch.log(-torch.expm1(inside_N1))


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, losses_N: Tensor, gradient_NV: Tensor) -> Tensor:
        """Give the losses the gradient [N, V] by the logits."""
        del logits_NV
        ctx.save_for_backward(gradient_NV)
        return losses_N.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_NV,) = ctx.saved_tensors
        return gradient_NV * grad_outputs[0][:, None], None, None


def _attach(logits_NV: Tensor, losses_N: Tensor, gradient_NV: Tensor) -> Tensor:
    attached: Tensor = _Attach.apply(logits_NV, losses_N, gradient_NV)
    return attached
