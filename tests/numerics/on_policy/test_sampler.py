"""The sampler against the trainer's own forward and transformers' `generate`."""

import pytest
import torch

from base.errors import UserError
from stages.losses.log_probabilities import token_logprobs
from stages.model.policy import Policy
from stages.rows.chat import encode_prompt
from stages.sampling.draw import draw, truncate
from stages.sampling.sampler import sample
from stages.sampling.samples import Sample, Sampling
from tests.numerics.conftest import tiny_policy

PROMPTS = ("sort up 3 1 2:", "reverse abcdefgh ijk:", "x", "upper kotap:")


@pytest.fixture(scope="module")
def policy() -> Policy:
    return tiny_policy(1)


@pytest.fixture(scope="module")
def prompts(policy: Policy) -> list[list[int]]:
    return [encode_prompt(policy.tokenizer, prompt) for prompt in PROMPTS]


def trainer_logprobs(policy: Policy, row: Sample, temperature: float = 1.0) -> torch.Tensor:
    """Log-probabilities of the completion from one unpadded forward pass without a cache."""
    with torch.no_grad():
        logits_TV = policy.model(torch.tensor([row.tokens])).logits[0]
    scaled_NV = logits_TV[len(row.prompt_ids) - 1 : -1] / temperature
    return token_logprobs(scaled_NV, torch.tensor(row.completion_ids))


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.0, 0.6)])
def test_sampler_logprobs_equal_the_trainers(policy, prompts, temperature, top_p):
    groups = sample(policy, prompts, 8, Sampling(24, temperature, top_p), seed=3)
    lengths = {len(row.completion_ids) for group in groups for row in group}
    # Rows must really end at different times, or dropping them is not tried.
    assert len(lengths) > 3
    for group in groups:
        for row in group:
            expected_N = trainer_logprobs(policy, row, temperature)
            torch.testing.assert_close(row.logprobs_N, expected_N, rtol=1e-4, atol=1e-4)


def test_finished_rows_end_with_eos_and_others_are_cut(policy, prompts):
    groups = sample(policy, prompts, 16, Sampling(12), seed=0)
    rows = [row for group in groups for row in group]
    assert {row.finished for row in rows} == {True, False}
    for row in rows:
        assert (row.completion_ids[-1] == policy.eos_id) == row.finished
        assert policy.eos_id not in row.completion_ids[:-1]
        assert row.finished or len(row.completion_ids) == 12


def test_greedy_equals_generate_and_padding_changes_nothing(policy, prompts):
    together = sample(policy, prompts, 1, Sampling(16, temperature=0.0), seed=0)
    for prompt, (row,) in zip(prompts, together, strict=True):
        ((alone,),) = sample(policy, [prompt], 1, Sampling(16, temperature=0.0), seed=0)
        assert alone.completion_ids == row.completion_ids
        torch.testing.assert_close(alone.logprobs_N, row.logprobs_N, rtol=1e-4, atol=1e-4)
        reference = policy.model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=16)
        assert row.completion_ids == reference[0, len(prompt) :].tolist()


def test_same_seed_same_samples(policy, prompts):
    first = sample(policy, prompts, 4, Sampling(16), seed=7)
    again = sample(policy, prompts, 4, Sampling(16), seed=7)
    other = sample(policy, prompts, 4, Sampling(16), seed=8)
    ids = [[[row.completion_ids for row in group] for group in groups] for groups in (first, again, other)]
    assert ids[0] == ids[1]
    assert ids[0] != ids[2]


def test_draws_follow_the_distribution():
    probabilities_V = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits_BV = probabilities_V.log().expand(20000, 4)
    tokens_B, logprobs_B = draw(logits_BV, Sampling(1), torch.Generator().manual_seed(0))
    shares = torch.bincount(tokens_B, minlength=4) / 20000
    torch.testing.assert_close(shares, probabilities_V, atol=0.012, rtol=0)
    torch.testing.assert_close(logprobs_B, probabilities_V.log()[tokens_B])


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    logits_BV = torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log()
    assert truncate(logits_BV, 0.7).isfinite().tolist() == [[False, True, False, True]]
    assert truncate(logits_BV, 0.5).isfinite().tolist() == [[False, True, False, False]]
    assert truncate(logits_BV, 1.0).isfinite().all()


def test_top_p_draws_from_the_nucleus_alone():
    logits_BV = torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log().expand(4000, 4)
    tokens_B, logprobs_B = draw(logits_BV, Sampling(1, top_p=0.7), torch.Generator().manual_seed(0))
    shares = torch.bincount(tokens_B, minlength=4) / 4000
    torch.testing.assert_close(shares, torch.tensor([0.0, 0.625, 0.0, 0.375]), atol=0.03, rtol=0)
    torch.testing.assert_close(logprobs_B, logits_BV[0][tokens_B])


def test_too_long_for_the_context_is_an_error(policy, prompts):
    with pytest.raises(UserError, match="context of 128 tokens"):
        sample(policy, prompts, 1, Sampling(120), seed=0)


def test_samples_can_take_part_in_a_backward_pass(policy, prompts):
    ((row,),) = sample(policy, prompts[:1], 1, Sampling(8), seed=0)
    logprobs_N = torch.zeros_like(row.logprobs_N, requires_grad=True)
    ((logprobs_N - row.logprobs_N).exp() * row.logprobs_N).sum().backward()
    torch.testing.assert_close(logprobs_N.grad, (-row.logprobs_N).exp() * row.logprobs_N)
