"""Advantages of outcome rewards: pure functions. Shape suffixes: P prompts, G completions of a prompt."""

from torch import Tensor

EPSILON = 1e-4


def group_advantages(rewards_PG: Tensor, normalise_by_std: bool) -> Tensor:
    """Reward relative to the group's mean, in units of its standard deviation (GRPO, Shao et al. 2024).

    Args:
        rewards_PG: Rewards of each prompt's completions.
        normalise_by_std: Divide by the group's standard deviation; without it (Dr. GRPO, Liu et al. 2025) a group's
            weight grows with the spread of its rewards.

    Returns:
        Advantages [P, G]; exactly 0 in a group whose rewards are all equal.
    """
    centred_PG = rewards_PG - rewards_PG.mean(1, keepdim=True)
    # The mean of equal floats may differ from them in the last bit.
    centred_PG = centred_PG.masked_fill((rewards_PG == rewards_PG[:, :1]).all(1, keepdim=True), 0.0)
    if not normalise_by_std:
        return centred_PG
    return centred_PG / (rewards_PG.std(1, keepdim=True, correction=0) + EPSILON)
