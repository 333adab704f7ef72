"""RL stage: an expert from its domain's verifiable reward; the GRPO family on the one on-policy loop.

Each step samples a group of completions for every prompt, scores them with the domain's scorer, takes the reward
relative to the group's mean as the advantage of every token, and makes one or more updates on PPO's surrogate with an
asymmetric clip (DAPO's clip-higher). Groups whose rewards are all equal carry no signal and skip the backward pass.
`reference_kl` adds the exact reverse KL against the start; every row then takes part in the backward pass. Left out: a
critic, DAPO's over-long shaping.
"""

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor

from base.store.checkpoint import Artifact
from stages.config.on_policy import RLConfig
from stages.learner.stage import draw_prompts, load_start
from stages.learner.training import Learner
from stages.learner.workspace import Workspace
from stages.losses.chunked import TokenLoss
from stages.losses.divergences import reverse_kl
from stages.losses.log_probabilities import clipped_surrogate, entropy, token_logprobs
from stages.on_policy.backends import make_sampler
from stages.on_policy.loop import OnPolicyTask, train_on_policy
from stages.on_policy.monitoring import Monitor
from stages.on_policy.preflight import SamplerCheck
from stages.on_policy.rollout import PromptMixture, Rollout
from stages.on_policy.signals import ReferenceSignal, RewardSignal, Signal, Signals, SumSignal
from stages.teachers.residency import TeacherSettings
from stages.teachers.scoring import REFERENCE, Routed, TeacherPool


def train(config: RLConfig, workspace: Workspace, monitor: Monitor | None = None) -> Artifact:
    """Train the checkpoint `start` on the reward of the workspace's domains.

    Args:
        config: The stage's config.
        workspace: Parents, domains, seed and folders.
        monitor: Scores the student during training.

    Returns:
        The committed expert.

    Raises:
        UserError: a domain has fewer than `examples` prompts, some are too long, or the sampler's log-probabilities
            differ from those of the model's own forward pass.
    """
    policy = load_start(workspace, config.lora)
    examples, notes = draw_prompts(workspace, config, policy, config.max_new_tokens)
    mixture = PromptMixture(examples, config.prompts_per_step, {}, workspace.seed)
    updates = config.max_steps * config.updates_per_batch
    learner = Learner(policy, config, updates, workspace.progress, workspace.seed)
    signal: Signal = RewardSignal(workspace.domains, config.normalise_by_std)
    if config.reference_kl > 0:
        signal = SumSignal(signal, _reference(config, workspace, learner))

    def objective(rollout: Rollout, signals: Signals, rows: Sequence[int]) -> TokenLoss:
        """The clipped surrogate of some rows."""
        tokens_N = rollout.tokens(rows, learner.device)
        sampler_logprobs_N = rollout.logprobs(rows, learner.device)
        advantages_N = signals.token_advantages(rollout, rows, learner.device)
        assert advantages_N is not None
        reference = signals.reference.logits(rows) if signals.reference else None

        def token_loss(logits_CV: Tensor, part: slice) -> tuple[Tensor, dict[str, Tensor]]:
            scaled_CV = logits_CV / config.temperature
            logprobs_C = token_logprobs(scaled_CV, tokens_N[part])
            losses_C, metrics = clipped_surrogate(
                logprobs_C, sampler_logprobs_N[part], advantages_N[part], config.clip_low, config.clip_high
            )
            if reference is not None:
                kl_C, more = reverse_kl(scaled_CV, reference(part) / config.temperature)
                return losses_C + config.reference_kl * kl_C, {
                    **metrics,
                    "reference_kl": more["reverse_kl"],
                    "entropy": more["entropy"],
                }
            with torch.no_grad():
                return losses_C, {**metrics, "entropy": entropy(scaled_CV)}

        return token_loss

    with contextlib.closing(make_sampler(config, learner, workspace, mixture.step, examples, monitor)) as sampler:
        check = SamplerCheck(workspace.name, policy, sampler, mixture.examples, config)
        with learner.gathered_weights():
            notes.append(check.start())
        task = OnPolicyTask(
            stage="rl",
            mixture=mixture,
            signal=signal,
            objective=objective,
            progress=("reward", "higher"),
            sampler=sampler,
            recheck=check.again,
            monitor=monitor,
            notes=notes,
            logs=[sampler.drain_log],
        )
        return train_on_policy(task, learner, config, workspace)


def _reference(config: RLConfig, workspace: Workspace, learner: Learner) -> ReferenceSignal:
    """The signal of the start checkpoint, the reference of the KL penalty."""
    routes = {REFERENCE: (Routed(workspace.parents["start"]),)}
    settings = TeacherSettings(config.dtype, config.micro_batch_tokens)
    # A data-parallel wrapper of the student's parameters must not contain another adapter.
    share_base = learner.world_size == 1
    return ReferenceSignal(TeacherPool(routes, workspace.store, learner.policy, settings, share_base))
