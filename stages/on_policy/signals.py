"""Training signals on the student's own samples: a verifiable reward, a routed teacher, or both.

A signal scores a rollout once, before its updates. RL is the loop with `RewardSignal`, distillation the loop with
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
from stages.model.policy import HiddenStates
from stages.model.precision import head_factor, head_logits
from stages.on_policy.rollout import Rollout, verifiable_rewards
from stages.rows.packing import micro_batches, pack
from stages.teachers.scoring import REFERENCE, Scores, TeacherPool


@dataclass(frozen=True)
class Signals:
    """The scores of a rollout.

    Attributes:
        advantages: Outcome advantage of each row, the same for all its tokens; None without a reward.
        teachers: The routed teachers' scores; None without teachers.
        reference: The reference policy's scores; None if no objective needs them.
        trainer_logprobs: Log-probabilities [N] of each row's tokens under the student as the trainer computes them,
            before any update of the rollout; None if no correction needs them.
        values: Values of each row, averaged by domain in the log (`reward`, …).
        facts: Values of the whole rollout for the log (`teacher_seconds/NAME`, …).
    """

    advantages: Sequence[float] | None = None
    teachers: Scores | None = None
    reference: Scores | None = None
    trainer_logprobs: Sequence[Tensor] | None = None
    values: Mapping[str, Sequence[float]] = field(default_factory=dict)
    facts: Mapping[str, float] = field(default_factory=dict)

    def token_advantages(self, rollout: Rollout, rows: Sequence[int], device: torch.device) -> Tensor | None:
        """Outcome advantage [N] of each of the rows' concatenated completion tokens; None without a reward."""
        if self.advantages is None:
            return None
        parts = [torch.full((len(rollout.samples[i].completion_ids),), self.advantages[i]) for i in rows]
        return torch.cat(parts).to(device)

    def has_signal(self, row: int) -> bool:
        """Whether the row carries any signal; a row without one needs no backward pass."""
        has_scores = self.teachers is not None or self.reference is not None
        return has_scores or (self.advantages is not None and self.advantages[row] != 0)


class Signal(Protocol):
    """Scores the student's own samples."""

    def score(self, rollout: Rollout, rows: Sequence[Row]) -> Signals:
        """Score a rollout; `rows` are its samples as token rows."""


class RewardSignal:
    """The domain's verifiable reward, relative to the group's.

    Args:
        domains: Scorers by domain.
        normalise_by_std: Divide by the group's standard deviation.
        weight: Factor of the advantages (alpha when combined with a teacher).
    """

    def __init__(
        self,
        domains: Mapping[str, Domain],
        normalise_by_std: bool = True,
        weight: float = 1.0,
    ) -> None:
        self.domains = domains
        self.normalise_by_std = normalise_by_std
        self.weight = weight

    def score(self, rollout: Rollout, rows: Sequence[Row]) -> Signals:
        """Score every completion."""
        del rows
        rewards = verifiable_rewards(rollout, self.domains)
        rewards_PG = torch.tensor(rewards).view(len(rewards) // rollout.group_size, rollout.group_size)
        advantages = (self.weight * group_advantages(rewards_PG, self.normalise_by_std)).flatten().tolist()
        facts = {f"{fact}/{n}": value for n, domain in self.domains.items() for fact, value in domain.facts().items()}
        return Signals(advantages=advantages, values={"reward": rewards}, facts=facts)


class SuccessSignal:
    """The signal of rejection sampling: completions that pass are imitated, others carry no signal.

    Args:
        domains: Scorers by domain.
        pass_score: Least score that passes.
    """

    def __init__(self, domains: Mapping[str, Domain], pass_score: float) -> None:
        self.domains = domains
        self.pass_score = pass_score

    def score(self, rollout: Rollout, rows: Sequence[Row]) -> Signals:
        """Score every completion; one that passes has the advantage 1, any other 0."""
        del rows
        rewards = verifiable_rewards(rollout, self.domains)
        passed = [float(reward >= self.pass_score) for reward in rewards]
        facts = {f"{fact}/{n}": value for n, domain in self.domains.items() for fact, value in domain.facts().items()}
        return Signals(advantages=passed, values={"reward": rewards}, facts=facts)


class TeacherSignal:
    """The routed teacher's distribution on the sampled tokens, and the reference's if an objective has one.

    Args:
        pool: Routes domains to teachers.
        reference: Whether the reference scores the rows too.
    """

    def __init__(self, pool: TeacherPool, reference: bool = False) -> None:
        self.pool = pool
        self.reference = reference

    def score(self, rollout: Rollout, rows: Sequence[Row]) -> Signals:
        """Score every row by its own domain's teacher."""
        scores = self.pool.score(rows, rollout.domains)
        reference = self.pool.score(rows, [REFERENCE] * len(rows)) if self.reference else None
        seconds = {f"teacher_seconds/{name}": value for name, value in scores.seconds.items()}
        return Signals(teachers=scores, reference=reference, facts=seconds)


class ReferenceSignal:
    """The reference policy's distribution on the sampled tokens, for a KL penalty beside a reward.

    Args:
        pool: Has a route for the reference; routes for teachers are not needed.
    """

    def __init__(self, pool: TeacherPool) -> None:
        self.pool = pool

    def score(self, rollout: Rollout, rows: Sequence[Row]) -> Signals:
        """Score every row by the reference."""
        del rollout
        return Signals(reference=self.pool.score(rows, [REFERENCE] * len(rows)))


class TrainerSignal:
    """The trainer's log-probabilities of the sampled tokens before any update, to measure the sampler's mismatch."""

    def __init__(self, learner: Learner, temperature: float) -> None:
        self.learner = learner
        self.temperature = temperature

    def score(self, rollout: Rollout, rows: Sequence[Row]) -> Signals:
        """Run one more forward pass of every row."""
        learner, device = self.learner, self.learner.device
        found: list[Tensor] = [torch.empty(0)] * len(rows)
        batches = micro_batches([len(row.tokens) for row in rows], learner.config.micro_batch_tokens)
        with torch.no_grad(), learner.layers_gathered_in_turn():
            forward = HiddenStates(learner.policy.model, learner.config.dtype)
            factor_VH = None
            size = chunk_length(len(learner.policy.head_VH), device)
            for number in range(learner.num_micro_batches(len(batches))):
                if number >= len(batches):
                    # Another process has more, and layers are gathered in all processes.
                    forward(torch.full((1, 2), learner.policy.pad_id, device=device))
                    continue
                batch = batches[number]
                tokens, starts = [rows[i].tokens for i in batch], [rows[i].start for i in batch]
                packed = pack(tokens, starts, learner.policy.pad_id, device)
                hidden_NH = packed.scored(forward(*packed.inputs))
                if factor_VH is None:
                    factor_VH = head_factor(learner.policy.head_VH, hidden_NH.dtype)
                chunks = zip(hidden_NH.split(size), rollout.tokens(batch, device).split(size), strict=True)
                logprobs_N = torch.cat(
                    [
                        token_logprobs(head_logits(hidden_CH, factor_VH) / self.temperature, tokens_C)
                        for hidden_CH, tokens_C in chunks
                    ]
                )
                for i, part_N in zip(batch, logprobs_N.cpu().split([rows[i].scored for i in batch]), strict=True):
                    found[i] = part_N
        return Signals(trainer_logprobs=found)


class SumSignal:
    """Several signals together: a teacher and an outcome reward (MiMo-V2-Flash)."""

    def __init__(self, *signals: Signal) -> None:
        self.signals = signals

    def score(self, rollout: Rollout, rows: Sequence[Row]) -> Signals:
        """Score the rollout by all signals; each field is set by at most one of them."""
        parts = [signal.score(rollout, rows) for signal in self.signals]
        return Signals(
            advantages=next((part.advantages for part in parts if part.advantages is not None), None),
            teachers=next((part.teachers for part in parts if part.teachers is not None), None),
            reference=next((part.reference for part in parts if part.reference is not None), None),
            trainer_logprobs=next((part.trainer_logprobs for part in parts if part.trainer_logprobs is not None), None),
            values={name: values for part in parts for name, values in part.values.items()},
            facts={name: value for part in parts for name, value in part.facts.items()},
        )
