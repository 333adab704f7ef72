"""Errors of a judge, put into a true reward: for studies of what a noisy reward does to training."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from stages.config.on_policy import OnPolicyConfig, RewardNoiseConfig
from stages.learner.training import step_seed
from stages.on_policy.rollout import Rollout


@dataclass(frozen=True)
class RewardNoise:
    """What training sees of a reward: r, or 1 - r with probability `flip`, plus
    `length_bias` * completion tokens / `max_new_tokens`.

    Attributes:
        config: How much of either.
        max_new_tokens: The longest completion.
        seed: The node's. With the step, the example and the place in its group it decides who is flipped, however the
            rows are split over processes and wherever the stage was resumed.
    """

    config: RewardNoiseConfig
    max_new_tokens: int
    seed: int

    def seen(self, rollout: Rollout, rewards: Sequence[float]) -> list[float]:
        """The reward that training sees of each row, given the true one in [0, 1]."""
        return [self._seen(rollout, row, reward) for row, reward in enumerate(rewards)]

    def _seen(self, rollout: Rollout, row: int, reward: float) -> float:
        purpose = f"reward noise {rollout.examples[row].id} {row % rollout.group_size}"
        flipped = random.Random(step_seed(self.seed, rollout.step, purpose)).random() < self.config.flip
        length = len(rollout.samples[row].completion_ids) / self.max_new_tokens
        return (1.0 - reward if flipped else reward) + self.config.length_bias * length


def reward_noise(config: OnPolicyConfig, seed: int) -> RewardNoise | None:
    """The noise that a stage's config asks for; None where the judge does not err."""
    if config.reward_noise == RewardNoiseConfig():
        return None
    return RewardNoise(config.reward_noise, config.max_new_tokens, seed)


def progress_metric(noise: RewardNoise | None) -> str:
    """The metric by which a stage judges its own progress: it knows no better reward than the one it sees."""
    return "reward" if noise is None else "reward_seen"
