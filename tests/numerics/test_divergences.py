"""Divergences against hand-worked tables and float64 oracles; top-k against the exact forms."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from stages.on_policy.divergences import (
    diagnose,
    entropy_aware,
    forward_kl,
    jsd,
    reverse_kl,
    support,
    top_k_divergence,
)

Exact = Callable[[Tensor, Tensor], Tensor]
EXACT: dict[str, Exact] = {
    "reverse_kl": lambda s, t: reverse_kl(s, t)[0],
    "forward_kl": lambda s, t: forward_kl(s, t)[0],
    "jsd": lambda s, t: jsd(s, t, 0.3)[0],
    "entropy_aware": lambda s, t: entropy_aware(s, t, 1.8)[0],
}
SUPPORTS = ("student", "teacher", "union", "intersection")
REMAINDERS = ("renormalise", "correct", "tail")
DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")


def oracle(name: str, logits_NV: Tensor, target_NV: Tensor) -> Tensor:
    """The textbook sums, differentiated by autograd."""
    s_NV, t_NV = logits_NV.softmax(-1), target_NV.softmax(-1)
    reverse_N, forward_N = (s_NV * (s_NV / t_NV).log()).sum(-1), (t_NV * (t_NV / s_NV).log()).sum(-1)
    if name == "jsd":
        m_NV = 0.3 * t_NV + 0.7 * s_NV
        return (0.3 * t_NV * (t_NV / m_NV).log() + 0.7 * s_NV * (s_NV / m_NV).log()).sum(-1)
    if name == "entropy_aware":
        entropy_N = -(t_NV * t_NV.log()).sum(-1)
        assert 0 < (entropy_N > 1.8).sum() < len(entropy_N)
        return reverse_N + (entropy_N > 1.8) * forward_N
    return reverse_N if name == "reverse_kl" else forward_N


def logits(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 1.5 * torch.randn(9, 13, generator=generator, dtype=torch.float64).to(dtype)


def top_k(
    logits_NV: Tensor, target_NV: Tensor, k: int, source: str, divergence: str, remainder: str
) -> tuple[Tensor, Tensor]:
    """Losses and their gradient."""
    logits_NV = logits_NV.detach().requires_grad_()
    indices_NK, valid_NK = support(logits_NV, target_NV, k, source)
    target_NK = target_NV.log_softmax(-1).gather(1, indices_NK)
    losses_N, metrics = top_k_divergence(logits_NV, target_NK, indices_NK, valid_NK, divergence, remainder, 0.3)
    assert set(metrics) == {"reverse_kl", "entropy"}
    return losses_N.detach(), torch.autograd.grad(losses_N.sum(), logits_NV)[0]


# Student (1/2, 1/4, 1/4), target (1/4, 1/2, 1/4): only the first two tokens matter.
LOG2 = math.log(2)
BY_HAND = {
    # 1/2 log 2 - 1/4 log 2
    "reverse_kl": 0.25 * LOG2,
    "forward_kl": 0.25 * LOG2,
    # m = 0.3 T + 0.7 S = (0.425, 0.325, 0.25)
    "jsd": 0.3 * (0.25 * math.log(0.25 / 0.425) + 0.5 * math.log(0.5 / 0.325))
    + 0.7 * (0.5 * math.log(0.5 / 0.425) + 0.25 * math.log(0.25 / 0.325)),
    # The target's entropy, 1.04, stays below 1.8.
    "entropy_aware": 0.25 * LOG2,
}


@pytest.mark.parametrize("name", EXACT)
def test_by_hand(name):
    logits_NV, target_NV = torch.tensor([[2.0, 1.0, 1.0]]).log(), torch.tensor([[1.0, 2.0, 1.0]]).log()
    assert float(EXACT[name](logits_NV, target_NV)) == pytest.approx(BY_HAND[name], abs=1e-6)


def test_an_unsure_target_adds_forward_kl_by_hand():
    logits_NV, target_NV = torch.tensor([[2.0, 1.0, 1.0]]).log(), torch.tensor([[1.0, 2.0, 1.0]]).log()
    losses_N, metrics = entropy_aware(logits_NV, target_NV, 1.0)
    assert float(losses_N) == pytest.approx(0.5 * LOG2, abs=1e-6)
    assert metrics["teacher_unsure"].tolist() == [1.0]


@pytest.mark.parametrize("name", EXACT)
def test_value_and_gradient_equal_the_textbook_sum(name):
    logits_NV, target_NV = logits(0).requires_grad_(), logits(1)
    ours_N, theirs_N = EXACT[name](logits_NV, target_NV), oracle(name, logits_NV, target_NV)
    torch.testing.assert_close(ours_N, theirs_N, rtol=1e-9, atol=1e-12)
    weights_N = torch.rand(len(ours_N), dtype=torch.float64)
    ours, theirs = (torch.autograd.grad((weights_N * losses_N).sum(), logits_NV) for losses_N in (ours_N, theirs_N))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    single_N = EXACT[name](logits(0, torch.float32), logits(1, torch.float32))
    torch.testing.assert_close(single_N, ours_N.detach().float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", EXACT)
def test_an_equal_target_leaves_exactly_nothing(name):
    logits_NV = logits(0, torch.float32).requires_grad_()
    losses_N = EXACT[name](logits_NV, logits_NV.detach().clone())
    (gradient_NV,) = torch.autograd.grad(losses_N.sum(), logits_NV)
    assert losses_N.abs().max() == 0
    assert gradient_NV.abs().max() == 0


def test_the_jsd_tends_to_both_kls():
    student_NV, target_NV = logits(0), logits(1)
    torch.testing.assert_close(
        jsd(student_NV, target_NV, 1e-7)[0] / 1e-7, forward_kl(student_NV, target_NV)[0], rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(
        jsd(student_NV, target_NV, 1 - 1e-7)[0] / 1e-7, reverse_kl(student_NV, target_NV)[0], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", EXACT)
def test_a_padded_vocabulary_changes_nothing(name):
    logits_NV, target_NV = logits(0), logits(1)
    padding_NP = torch.full((len(logits_NV), 3), -torch.inf, dtype=torch.float64)
    padded_NV = torch.cat([logits_NV, padding_NP], 1).requires_grad_()
    losses_N = EXACT[name](padded_NV, torch.cat([target_NV, padding_NP], 1))
    torch.testing.assert_close(losses_N.detach(), EXACT[name](logits_NV, target_NV))
    (gradient_NV,) = torch.autograd.grad(losses_N.sum(), padded_NV)
    assert gradient_NV.isfinite().all()
    assert gradient_NV[:, -3:].abs().max() == 0


def test_the_log_tells_reverse_kl_and_entropy_of_every_objective():
    student_NV, target_NV = logits(0), logits(1)
    entropy_N = torch.distributions.Categorical(logits=student_NV).entropy()
    for losses in (
        reverse_kl(student_NV, target_NV),
        forward_kl(student_NV, target_NV),
        jsd(student_NV, target_NV, 0.3),
        entropy_aware(student_NV, target_NV, 1.0),
    ):
        torch.testing.assert_close(losses[1]["entropy"], entropy_N)
        torch.testing.assert_close(losses[1]["reverse_kl"], oracle("reverse_kl", student_NV, target_NV))


@pytest.mark.parametrize("source", SUPPORTS)
@pytest.mark.parametrize("remainder", REMAINDERS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
class TestTopK:
    def test_all_tokens_are_the_exact_form(self, divergence, remainder, source):
        logits_NV, target_NV = logits(0).requires_grad_(), logits(1)
        losses_N, gradient_NV = top_k(logits_NV, target_NV, 99, source, divergence, remainder)
        exact_N = EXACT[divergence](logits_NV, target_NV)
        torch.testing.assert_close(losses_N, exact_N.detach(), rtol=1e-6, atol=1e-9)
        exact_NV = torch.autograd.grad(exact_N.sum(), logits_NV)[0]
        torch.testing.assert_close(gradient_NV, exact_NV, rtol=1e-6, atol=1e-9)

    @pytest.mark.parametrize("k", [1, 4])
    def test_an_equal_target_leaves_nothing(self, k, divergence, remainder, source):
        logits_NV = logits(0, torch.float32)
        losses_N, gradient_NV = top_k(logits_NV, logits_NV.clone(), k, source, divergence, remainder)
        assert losses_N.abs().max() < 1e-6
        assert gradient_NV.abs().max() < 1e-6

    def test_value_and_gradient_equal_the_sum_over_the_support(self, divergence, remainder, source):
        logits_NV, target_NV = logits(0).requires_grad_(), logits(1)
        losses_N, gradient_NV = top_k(logits_NV, target_NV, 4, source, divergence, remainder)
        expected = []
        for row_V, target_V in zip(logits_NV, target_NV, strict=True):
            mine, theirs = (set(values_V.topk(4).indices.tolist()) for values_V in (row_V, target_V))
            chosen = {"student": mine, "teacher": theirs, "union": mine | theirs, "intersection": mine & theirs}
            index = torch.tensor(sorted(chosen[source]), dtype=torch.long)
            s_K, t_K = row_V.softmax(-1)[index], target_V.softmax(-1)[index]
            if remainder == "renormalise":
                s_K, t_K = s_K / s_K.sum(), t_K / t_K.sum()
            if remainder == "tail":
                s_K, t_K = (torch.cat([p_K, 1 - p_K.sum(0, keepdim=True)]) for p_K in (s_K, t_K))
            if divergence == "jsd":
                m_K = 0.3 * t_K + 0.7 * s_K
                terms_K = 0.3 * t_K * (t_K / m_K).log() + 0.7 * s_K * (s_K / m_K).log()
            elif divergence == "reverse_kl":
                terms_K = s_K * (s_K / t_K).log() + (t_K - s_K if remainder == "correct" else 0)
            else:
                terms_K = t_K * (t_K / s_K).log() + (s_K - t_K if remainder == "correct" else 0)
            expected.append(terms_K.sum() if len(index) else row_V.sum() * 0)
        expected_N = torch.stack(expected)
        torch.testing.assert_close(losses_N, expected_N.detach(), rtol=1e-8, atol=1e-10)
        expected_NV = torch.autograd.grad(expected_N.sum(), logits_NV)[0]
        torch.testing.assert_close(gradient_NV, expected_NV, rtol=1e-8, atol=1e-10)
        assert losses_N.min() >= -1e-12


def test_supports_by_hand():
    student_NV, target_NV = torch.tensor([[4.0, 3.0, 2.0, 1.0]]), torch.tensor([[1.0, 4.0, 2.0, 3.0]])
    chosen = {}
    for source in SUPPORTS:
        indices_NK, valid_NK = support(student_NV, target_NV, 2, source)
        chosen[source] = sorted(itertools.compress(indices_NK[0].tolist(), valid_NK[0].tolist()))
    assert chosen == {"student": [0, 1], "teacher": [1, 3], "union": [0, 1, 3], "intersection": [1]}
    assert diagnose(student_NV, target_NV, 2)["top_k_overlap"].tolist() == [0.5]


def test_no_shared_token_is_nothing_to_learn_from():
    student_NV, target_NV = torch.tensor([[9.0, 8.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, 9.0, 8.0]])
    for divergence in DIVERGENCES:
        losses_N, gradient_NV = top_k(student_NV, target_NV, 2, "intersection", divergence, "renormalise")
        assert losses_N.tolist() == [0.0]
        assert gradient_NV.abs().max() == 0


def test_agreement_by_hand():
    found = diagnose(torch.zeros(1, 4), torch.tensor([[0.0, 0.0, -torch.inf, -torch.inf]]), 4)
    assert found["teacher_entropy"].item() == pytest.approx(math.log(2))
    assert found["entropy_gap"].item() == pytest.approx(math.log(4) - math.log(2))
