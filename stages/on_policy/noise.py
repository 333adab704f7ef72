"""Errors of a judge, added to a true reward: for studies of how a noisy reward affects training."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from stages.config.on_policy import OnPolicyConfig, RewardNoiseConfig
from stages.learner.training import step_seed
from stages.on_policy.rollout import Rollout


@dataclass(frozen=True)
class RewardNoise:
    """The noisy reward used in training: r, or 1 - r with probability `flip`, plus
    `length_bias` * completion tokens / `max_new_tokens`.

    Attributes:
        config: The amounts of both errors.
        max_new_tokens: The longest completion.
        seed: The node's seed. Together with the step, the example and the position in its group it decides which
            rewards are flipped, independent of how rows are split over processes and where the stage was resumed.
    """

    config: RewardNoiseConfig
    max_new_tokens: int
    seed: int

    def seen(self, rollout: Rollout, rewards: Sequence[float]) -> list[float]:
        """The noisy reward of each row, given the true one in [0, 1]."""
        return [self._seen(rollout, row, reward) for row, reward in enumerate(rewards)]

    def _seen(self, rollout: Rollout, row: int, reward: float) -> float:
        purpose = f"reward noise {rollout.examples[row].id} {row % rollout.group_size}"
        flipped = random.Random(step_seed(self.seed, rollout.step, purpose)).random() < self.config.flip
        length = len(rollout.samples[row].completion_ids) / self.max_new_tokens
        return (1.0 - reward if flipped else reward) + self.config.length_bias * length


def reward_noise(config: OnPolicyConfig, seed: int) -> RewardNoise | None:
    """The noise of a stage's config; None if the reward has no errors."""
    if config.reward_noise == RewardNoiseConfig():
        return None
    return RewardNoise(config.reward_noise, config.max_new_tokens, seed)


def progress_metric(noise: RewardNoise | None) -> str:
    """The metric of a stage's progress: with noise the reward used in training, since the true one would be unknown."""
    return "reward" if noise is None else "reward_seen"
