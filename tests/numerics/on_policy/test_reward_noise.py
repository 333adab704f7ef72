"""A judge that errs: training sees its errors, the log the truth."""

import pydantic
import pytest
import torch

import stages.on_policy.loop
import stages.rl
from experts.domain import Example
from stages.config.distill import DistillConfig
from stages.config.on_policy import RewardNoiseConfig, RFTConfig, RLConfig
from stages.on_policy.noise import RewardNoise, reward_noise
from stages.on_policy.rollout import Rollout
from stages.on_policy.signals import RewardSignal, SuccessSignal
from stages.sampling.samples import Sample
from tests.numerics.learner.test_resume import CutOffError, Scattered, cut_after, metrics_of


class Given:
    """Stands for a domain's scorer with known scores."""

    def __init__(self, scores):
        self.scores = scores

    def score_all(self, pairs):
        return self.scores[: len(pairs)]

    def facts(self):
        return {}


def rollout_of(lengths, group_size, step=1):
    examples = [Example(f"q{row // group_size}", "a", "sort", f"q{row // group_size}") for row in range(len(lengths))]
    samples = [Sample([1], [2] * length, torch.zeros(length), True) for length in lengths]
    return Rollout(step, examples, samples, ["x"] * len(lengths), [True] * len(lengths), group_size)


def noise(flip=0.0, length_bias=0.0, seed=0):
    return RewardNoise(RewardNoiseConfig(flip=flip, length_bias=length_bias), 10, seed)


def test_certain_flips_turn_rewards_and_successes_around():
    rollout, domains = rollout_of([3] * 4, 4), {"sort": Given([1.0, 0.0, 0.25, 0.0])}
    plain = RewardSignal(domains).score(rollout, [])
    turned = RewardSignal(domains, noise=noise(flip=1.0)).score(rollout, [])
    assert turned.values == {"reward": [1.0, 0.0, 0.25, 0.0], "reward_seen": [0.0, 1.0, 0.75, 1.0]}
    assert turned.advantages == pytest.approx([-advantage for advantage in plain.advantages], abs=1e-6)
    passed = SuccessSignal(domains, 1.0, noise(flip=1.0)).score(rollout, [])
    assert (passed.advantages, passed.values) == ([0.0, 1.0, 0.0, 1.0], turned.values)
    assert "reward_seen" not in plain.values


def test_a_judge_that_likes_length():
    rollout, domains = rollout_of([10, 5, 0, 1], 2), {"sort": Given([0.0, 0.0, 1.0, 1.0])}
    said = RewardSignal(domains, noise=noise(length_bias=0.4)).score(rollout, [])
    assert said.values["reward_seen"] == pytest.approx([0.4, 0.2, 1.0, 1.04])
    assert said.advantages[0] > 0 > said.advantages[1]
    assert said.values["reward"] == [0.0, 0.0, 1.0, 1.0]


def test_the_share_of_flips_is_drawn_by_seed_step_and_sample():
    rollout = rollout_of([1] * 4000, 8)
    first = noise(flip=0.2).seen(rollout, [0.0] * 4000)
    # Within four standard errors.
    assert sum(first) / 4000 == pytest.approx(0.2, abs=0.025)
    assert noise(flip=0.2).seen(rollout, [0.0] * 4000) == first
    assert noise(flip=0.2, seed=1).seen(rollout, [0.0] * 4000) != first
    assert noise(flip=0.2).seen(rollout_of([1] * 4000, 8, step=2), [0.0] * 4000) != first
    # Another process that has only the later groups flips the same rows of them.
    later = Rollout(1, rollout.examples[800:], rollout.samples[800:], ["x"] * 3200, [True] * 3200, 8)
    assert noise(flip=0.2).seen(later, [0.0] * 3200) == first[800:]


def test_a_resumed_stage_repeats_the_errors(workspace, checkpoint, domains, monkeypatch):
    wrong = RewardNoiseConfig(flip=0.5, length_bias=0.1)
    config = RLConfig(
        max_steps=4, examples=40, save_every=2, prompts_per_step=4, group_size=4, max_new_tokens=6, reward_noise=wrong
    )
    parents, scorers = {"start": checkpoint("start", 0)}, {"sort": Scattered(domains["sort"])}
    whole = stages.rl.train(config, workspace("whole", parents, scorers))
    with monkeypatch.context() as patch, pytest.raises(CutOffError):
        patch.setattr(stages.on_policy.loop, "end_step", cut_after(stages.on_policy.loop.end_step, 3))
        stages.rl.train(config, workspace("cut", parents, scorers))
    resumed = stages.rl.train(config, workspace("cut", parents, scorers))
    logged = metrics_of(workspace("whole", parents, scorers))
    assert resumed.digest == whole.digest
    assert metrics_of(workspace("cut", parents, scorers)) == logged
    assert all(values["rl/reward"] != values["rl/reward_seen"] for values in logged.values())


@pytest.mark.parametrize("config", [RLConfig, RFTConfig, DistillConfig])
def test_no_noise_is_no_part_of_the_key(config):
    none = config(reward_noise={"flip": 0.0})
    assert "reward_noise" not in none.key_fields()
    assert reward_noise(none, 0) is None


def test_a_merge_without_a_reward_has_nothing_to_put_noise_in():
    with pytest.raises(pydantic.ValidationError, match="outcome_weight"):
        DistillConfig(reward_noise={"flip": 0.1})
    config = DistillConfig(
        reward_noise={"flip": 0.1}, objective={"type": "reverse_kl", "outcome_weight": 0.5}, group_size=4
    )
    assert config.key_fields()["reward_noise"] == {"flip": 0.1, "length_bias": 0.0}
