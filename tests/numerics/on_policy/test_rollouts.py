"""Rollouts that are drawn elsewhere: one batch ahead, or with weights too old."""

import threading
from dataclasses import replace

import pytest
import torch

from experts.loading import load_domain
from stages.config.on_policy import RLConfig, SamplerConfig
from stages.config.training import LoraConfig
from stages.learner.training import Learner
from stages.losses.log_probabilities import token_logprobs
from stages.on_policy.loop import OnPolicyTask, take_step
from stages.on_policy.mismatch import largest, with_mismatch
from stages.on_policy.rollout import PromptMixture, request
from stages.on_policy.signals import RewardSignal
from stages.sampling.prefetch import PrefetchSampler
from stages.sampling.sampler import Sampler, TransformersSampler, parse_logprobs
from stages.sampling.samples import Gap
from tests.numerics.on_policy.test_objectives import make_rollout, random_logits
from tests.support.vllm_scenario import make_policy

SORT = {"sort": load_domain("sort", "strings", {"task": "sort"})}
SERVERS = SamplerConfig(backend="vllm_server", ahead=True)


class Remote(TransformersSampler):
    """Draws with a copy of the weights it was given last, as a server would; tells when, and in which thread."""

    def __init__(self, learner: Learner) -> None:
        super().__init__(learner.policy)
        self.copy = make_policy(None)
        self.calls: list[tuple] = []

    def update_weights(self, policy, version):
        self.copy.model.load_state_dict(policy.model.state_dict())
        super().update_weights(self.copy, version)
        self.calls.append(("update_weights", version))

    def sample(self, prompts, group_size, sampling, seed):
        self.calls.append(("sample", seed, threading.current_thread().name.startswith("rollout")))
        return super().sample(prompts, group_size, sampling, seed)


def no_gap(policy, samples):
    return Gap(0.0, 0, -1.0)


@pytest.fixture
def learner(tmp_path):
    config = RLConfig(prompts_per_step=4, group_size=2, max_new_tokens=8, sampler=SERVERS, max_steps=3)
    return Learner(make_policy(None), config, 3, tmp_path, seed=5)


def task_of(learner: Learner, sampler: Sampler) -> OnPolicyTask:
    examples = {"sort": SORT["sort"].draw("train", 20, 0)}

    def objective(rollout, signals, rows):
        # Moves the weights whatever the reward.
        return lambda logits_CV, part: (logits_CV.pow(2).mean(-1), {})

    class Always(RewardSignal):
        def score(self, rollout, rows):
            signals = super().score(rollout, rows)
            return replace(signals, advantages=[1.0] * len(rows))

    mixture = PromptMixture(examples, learner.config.prompts_per_step, {}, 5)
    return OnPolicyTask("rl", mixture, Always(SORT), objective, ("reward", "higher"), sampler=sampler)


def test_the_next_batch_is_drawn_with_the_weights_of_before_the_update(learner):
    remote = Remote(learner)
    task = task_of(learner, remote)

    def request_of(step):
        return request(learner, task.mixture.step(step), learner.config, step) if step <= 3 else None

    asked = []

    def measure(policy, samples):
        asked.append((policy is learner.policy, [one.version for one in samples]))
        return Gap(0.5 * len(asked), 2, 0.4 * len(asked))

    task = replace(task, sampler=PrefetchSampler(remote, request_of, settle=lambda: None, measure=measure))
    ages, gaps, before = [], [], learner.policy.head_VH.clone()
    for step in (1, 2, 3):
        rollout, _, metrics = take_step(task, learner, learner.config, step)
        ages.append({rollout.staleness(row) for row in range(len(rollout.samples))})
        assert metrics["rl/staleness"] == max(ages[-1])
        assert metrics["rl/stale"] == 0
        gaps.append((metrics["rl/mismatch"], metrics["rl/mismatch_max"], "rl/drift" in metrics))
    task.sampler.close()
    # What is drawn ahead tells of older weights; the gap is measured on the batch before, with the new ones.
    assert gaps[0][2] is False and gaps[1:] == [(0.25, 0.4, True), (0.5, 0.8, True)]
    assert asked == [(True, [0] * 4), (True, [0] * 4)]
    assert not torch.equal(before, learner.policy.head_VH)
    # The first step had nothing to draw it ahead.
    assert ages == [{0}, {1}, {1}]
    seeds = [request_of(step).seed for step in (1, 2, 3)]
    assert remote.calls == [
        ("update_weights", 0),
        ("sample", seeds[0], False),
        ("sample", seeds[1], True),
        ("update_weights", 1),
        ("sample", seeds[2], True),
        ("update_weights", 2),
    ]


def test_what_was_drawn_ahead_is_what_the_old_weights_draw(learner):
    remote = Remote(learner)
    task = task_of(learner, remote)

    def request_of(step):
        return request(learner, task.mixture.step(step), learner.config, step)

    prefetch = PrefetchSampler(remote, request_of, settle=lambda: None, measure=no_gap)
    first, second = request_of(1), request_of(2)
    prefetch.update_weights(learner.policy, 0)
    prefetch.sample(first.prompts, first.group_size, first.sampling, first.seed)
    expected = TransformersSampler(make_policy(None))
    groups = expected.sample(second.prompts, second.group_size, second.sampling, second.seed)
    with torch.no_grad():
        learner.policy.head_VH.mul_(-1.0)
    prefetch.update_weights(learner.policy, 1)
    drawn = prefetch.sample(second.prompts, second.group_size, second.sampling, second.seed)
    prefetch.close()
    assert [[one.completion_ids for one in group] for group in drawn] == [
        [one.completion_ids for one in group] for group in groups
    ]
    assert {one.version for group in drawn for one in group} == {0}


def test_a_request_out_of_turn_is_drawn_at_once_and_starts_nothing(learner):
    remote = Remote(learner)
    task = task_of(learner, remote)
    prefetch = PrefetchSampler(
        remote,
        lambda step: request(learner, task.mixture.step(step), learner.config, step),
        settle=lambda: None,
        measure=no_gap,
    )
    prefetch.update_weights(learner.policy, 0)
    prefetch.sample([[5, 6]], 1, request(learner, [], learner.config, 1).sampling, 77)
    prefetch.close()
    assert remote.calls == [("update_weights", 0), ("sample", 77, False)]


def test_a_failure_ahead_is_told_by_the_step_it_was_for(learner):
    remote = Remote(learner)
    task = task_of(learner, remote)

    def request_of(step):
        return request(learner, task.mixture.step(step), learner.config, step)

    prefetch = PrefetchSampler(remote, request_of, settle=lambda: None, measure=no_gap)
    prefetch.update_weights(learner.policy, 0)
    first, second = request_of(1), request_of(2)
    whole, remote.sample = remote.sample, None
    remote.sample = lambda prompts, *rest: whole(prompts, *rest) if rest[-1] == first.seed else 1 / 0
    prefetch.sample(first.prompts, first.group_size, first.sampling, first.seed)
    prefetch.update_weights(learner.policy, 1)
    with pytest.raises(ZeroDivisionError):
        prefetch.sample(second.prompts, second.group_size, second.sampling, second.seed)
    prefetch.close()


def test_whole_groups_are_dropped_when_one_of_theirs_is_stale():
    rollout = make_rollout(random_logits(0), step=6)
    ages = [replace(sample, version=version) for sample, version in zip(rollout.samples, (5, 4, 2), strict=True)]
    rollout = replace(rollout, samples=ages)
    assert [rollout.staleness(row) for row in range(3)] == [0, 1, 3]
    assert [s.version for s in rollout.drop_stale(1).samples] == [5, 4]
    assert [s.version for s in rollout.drop_stale(0).samples] == [5]
    # What the student did not draw has no age.
    assert len(replace(rollout, on_policy=[True, True, False]).drop_stale(1).samples) == 3
    pairs = replace(
        rollout,
        samples=[*ages, ages[0]],
        examples=rollout.examples[:1] * 4,
        completions=["x"] * 4,
        on_policy=[True] * 4,
        group_size=2,
    )
    assert [s.version for s in pairs.drop_stale(1).samples] == [5, 4]


def test_a_step_whose_samples_are_all_stale_changes_nothing_and_counts_them(learner):
    class Old(Remote):
        def update_weights(self, policy, version):
            super().update_weights(policy, version - 2)

    task = task_of(learner, Old(learner))
    before = {name: value.clone() for name, value in learner.policy.model.state_dict().items()}
    rollout, _, metrics = take_step(task, learner, learner.config, 3)
    assert rollout.samples == []
    assert metrics["rl/stale"] == 8
    assert metrics["rl/informative"] == 0
    for name, value in learner.policy.model.state_dict().items():
        assert torch.equal(value, before[name])


def test_ahead_needs_servers_and_a_batch_of_staleness():
    with pytest.raises(ValueError, match="max_staleness of 1"):
        SamplerConfig(backend="vllm_server", ahead=True, max_staleness=0)
    with pytest.raises(ValueError, match="backend is vllm"):
        SamplerConfig(backend="vllm", ahead=True)
    assert RLConfig(lora=LoraConfig(), sampler=SERVERS).sampler.ahead


def test_the_gap_to_the_sampler_is_told_apart_from_what_updates_moved(learner):
    rollout = make_rollout(random_logits(0), step=6)
    ages = [replace(sample, version=version) for sample, version in zip(rollout.samples, (5, 4, 5), strict=True)]
    rollout = replace(rollout, samples=ages, on_policy=[True, True, False])
    student_NV = random_logits(1)

    def objective(rows):
        return lambda logits_CV, part: (logits_CV.sum(1), {"other": logits_CV.sum(1)})

    _, metrics = with_mismatch(objective, rollout, 0.7, [0, 1, 2])(student_NV, slice(None))
    tokens_N = rollout.tokens([0, 1, 2], torch.device("cpu"))
    gap_N = (token_logprobs(student_NV / 0.7, tokens_N) - rollout.logprobs([0, 1, 2], torch.device("cpu"))).abs()
    assert set(metrics) == {"other", "mismatch", "drift"}
    torch.testing.assert_close(metrics["mismatch"][:3], gap_N[:3])
    torch.testing.assert_close(metrics["drift"][3:4], gap_N[3:4])
    assert metrics["mismatch"][3:].isnan().all()
    assert metrics["drift"][[0, 1, 2, 4, 5, 6, 7]].isnan().all()
    _, metrics = with_mismatch(objective, rollout, 0.7, [0])(student_NV[:3], slice(None))
    assert set(metrics) == {"other", "mismatch"}
    assert largest({0: metrics["mismatch"]}) == float(gap_N[:3].max())
    assert largest({0: torch.full((2,), torch.nan)}) == -1.0


@pytest.mark.parametrize("wrong", [float("nan"), -float("inf"), float("inf")])
def test_a_log_probability_that_is_no_number_ends_the_stage(wrong):
    with pytest.raises(FloatingPointError, match="vLLM gave "):
        parse_logprobs([-0.5, wrong, -1.0], "vLLM")
    assert parse_logprobs([-0.5, 0.0], "vLLM").tolist() == [-0.5, 0.0]
