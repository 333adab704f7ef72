"""The on-policy losses against hand-worked values and full-distribution oracles."""

import math

import pytest
import torch
from torch.nn import functional

from stages.on_policy.advantages import group_advantages
from stages.on_policy.losses import (
    clipped_surrogate,
    entropy,
    importance_weighted_policy_gradient,
    reverse_kl,
    sampled_advantages,
    token_logprobs,
)


def test_clipped_surrogate_by_hand():
    # Ratios 1, 1.5, 0.5, 1.5; the clip is [0.8, 1.28].
    policy_logprobs_N = torch.log(torch.tensor([0.2, 0.3, 0.1, 0.3])).requires_grad_()
    sampler_logprobs_N = torch.log(torch.tensor([0.2, 0.2, 0.2, 0.2]))
    advantages_N = torch.tensor([2.0, 1.0, -1.0, -1.0])
    losses_N, metrics = clipped_surrogate(policy_logprobs_N, sampler_logprobs_N, advantages_N, 0.2, 0.28)
    # min(1.5, 1.28) = 1.28; min(-0.5, -0.8) = -0.8; min(-1.5, -1.28) = -1.5.
    torch.testing.assert_close(losses_N, torch.tensor([-2.0, -1.28, 0.8, 1.5]))
    assert metrics["clipped"].tolist() == [0, 1, 1, 0]
    (gradient_N,) = torch.autograd.grad(losses_N.sum(), policy_logprobs_N)
    # Clipped tokens have no gradient; the others −r·A.
    torch.testing.assert_close(gradient_N, torch.tensor([-2.0, 0.0, 0.0, 1.5]))


def test_importance_weight_is_dropped_outside_the_band():
    policy_logprobs_N = torch.log(torch.tensor([0.2, 0.5, 0.05])).requires_grad_()
    sampler_logprobs_N = torch.log(torch.tensor([0.25, 0.2, 0.2]))
    advantages_N = torch.tensor([1.0, 3.0, 3.0])
    losses_N, metrics = importance_weighted_policy_gradient(
        policy_logprobs_N, sampler_logprobs_N, advantages_N, (0.5, 2.0)
    )
    # Ratios 0.8, 2.5, 0.25: only the first lies in the band.
    torch.testing.assert_close(losses_N, torch.tensor([-0.8 * math.log(0.2), 0.0, 0.0]))
    assert metrics["dropped"].tolist() == [0, 1, 1]
    (gradient_N,) = torch.autograd.grad(losses_N.sum(), policy_logprobs_N)
    torch.testing.assert_close(gradient_N, torch.tensor([-0.8, 0.0, 0.0]))


def test_sampled_advantage_is_the_clipped_stopped_log_ratio():
    policy_logprobs_N = torch.tensor([-1.0, -1.0, -8.0]).requires_grad_()
    advantages_N = sampled_advantages(policy_logprobs_N, torch.tensor([-1.5, -9.0, -1.0]), clip=5.0)
    assert advantages_N.tolist() == [-0.5, -5.0, 5.0]
    assert not advantages_N.requires_grad


def test_reverse_kl_equals_the_full_divergence():
    torch.manual_seed(0)
    logits_NV, teacher_NV = torch.randn(7, 11), torch.randn(7, 11)
    losses_N, metrics = reverse_kl(logits_NV, teacher_NV)
    oracle_N = functional.kl_div(
        teacher_NV.log_softmax(-1), logits_NV.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    torch.testing.assert_close(losses_N, oracle_N)
    torch.testing.assert_close(metrics["entropy"], torch.distributions.Categorical(logits=logits_NV).entropy())
    torch.testing.assert_close(entropy(logits_NV), metrics["entropy"])


def test_reverse_kl_has_the_full_divergences_gradient():
    torch.manual_seed(0)
    logits_NV, teacher_NV = torch.randn(7, 11, requires_grad=True), torch.randn(7, 11)
    ours = torch.autograd.grad(reverse_kl(logits_NV, teacher_NV)[0].sum(), logits_NV)
    policy_NV = logits_NV.log_softmax(-1)
    oracle = (policy_NV.exp() * (policy_NV - teacher_NV.log_softmax(-1))).sum()
    torch.testing.assert_close(ours, torch.autograd.grad(oracle, logits_NV))


def test_equal_teacher_gives_no_loss_and_no_gradient():
    torch.manual_seed(0)
    logits_NV = torch.randn(5, 9, requires_grad=True)
    losses_N, _ = reverse_kl(logits_NV, logits_NV.detach())
    assert losses_N.tolist() == [0.0] * 5
    (gradient_NV,) = torch.autograd.grad(losses_N.sum(), logits_NV)
    assert gradient_NV.abs().max() == 0
    tokens_N = torch.tensor([0, 1, 2, 3, 4])
    logprobs_N = token_logprobs(logits_NV, tokens_N)
    advantages_N = sampled_advantages(logprobs_N, logprobs_N.detach(), 5.0)
    losses_N, _ = importance_weighted_policy_gradient(logprobs_N, logprobs_N.detach(), advantages_N, (0.5, 2.0))
    (gradient_NV,) = torch.autograd.grad(losses_N.sum(), logits_NV)
    assert losses_N.abs().max() == 0
    assert gradient_NV.abs().max() == 0


def test_sampled_estimator_has_the_exact_gradient_in_expectation():
    torch.manual_seed(1)
    logits_V, teacher_V = torch.randn(6, requires_grad=True), torch.randn(6)
    exact, _ = reverse_kl(logits_V[None], teacher_V[None])
    (exact_gradient_V,) = torch.autograd.grad(exact.sum(), logits_V)
    # Every token of the vocabulary once, weighted by its probability: the expectation over samples.
    tokens_V = torch.arange(6)
    logprobs_V = token_logprobs(logits_V.expand(6, 6), tokens_V)
    advantages_V = sampled_advantages(logprobs_V, teacher_V.log_softmax(-1), clip=100.0)
    losses_V, _ = importance_weighted_policy_gradient(logprobs_V, logprobs_V.detach(), advantages_V, (0.5, 2.0))
    expectation = (logprobs_V.detach().exp() * losses_V).sum()
    (sampled_gradient_V,) = torch.autograd.grad(expectation, logits_V)
    torch.testing.assert_close(sampled_gradient_V, exact_gradient_V)


def test_group_advantages_by_hand():
    rewards_PG = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.1, 0.1, 0.1, 0.1]])
    advantages_PG = group_advantages(rewards_PG, normalise_by_std=True)
    assert advantages_PG[0].tolist() == pytest.approx([1, -1, -1, 1], abs=1e-3)
    assert advantages_PG[1].tolist() == [0, 0, 0, 0]
    assert group_advantages(rewards_PG, normalise_by_std=False)[0].tolist() == [0.5, -0.5, -0.5, 0.5]
