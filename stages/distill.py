"""MOPD stage: many teachers, one student, the student's own samples.

Each step samples completions of all domains' prompts with the student, scores each by the one teacher its domain is
routed to, and updates the student towards that teacher's distribution: exactly (reverse KL over the full vocabulary,
logits in chunks) or by the sampled token's log-ratio as a clipped advantage with MiMo's importance weight. The
anchor is one more teacher: the start checkpoint on general prompts. With `outcome_weight` the group-normalised
reward is added. Left out: top-k and forward divergences, remote teachers.
"""

from collections.abc import Sequence

from torch import Tensor

from stages.config import DistillConfig
from stages.core.checkpoint import Artifact
from stages.core.loss import TokenLoss
from stages.core.policy import load_policy
from stages.core.stage import draw_training
from stages.core.training import Learner
from stages.core.workspace import Workspace
from stages.on_policy.loop import Objective, train_on_policy
from stages.on_policy.losses import (
    importance_weighted_policy_gradient,
    reverse_kl,
    sampled_advantages,
    token_logprobs,
)
from stages.on_policy.rollout import PromptMixture, Rollout
from stages.on_policy.signals import Judgement, RewardSignal, Signal, SumSignal, TeacherSignal
from stages.on_policy.teachers import TeacherPool


def train(config: DistillConfig, workspace: Workspace) -> Artifact:
    """Distil the parents `teacher/<domain>` into the checkpoint `start`.

    Raises:
        UserError: a domain without a teacher, a teacher with another tokenizer, a domain too small.
    """
    start = workspace.parents["start"]
    policy = load_policy(start, workspace.store, lora=config.lora, trainable=True, seed=workspace.seed)
    mixture = PromptMixture(
        draw_training(workspace, config), config.prompts_per_step, config.domain_weights, workspace.seed
    )
    updates = config.max_steps * config.updates_per_batch
    learner = Learner(policy, config, updates, workspace.progress, workspace.seed)
    teachers = {role.removeprefix("teacher/"): a for role, a in workspace.parents.items() if role != "start"}
    taught = TeacherSignal(TeacherPool(teachers, workspace.store, policy, config))
    alpha = config.objective.outcome_weight
    signal: Signal = SumSignal(taught, RewardSignal(workspace.domains, weight=alpha)) if alpha > 0 else taught
    make = exact_objective if config.objective.name == "reverse_kl" else sampled_objective
    objective = make(config, learner)
    chunk_tokens = config.objective.chunk_tokens
    return train_on_policy("distill", learner, config, workspace, mixture, signal, objective, chunk_tokens)


def exact_objective(config: DistillConfig, learner: Learner) -> Objective:
    """Full-vocabulary reverse KL, plus the policy gradient of the outcome reward where there is one."""

    def objective(rollout: Rollout, judgement: Judgement, rows: Sequence[int]) -> TokenLoss:
        """The exact divergence of some rows from their teachers."""
        assert judgement.teachers is not None
        teacher_logits = judgement.teachers.logits(rows)
        tokens_N = rollout.tokens(rows, learner.device)
        sampler_logprobs_N = rollout.logprobs(rows, learner.device)
        outcome_N = judgement.token_advantages(rollout, rows, learner.device)

        def token_loss(logits_CV: Tensor, part: slice) -> tuple[Tensor, dict[str, Tensor]]:
            scaled_CV = logits_CV / config.temperature
            losses_C, metrics = reverse_kl(scaled_CV, teacher_logits(part) / config.temperature)
            if outcome_N is None:
                return losses_C, metrics
            rewarded_C, more = importance_weighted_policy_gradient(
                token_logprobs(scaled_CV, tokens_N[part]),
                sampler_logprobs_N[part],
                outcome_N[part],
                config.objective.importance_band,
            )
            return losses_C + rewarded_C, {**metrics, **more}

        return token_loss

    return objective


def sampled_objective(config: DistillConfig, learner: Learner) -> Objective:
    """The sampled token's clipped log-ratio, plus the outcome advantage, under MiMo's importance weight."""

    def objective(rollout: Rollout, judgement: Judgement, rows: Sequence[int]) -> TokenLoss:
        """The sampled token's policy gradient of some rows."""
        assert judgement.teachers is not None
        tokens_N = rollout.tokens(rows, learner.device)
        sampler_logprobs_N = rollout.logprobs(rows, learner.device)
        teacher_logprobs_N = judgement.teachers.logprobs(rows, tokens_N, config.temperature)
        outcome_N = judgement.token_advantages(rollout, rows, learner.device)

        def token_loss(logits_CV: Tensor, part: slice) -> tuple[Tensor, dict[str, Tensor]]:
            logprobs_C = token_logprobs(logits_CV / config.temperature, tokens_N[part])
            advantages_C = sampled_advantages(logprobs_C, teacher_logprobs_N[part], config.objective.advantage_clip)
            if outcome_N is not None:
                advantages_C = advantages_C + outcome_N[part]
            losses_C, metrics = importance_weighted_policy_gradient(
                logprobs_C, sampler_logprobs_N[part], advantages_C, config.objective.importance_band
            )
            return losses_C, {**metrics, "reverse_kl": logprobs_C - teacher_logprobs_N[part]}

        return token_loss

    return objective
