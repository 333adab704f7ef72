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
from stages.learner.training import Learner
from stages.learner.update import Row
from stages.losses.advantages import group_advantages
from stages.losses.chunked import chunk_length
from stages.losses.log_probabilities import token_logprobs
from stages.model.linear import product
from stages.model.policy import HiddenStates
from stages.on_policy.noise import RewardNoise
from stages.on_policy.rollout import Rollout, score
from stages.rows.packing import micro_batches, pack
from stages.teachers.scoring import REFERENCE, Scores, TeacherPool


@dataclass(frozen=True)
class Judgement:
    """What a signal says of a rollout.

    Attributes:
        advantages: Outcome advantage of each row, the same for all its tokens; None without a reward.
        teachers: The routed teachers' scores; None without teachers.
        reference: The reference policy's scores; None where no objective asks for them.
        trainer_logprobs: Log-probabilities [N] of each row's tokens under the student as the trainer itself sees it,
            before any update of the rollout; None where no correction asks for them.
        values: Facts of each row to be averaged by domain in the log (`reward`, …).
        facts: Facts of the whole rollout for the log (`teacher_seconds/NAME`, …).
    """

    advantages: Sequence[float] | None = None
    teachers: Scores | None = None
    reference: Scores | None = None
    trainer_logprobs: Sequence[Tensor] | None = None
    values: Mapping[str, Sequence[float]] = field(default_factory=dict)
    facts: Mapping[str, float] = field(default_factory=dict)

    def token_advantages(self, rollout: Rollout, rows: Sequence[int], device: torch.device) -> Tensor | None:
        """Outcome advantage [N] of each completion token of the rows laid end to end; None without a reward."""
        if self.advantages is None:
            return None
        parts = [torch.full((len(rollout.samples[i].completion_ids),), self.advantages[i]) for i in rows]
        return torch.cat(parts).to(device)

    def matters(self, row: int) -> bool:
        """Whether the row carries any signal; one without need not be run backward."""
        told = self.teachers is not None or self.reference is not None
        return told or (self.advantages is not None and self.advantages[row] != 0)


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
        noise: Errors of the reward that the advantages are made of; none when absent.
    """

    def __init__(
        self,
        domains: Mapping[str, Domain],
        normalise_by_std: bool = True,
        weight: float = 1.0,
        noise: RewardNoise | None = None,
    ) -> None:
        self.domains = domains
        self.normalise_by_std = normalise_by_std
        self.weight = weight
        self.noise = noise

    def judge(self, rollout: Rollout, rows: Sequence[Row]) -> Judgement:
        """Score every completion."""
        del rows
        seen, values = _rewards(rollout, self.domains, self.noise)
        rewards_PG = torch.tensor(seen).view(len(seen) // rollout.group_size, rollout.group_size)
        advantages = (self.weight * group_advantages(rewards_PG, self.normalise_by_std)).flatten().tolist()
        facts = {f"{fact}/{n}": value for n, domain in self.domains.items() for fact, value in domain.facts().items()}
        return Judgement(advantages=advantages, values=values, facts=facts)


class SuccessSignal:
    """What passed is to be imitated, what did not says nothing: the reward of rejection sampling.

    Args:
        domains: Scorers by domain.
        pass_score: Least score that passes.
        noise: Errors of the score that must pass; none when absent.
    """

    def __init__(self, domains: Mapping[str, Domain], pass_score: float, noise: RewardNoise | None = None) -> None:
        self.domains = domains
        self.pass_score = pass_score
        self.noise = noise

    def judge(self, rollout: Rollout, rows: Sequence[Row]) -> Judgement:
        """Score every completion; a pass has the advantage 1, anything else none."""
        del rows
        seen, values = _rewards(rollout, self.domains, self.noise)
        passed = [float(reward >= self.pass_score) for reward in seen]
        facts = {f"{fact}/{n}": value for n, domain in self.domains.items() for fact, value in domain.facts().items()}
        return Judgement(advantages=passed, values=values, facts=facts)


def _rewards(
    rollout: Rollout, domains: Mapping[str, Domain], noise: RewardNoise | None
) -> tuple[list[float], dict[str, list[float]]]:
    """The reward of each row that training sees, and what the log is told: the true one, and the other where it
    differs."""
    rewards = score(rollout, domains)
    if noise is None:
        return rewards, {"reward": rewards}
    seen = noise.seen(rollout, rewards)
    return seen, {"reward": rewards, "reward_seen": seen}


class TeacherSignal:
    """The routed teacher's distribution on the sampled tokens, and the reference's where an objective has one.

    Args:
        pool: Who teaches what.
        reference: Whether the reference scores the rows too.
    """

    def __init__(self, pool: TeacherPool, reference: bool = False) -> None:
        self.pool = pool
        self.reference = reference

    def judge(self, rollout: Rollout, rows: Sequence[Row]) -> Judgement:
        """Score every row by its own domain's teacher."""
        scores = self.pool.score(rows, rollout.domains)
        reference = self.pool.score(rows, [REFERENCE] * len(rows)) if self.reference else None
        seconds = {f"teacher_seconds/{name}": value for name, value in scores.seconds.items()}
        return Judgement(teachers=scores, reference=reference, facts=seconds)


class ReferenceSignal:
    """The reference policy's distribution on the sampled tokens, for a KL penalty beside a reward.

    Args:
        pool: Knows the reference, and need know no teacher.
    """

    def __init__(self, pool: TeacherPool) -> None:
        self.pool = pool

    def judge(self, rollout: Rollout, rows: Sequence[Row]) -> Judgement:
        """Score every row by the reference."""
        del rollout
        return Judgement(reference=self.pool.score(rows, [REFERENCE] * len(rows)))


class TrainerSignal:
    """What the trainer gives the sampled tokens before any update: the measure of how far the sampler is off."""

    def __init__(self, learner: Learner, temperature: float) -> None:
        self.learner = learner
        self.temperature = temperature

    def judge(self, rollout: Rollout, rows: Sequence[Row]) -> Judgement:
        """Forward every row once more."""
        learner, device = self.learner, self.learner.device
        found: list[Tensor] = [torch.empty(0)] * len(rows)
        with torch.no_grad(), learner.whole():
            forward, head_VH = HiddenStates(learner.policy.model), learner.policy.head_VH
            size = chunk_length(len(head_VH))
            for batch in micro_batches([len(row.tokens) for row in rows], learner.config.micro_batch_tokens):
                tokens, starts = [rows[i].tokens for i in batch], [rows[i].start for i in batch]
                packed = pack(tokens, starts, learner.policy.pad_id, device)
                with learner.accelerator.autocast():
                    hidden_NH = packed.scored(forward(*packed.inputs))
                chunks = zip(hidden_NH.split(size), rollout.tokens(batch, device).split(size), strict=True)
                cast_VH = head_VH.to(hidden_NH.dtype)
                logprobs_N = torch.cat(
                    [
                        token_logprobs(product(hidden_CH, cast_VH).float() / self.temperature, tokens_C)
                        for hidden_CH, tokens_C in chunks
                    ]
                )
                for i, part_N in zip(batch, logprobs_N.cpu().split([rows[i].scored for i in batch]), strict=True):
                    found[i] = part_N
        return Judgement(trainer_logprobs=found)


class SumSignal:
    """Several signals together: a teacher and an outcome reward (MiMo-V2-Flash)."""

    def __init__(self, *signals: Signal) -> None:
        self.signals = signals

    def judge(self, rollout: Rollout, rows: Sequence[Row]) -> Judgement:
        """Let all judge; no two of them say the same."""
        said = [signal.judge(rollout, rows) for signal in self.signals]
        return Judgement(
            advantages=next((j.advantages for j in said if j.advantages is not None), None),
            teachers=next((j.teachers for j in said if j.teachers is not None), None),
            reference=next((j.reference for j in said if j.reference is not None), None),
            trainer_logprobs=next((j.trainer_logprobs for j in said if j.trainer_logprobs is not None), None),
            values={name: values for j in said for name, values in j.values.items()},
            facts={name: value for j in said for name, value in j.facts.items()},
        )
