"""The one on-policy loop: sample with the student, let a signal judge the samples, update the student on them.

RL and distillation are this loop with different signals and objectives; nothing else differs.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import Tensor

from stages.config import OnPolicyConfig
from stages.core.checkpoint import Artifact
from stages.core.journal import Journal
from stages.core.loss import TokenLoss
from stages.core.stage import end_step, finish
from stages.core.training import Learner
from stages.core.update import CHUNK_TOKENS, Row, accumulate, token_weights
from stages.core.workspace import Workspace
from stages.on_policy.rollout import PromptMixture, Rollout, roll_out
from stages.on_policy.signals import Judgement, Signal

SAMPLE_EVERY = 25

# The loss of the tokens of some rows of a judged rollout, laid end to end in the order given.
Objective = Callable[[Rollout, Judgement, Sequence[int]], TokenLoss]


def train_on_policy(
    stage: str,
    learner: Learner,
    config: OnPolicyConfig,
    workspace: Workspace,
    mixture: PromptMixture,
    signal: Signal,
    objective: Objective,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Artifact:
    """Take the stage's steps from where it was left and commit the student.

    Args:
        stage: Prefix of the metrics: `rl` or `distill`.
        learner: The student.
        config: The stage's config.
        workspace: Where progress, journal and checkpoint go.
        mixture: Prompts by domain.
        signal: Judges the samples, once a step.
        objective: What the student minimises on judged samples.
        chunk_tokens: Tokens whose logits exist at one time.
    """
    done = learner.resume()
    journal = workspace.journal(done)
    metrics: dict[str, float] = {}
    for step in range(done + 1, config.max_steps + 1):
        learner.begin(step)
        metrics = {}
        rollout = roll_out(learner, mixture.step(step), config, step)
        rows = _rows(rollout, config, learner)
        judgement = signal.judge(rollout, rows)
        kept = [i for i in range(len(rows)) if judgement.matters(i)]
        learner.tokens += round(learner.global_sum(sum(row.scored for row in rows)))
        values: Mapping[str, Mapping[int, Tensor]] = {}
        for _ in range(config.updates_per_batch):
            if learner.global_sum(len(kept)) == 0:
                learner.skip_update()
                continue
            values = accumulate(learner, rows, partial(objective, rollout, judgement), chunk_tokens, kept)
            metrics |= {f"{stage}/{name}": value for name, value in learner.update().items()}
        by_domain = _averages(rollout, judgement, values)
        metrics |= {f"{stage}/{name}": value for name, value in learner.averages(by_domain).items()}
        metrics[f"{stage}/informative"] = learner.global_sum(len(kept)) / learner.global_sum(len(rows))
        if step == 1 or step % SAMPLE_EVERY == 0:
            _show(journal, step, rollout, judgement, learner)
        end_step(learner, journal, step, config.max_steps, metrics)
    return finish(workspace, learner, mixture.examples, metrics)


def _rows(rollout: Rollout, config: OnPolicyConfig, learner: Learner) -> list[Row]:
    weights = token_weights([len(s.completion_ids) for s in rollout.samples], config.loss_normalisation, learner)
    return [
        Row(sample.tokens, len(sample.prompt_ids), weights_N)
        for sample, weights_N in zip(rollout.samples, weights, strict=True)
    ]


def _averages(
    rollout: Rollout, judgement: Judgement, values: Mapping[str, Mapping[int, Tensor]]
) -> dict[str, tuple[float, float]]:
    """Sum and count of every quantity, over all rows and by domain: tokens for losses, rows for rewards."""
    sums: dict[str, tuple[float, float]] = {}

    def add(name: str, row: int, total: float, count: int) -> None:
        for key in (name, f"{name}/{rollout.domains[row]}"):
            before = sums.get(key, (0.0, 0.0))
            sums[key] = (before[0] + total, before[1] + count)

    for row, sample in enumerate(rollout.samples):
        add("length", row, len(sample.completion_ids), 1)
        add("truncated", row, not sample.finished, 1)
        for name, facts in judgement.values.items():
            add(name, row, facts[row], 1)
    for name, parts in values.items():
        for row, part_N in parts.items():
            add(name, row, float(part_N.sum()), len(part_N))
    return sums


def _show(journal: Journal, step: int, rollout: Rollout, judgement: Judgement, learner: Learner) -> None:
    """Record one completion of each domain for a person to read."""
    if not learner.accelerator.is_main_process:
        return
    shown: set[str] = set()
    for row, example in enumerate(rollout.examples):
        if example.domain not in shown:
            shown.add(example.domain)
            facts = {name: values[row] for name, values in judgement.values.items()}
            journal.sample(
                step,
                domain=example.domain,
                prompt=example.prompt,
                answer=example.answer,
                completion=rollout.completions[row],
                **facts,
            )
