"""What is said of the student's own samples: a verifiable reward, a routed teacher, or both.

A signal judges a rollout once, before its updates. RL is the loop with `RewardSignal`, distillation the loop with
`TeacherSignal`, distillation with outcome reward the loop with their sum.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from experts.domain import Domain
from stages.core.update import Row
from stages.on_policy.advantages import group_advantages
from stages.on_policy.rollout import Rollout, score
from stages.on_policy.teachers import TeacherPool, TeacherScores


@dataclass(frozen=True)
class Judgement:
    """What a signal says of a rollout.

    Attributes:
        advantages: Outcome advantage of each row, the same for all its tokens; None without a reward.
        teachers: The routed teachers' scores; None without teachers.
        values: Facts of each row to be averaged by domain in the log (`reward`, …).
    """

    advantages: Sequence[float] | None = None
    teachers: TeacherScores | None = None
    values: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def token_advantages(self, rollout: Rollout, rows: Sequence[int], device: torch.device) -> Tensor | None:
        """Outcome advantage [N] of each completion token of the rows laid end to end; None without a reward."""
        if self.advantages is None:
            return None
        parts = [torch.full((len(rollout.samples[i].completion_ids),), self.advantages[i]) for i in rows]
        return torch.cat(parts).to(device)

    def matters(self, row: int) -> bool:
        """Whether the row carries any signal; one without need not be run backward."""
        return self.teachers is not None or (self.advantages is not None and self.advantages[row] != 0)


class Signal(Protocol):
    """Judges the student's own samples."""

    def judge(self, rollout: Rollout, rows: Sequence[Row]) -> Judgement:
        """Judge a rollout; `rows` are its samples as token rows."""


class RewardSignal:
    """The domain's verifiable reward, relative to the group's.

    Args:
        domains: Scorers by domain.
        normalise_by_std: Divide by the group's standard deviation.
        weight: Factor of the advantages (alpha beside a teacher).
    """

    def __init__(self, domains: Mapping[str, Domain], normalise_by_std: bool = True, weight: float = 1.0) -> None:
        self.domains = domains
        self.normalise_by_std = normalise_by_std
        self.weight = weight

    def judge(self, rollout: Rollout, rows: Sequence[Row]) -> Judgement:
        """Score every completion."""
        del rows
        rewards = score(rollout, self.domains)
        rewards_PG = torch.tensor(rewards).view(-1, rollout.group_size)
        advantages = (self.weight * group_advantages(rewards_PG, self.normalise_by_std)).flatten().tolist()
        return Judgement(advantages=advantages, values={"reward": rewards})


class TeacherSignal:
    """The routed teacher's distribution on the student's own tokens."""

    def __init__(self, pool: TeacherPool) -> None:
        self.pool = pool

    def judge(self, rollout: Rollout, rows: Sequence[Row]) -> Judgement:
        """Score every row by its own domain's teacher."""
        return Judgement(teachers=self.pool.score(rows, rollout.domains))


class SumSignal:
    """A teacher and an outcome reward together (MiMo-V2-Flash)."""

    def __init__(self, teacher: TeacherSignal, reward: RewardSignal) -> None:
        self.teacher = teacher
        self.reward = reward

    def judge(self, rollout: Rollout, rows: Sequence[Row]) -> Judgement:
        """Let both judge."""
        taught, rewarded = self.teacher.judge(rollout, rows), self.reward.judge(rollout, rows)
        return Judgement(rewarded.advantages, taught.teachers, rewarded.values)
