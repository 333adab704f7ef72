"""The loss that the student minimises on a scored rollout: the config's objective as a function of each token's logits.

Shape suffixes: N concatenated completion tokens of a micro-batch's rows, C those of one chunk, V vocabulary.

Every objective is the same sum of three parts: the divergence from the target (exact over the vocabulary or over its
likeliest tokens) or the target's log-ratio on the sampled token as an advantage; the outcome reward's advantage
(alpha); the reverse KL against the reference (reference_kl). The target is the routed teacher, or lies beyond it
(extrapolation). The formulas are pure functions in `stages.losses.divergences` and `stages.losses.log_probabilities`;
this module only passes the tensors to them.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.config.distill import DistillConfig
from stages.config.objective import (
    JSD,
    EntropyAware,
    ForwardKL,
    Imitation,
    Objective,
    ObjectiveConfig,
    PythonObjective,
    Restrictable,
    ReverseKL,
    SampledReverseKL,
    TargetObjective,
)
from stages.config.on_policy import HISTOGRAM
from stages.learner.training import Learner
from stages.losses.chunked import TokenLoss
from stages.losses.divergences import diagnose, entropy_aware, forward_kl, jsd, reverse_kl, support, top_k_divergence
from stages.losses.log_probabilities import (
    Losses,
    entropy,
    extrapolate,
    importance_weights,
    policy_gradient,
    sampled_advantages,
    token_logprobs,
)
from stages.on_policy.own_objective import OwnObjective, load_objective
from stages.on_policy.rollout import Rollout
from stages.on_policy.signals import Signals

# The overlap of the student's and the teacher's likeliest tokens is measured in the first step, then every so many.
DIAGNOSE_EVERY = 25
DIAGNOSE_TOP = 8
ADVANTAGE_EDGES = (-5.0, -1.0, -0.1, 0.1, 1.0, 5.0)


def distillation_objective(config: DistillConfig, learner: Learner) -> Callable[..., TokenLoss]:
    """The config's objective, as the `Objective` of `stages.on_policy.loop`."""

    own = load_objective(config.objective) if isinstance(config.objective, PythonObjective) else None

    def objective(rollout: Rollout, signals: Signals, rows: Sequence[int]) -> TokenLoss:
        """The loss of some rows' completion tokens."""
        return _RowsLoss.of(config, rollout, signals, rows, learner.device, own)

    return objective


def needs_reference(objective: Objective) -> bool:
    """Whether the reference policy has to score the rollouts."""
    return objective.extrapolates or objective.reference_kl > 0


def needs_trainer_logprobs(config: DistillConfig) -> bool:
    """Whether a correction compares the sampler with the trainer before any update; a plain ratio needs only the
    update's own forward pass."""
    objective = config.objective
    if not isinstance(objective, TargetObjective):
        return False
    corrects = isinstance(objective, SampledReverseKL) or objective.rewarded
    before_any_update = objective.importance == "mask" and config.updates_per_batch > 1
    return corrects and (before_any_update or objective.importance_level == "sequence")


@dataclass(frozen=True)
class _RowsLoss:
    """The tensors of one micro-batch; called with a chunk of logits it is a `TokenLoss`.

    Attributes:
        tokens_N: The sampled tokens.
        sampler_N: Their log-probabilities under the policy that drew them; NaN for tokens that no policy drew.
        trainer_N: The same under the trainer before any update; None if it equals the student's own.
        mismatch_N: log(trainer / sampler), of the token or its sequence's mean; None as above.
        outcome_N: The outcome reward's advantage.
        teacher, reference: Logits [C, V] of a slice of the tokens.
        likeliest: A server's likeliest tokens of a slice, for a top-k divergence; None if the logits are used.
        reported_N: The teacher's log-probabilities of the sampled tokens; None if the logits are used.
        per_teacher: Each teacher's own logits by name, if a row has several teachers; for diagnostics.
        exact: Whether the teacher's whole distribution is available.
        diagnoses: Whether to measure the agreement of student and teachers.
        own: The function of a user's file, for the type `python`.
    """

    config: DistillConfig
    tokens_N: Tensor
    sampler_N: Tensor
    trainer_N: Tensor | None
    mismatch_N: Tensor | None
    outcome_N: Tensor | None
    teacher: Callable[[slice], Tensor]
    reference: Callable[[slice], Tensor] | None
    likeliest: Callable[[slice], tuple[Tensor, Tensor, Tensor]] | None
    reported_N: Tensor | None
    per_teacher: Mapping[str, Callable[[slice], tuple[Tensor, Tensor]]]
    exact: bool
    diagnoses: bool
    own: OwnObjective | None

    @classmethod
    def of(
        cls,
        config: DistillConfig,
        rollout: Rollout,
        signals: Signals,
        rows: Sequence[int],
        device: torch.device,
        own: OwnObjective | None,
    ) -> "_RowsLoss":
        """Concatenate the rows' tensors."""
        assert signals.teachers is not None
        diagnoses = rollout.step % DIAGNOSE_EVERY == 1
        sampler_N = rollout.logprobs(rows, device)
        trainer_N = mismatch_N = None
        if signals.trainer_logprobs is not None:
            parts = [signals.trainer_logprobs[i] for i in rows]
            trainer_N = torch.cat(parts).to(device)
            mismatch_N = trainer_N - torch.where(sampler_N.isnan(), trainer_N, sampler_N)
            if isinstance(config.objective, TargetObjective) and config.objective.importance_level == "sequence":
                by_row = mismatch_N.split([len(part_N) for part_N in parts])
                mismatch_N = torch.cat([part_N.mean().expand_as(part_N) for part_N in by_row])
        tokens_N, top_k, likeliest = rollout.tokens(rows, device), config.objective.likeliest, None
        if top_k is not None:
            likeliest = signals.teachers.likeliest(rows, top_k.k)
        return cls(
            config=config,
            tokens_N=tokens_N,
            sampler_N=sampler_N,
            trainer_N=trainer_N,
            mismatch_N=mismatch_N,
            outcome_N=signals.token_advantages(rollout, rows, device),
            teacher=signals.teachers.logits(rows),
            reference=signals.reference.logits(rows) if signals.reference else None,
            likeliest=likeliest,
            reported_N=None if likeliest is None else signals.teachers.logprobs(rows, tokens_N, 1.0),
            per_teacher=signals.teachers.per_teacher_logits(rows) if diagnoses else {},
            exact=signals.teachers.exact,
            diagnoses=diagnoses,
            own=own,
        )

    def __call__(self, logits_CV: Tensor, part: slice) -> Losses:
        """Losses [C] and metrics [C] of a slice of the tokens, given the student's logits."""
        objective, temperature = self.config.objective, self.config.temperature
        logits_CV = _tempered(logits_CV, temperature)
        if self.likeliest is not None:
            return self._over_likeliest(logits_CV, self.likeliest(part), part)
        teacher_CV = _tempered(self.teacher(part), temperature)
        reference_CV = _tempered(self.reference(part), temperature) if self.reference else None
        loss = self._sampled if isinstance(objective, SampledReverseKL) else self._divergence
        losses_C, metrics = loss(logits_CV, teacher_CV, reference_CV, part)
        if self.diagnoses:
            with torch.no_grad():
                if self.exact:
                    metrics = metrics | diagnose(logits_CV, teacher_CV, DIAGNOSE_TOP)
                metrics |= self._advantage_bins(logits_CV, token_logprobs(teacher_CV, self.tokens_N[part]), part)
                metrics |= self._kl_per_teacher(logits_CV, part)
        return losses_C, metrics

    def _divergence(self, logits_CV: Tensor, teacher_CV: Tensor, reference_CV: Tensor | None, part: slice) -> Losses:
        """A divergence over the vocabulary, plus the reference's and the outcome reward's policy gradient."""
        objective = self.config.objective
        target_CV = _target(teacher_CV, reference_CV, objective)
        metrics: dict[str, Tensor] = {}
        if isinstance(objective, Imitation):
            losses_C = -token_logprobs(logits_CV, self.tokens_N[part])
        elif self.own is not None:
            losses_C = self.own(logits_CV, target_CV, self.tokens_N[part])
        else:
            losses_C, metrics = divergence(objective, logits_CV, target_CV)
        if "reverse_kl" not in metrics:
            # A divergence over a support alone cannot be compared with that of other objectives.
            metrics = metrics | self._reverse_kl(logits_CV.detach(), target_CV, part)
        return self._with_other_parts(losses_C, metrics, logits_CV, reference_CV, part)

    def _over_likeliest(self, logits_CV: Tensor, found: tuple[Tensor, Tensor, Tensor], part: slice) -> Losses:
        """A top-k divergence over the tokens that a server reported; no distribution [C, V] of the teacher is made."""
        objective, (ids_CK, target_CK, valid_CK) = self.config.objective, found
        assert isinstance(objective, Restrictable) and objective.top_k is not None and self.reported_N is not None
        losses_C, metrics = top_k_divergence(
            logits_CV, target_CK, ids_CK, valid_CK, objective.type, objective.top_k.remainder, _beta(objective)
        )
        teacher_C = self.reported_N[part]
        metrics = metrics | self._estimated_kl(logits_CV.detach(), teacher_C, part)
        reference_CV = self.reference(part) if self.reference else None
        losses_C, metrics = self._with_other_parts(losses_C, metrics, logits_CV, reference_CV, part)
        if self.diagnoses:
            with torch.no_grad():
                metrics = metrics | self._advantage_bins(logits_CV, teacher_C, part)
        return losses_C, metrics

    def _with_other_parts(
        self,
        losses_C: Tensor,
        metrics: Mapping[str, Tensor],
        logits_CV: Tensor,
        reference_CV: Tensor | None,
        part: slice,
    ) -> Losses:
        """Add the reference's divergence and the outcome reward's policy gradient to a divergence from the teacher."""
        objective, metrics = self.config.objective, dict(metrics)
        if objective.reference_kl > 0:
            assert reference_CV is not None
            reference_kl_C, more = reverse_kl(logits_CV, reference_CV)
            losses_C = losses_C + objective.reference_kl * reference_kl_C
            metrics = metrics | {"reference_kl": more["reverse_kl"]}
        if self.outcome_N is not None:
            logprobs_C = token_logprobs(logits_CV, self.tokens_N[part])
            weights_C, more = self._importance(logprobs_C, part)
            losses_C = losses_C + policy_gradient(logprobs_C, self.outcome_N[part], weights_C)
            metrics = metrics | more
        return losses_C, metrics

    def _sampled(self, logits_CV: Tensor, teacher_CV: Tensor, reference_CV: Tensor | None, part: slice) -> Losses:
        """The sampled token's log-ratio as an advantage, plus the outcome's, less the reference's."""
        objective, tokens_C = self.config.objective, self.tokens_N[part]
        assert isinstance(objective, SampledReverseKL)
        logprobs_C, teacher_C = token_logprobs(logits_CV, tokens_C), token_logprobs(teacher_CV, tokens_C)
        reference_C = None if reference_CV is None else token_logprobs(reference_CV, tokens_C)
        target_C = _target(teacher_C, reference_C, objective)
        advantages_C = sampled_advantages(logprobs_C, target_C, objective.advantage_clip)
        metrics = self._reverse_kl(logits_CV.detach(), _target(teacher_CV, reference_CV, objective), part)
        if self.outcome_N is not None:
            advantages_C = advantages_C + self.outcome_N[part]
        if reference_C is not None and objective.reference_kl > 0:
            reference_kl_C = logprobs_C.detach() - reference_C
            advantages_C = advantages_C - objective.reference_kl * reference_kl_C
            metrics["reference_kl"] = reference_kl_C
        weights_C, more = self._importance(logprobs_C, part)
        return policy_gradient(logprobs_C, advantages_C, weights_C), metrics | more

    def _reverse_kl(self, logits_CV: Tensor, target_CV: Tensor, part: slice) -> dict[str, Tensor]:
        """The reverse KL and the student's entropy for the log.

        The exact reverse KL is valid on tokens of any origin. If only part of the teacher's distribution is available,
        it is estimated on the tokens that the student drew, and NaN on others.
        """
        if self.exact:
            return reverse_kl(logits_CV, target_CV)[1]
        return self._estimated_kl(logits_CV, token_logprobs(target_CV, self.tokens_N[part]), part)

    def _estimated_kl(self, logits_CV: Tensor, target_C: Tensor, part: slice) -> dict[str, Tensor]:
        ratio_C = token_logprobs(logits_CV, self.tokens_N[part]) - target_C
        return {
            "reverse_kl": ratio_C.masked_fill(self.sampler_N[part].isnan(), torch.nan),
            "entropy": entropy(logits_CV),
        }

    def _importance(self, logprobs_C: Tensor, part: slice) -> tuple[Tensor, dict[str, Tensor]]:
        objective, policy_C = self.config.objective, logprobs_C.detach()
        assert isinstance(objective, TargetObjective)
        if self.trainer_N is None or self.mismatch_N is None:
            sampler_C = self.sampler_N[part]
            staleness_C = torch.zeros_like(policy_C)
            mismatch_C = policy_C - torch.where(sampler_C.isnan(), policy_C, sampler_C)
        else:
            staleness_C, mismatch_C = policy_C - self.trainer_N[part], self.mismatch_N[part]
        return importance_weights(staleness_C, mismatch_C, objective.importance, objective.importance_band)

    def _advantage_bins(self, logits_CV: Tensor, teacher_C: Tensor, part: slice) -> dict[str, Tensor]:
        """The bin of each sampled token's log(teacher / student), one-hot; averaged over tokens a histogram."""
        advantages_C = teacher_C - token_logprobs(logits_CV, self.tokens_N[part])
        edges = torch.tensor(ADVANTAGE_EDGES, device=advantages_C.device)
        bins_C = torch.bucketize(advantages_C, edges)
        bounds = ["-inf", *(f"{edge:g}" for edge in ADVANTAGE_EDGES), "inf"]
        return {
            f"{HISTOGRAM}{low}_to_{high}": (bins_C == i).float()
            for i, (low, high) in enumerate(itertools.pairwise(bounds))
        }

    def _kl_per_teacher(self, logits_CV: Tensor, part: slice) -> dict[str, Tensor]:
        """The student's reverse KL from each of several teachers; NaN for tokens that a teacher did not score."""
        found: dict[str, Tensor] = {}
        for name, read in self.per_teacher.items():
            here_M, theirs_MV = read(part)
            found[f"reverse_kl_from/{name}"] = torch.full(logits_CV.shape[:1], torch.nan, device=logits_CV.device)
            if len(here_M):
                kl_M, _ = reverse_kl(logits_CV[here_M], _tempered(theirs_MV, self.config.temperature))
                found[f"reverse_kl_from/{name}"][here_M] = kl_M
        return found


def divergence(objective: ObjectiveConfig, logits_CV: Tensor, target_CV: Tensor) -> Losses:
    """The objective's divergence of the student from the target."""
    if isinstance(objective, ReverseKL | ForwardKL | JSD) and objective.top_k is not None:
        indices_CK, valid_CK = support(logits_CV, target_CV, objective.top_k.k, objective.top_k.support)
        target_CK = target_CV.log_softmax(-1).gather(1, indices_CK)
        return top_k_divergence(
            logits_CV, target_CK, indices_CK, valid_CK, objective.type, objective.top_k.remainder, _beta(objective)
        )
    if isinstance(objective, ForwardKL):
        return forward_kl(logits_CV, target_CV)
    if isinstance(objective, JSD):
        return jsd(logits_CV, target_CV, objective.beta)
    if isinstance(objective, EntropyAware):
        return entropy_aware(logits_CV, target_CV, objective.entropy_threshold)
    return reverse_kl(logits_CV, target_CV)


def _beta(objective: Restrictable) -> float:
    """The JSD's beta; the other divergences do not read it."""
    return objective.beta if isinstance(objective, JSD) else 0.5


def _target(teacher: Tensor, reference: Tensor | None, objective: Objective) -> Tensor:
    """The target of the student: the teacher, or its extrapolation away from the reference."""
    if not isinstance(objective, TargetObjective) or not objective.extrapolates:
        return teacher
    assert reference is not None
    return extrapolate(teacher, reference, objective.extrapolation)


def _tempered(logits_CV: Tensor, temperature: float) -> Tensor:
    return logits_CV if temperature == 1.0 else logits_CV / temperature
