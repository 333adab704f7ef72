"""RFT stage: an expert trained on its own successes; rejection-sampled fine-tuning on the one on-policy loop.

Each step samples a group of completions for every prompt and imitates those that the domain's scorer passes (Yuan et
al. 2023; with new samples in every step as in RAFT, Dong et al. 2023). Failed completions have no negative weight; that
is the only difference from RL. A prompt without a passing completion has no effect.
Left out: a store of successes from earlier steps, and keeping only distinct ones.
"""

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor

from base.store.checkpoint import Artifact
from stages.config.on_policy import RFTConfig
from stages.learner.stage import draw_prompts, load_start
from stages.learner.training import Learner
from stages.learner.workspace import Workspace
from stages.losses.chunked import TokenLoss
from stages.losses.log_probabilities import entropy, token_logprobs
from stages.on_policy.backends import make_sampler
from stages.on_policy.loop import OnPolicyTask, train_on_policy
from stages.on_policy.monitoring import Monitor
from stages.on_policy.preflight import SamplerCheck
from stages.on_policy.rollout import PromptMixture, Rollout
from stages.on_policy.signals import Signals, SuccessSignal


def train(config: RFTConfig, workspace: Workspace, monitor: Monitor | None = None) -> Artifact:
    """Train the checkpoint `start` on those of its own completions that pass.

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

    def objective(rollout: Rollout, signals: Signals, rows: Sequence[int]) -> TokenLoss:
        """The cross-entropy of some rows that passed."""
        tokens_N = rollout.tokens(rows, learner.device)
        passed_N = signals.token_advantages(rollout, rows, learner.device)
        assert passed_N is not None

        def token_loss(logits_CV: Tensor, part: slice) -> tuple[Tensor, dict[str, Tensor]]:
            logprobs_C = token_logprobs(logits_CV, tokens_N[part])
            with torch.no_grad():
                metrics = {"entropy": entropy(logits_CV)}
            return -passed_N[part] * logprobs_C, metrics

        return token_loss

    with contextlib.closing(make_sampler(config, learner, workspace, mixture.step, examples, monitor)) as sampler:
        check = SamplerCheck(workspace.name, policy, sampler, mixture.examples, config)
        with learner.gathered_weights():
            notes.append(check.start())
        task = OnPolicyTask(
            stage="rft",
            mixture=mixture,
            signal=SuccessSignal(workspace.domains, config.pass_score),
            objective=objective,
            progress=("reward", "higher"),
            sampler=sampler,
            recheck=check.again,
            monitor=monitor,
            notes=notes,
            logs=[sampler.drain_log],
        )
        return train_on_policy(task, learner, config, workspace)
