"""The on-policy losses and advantages against hand-worked values."""

import pytest
import torch

from stages.losses.advantages import group_advantages
from stages.losses.log_probabilities import clipped_surrogate, entropy, policy_gradient, sampled_advantages


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


def test_policy_gradient_carries_no_gradient_of_its_weight():
    policy_logprobs_N = torch.log(torch.tensor([0.2, 0.5])).requires_grad_()
    weights_N, advantages_N = 2.0 * policy_logprobs_N.exp(), 3.0 * policy_logprobs_N
    losses_N = policy_gradient(policy_logprobs_N, advantages_N, weights_N)
    torch.testing.assert_close(losses_N, -weights_N * advantages_N * policy_logprobs_N)
    (gradient_N,) = torch.autograd.grad(losses_N.sum(), policy_logprobs_N)
    torch.testing.assert_close(gradient_N, -(weights_N * advantages_N).detach())


def test_sampled_advantage_is_the_clipped_stopped_log_ratio():
    policy_logprobs_N = torch.tensor([-1.0, -1.0, -8.0]).requires_grad_()
    advantages_N = sampled_advantages(policy_logprobs_N, torch.tensor([-1.5, -9.0, -1.0]), clip=5.0)
    assert advantages_N.tolist() == [-0.5, -5.0, 5.0]
    assert not advantages_N.requires_grad


def test_entropy_is_that_of_the_categorical():
    logits_NV = torch.randn(7, 11, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(entropy(logits_NV), torch.distributions.Categorical(logits=logits_NV).entropy())


def test_group_advantages_by_hand():
    rewards_PG = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.1, 0.1, 0.1, 0.1]])
    advantages_PG = group_advantages(rewards_PG, normalise_by_std=True)
    assert advantages_PG[0].tolist() == pytest.approx([1, -1, -1, 1], abs=1e-3)
    assert advantages_PG[1].tolist() == [0, 0, 0, 0]
    assert group_advantages(rewards_PG, normalise_by_std=False)[0].tolist() == [0.5, -0.5, -0.5, 0.5]
