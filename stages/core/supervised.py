"""The supervised half of the training core: cross-entropy on given tokens. Pretraining and SFT are thin over it.

Shape suffixes: N scored tokens laid end to end, C tokens of one chunk, V vocabulary.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from experts.domain import Example
from stages.core.checkpoint import Artifact
from stages.core.loss import TokenLoss
from stages.core.policy import Policy, encode_completion, encode_prompt
from stages.core.stage import end_step, finish
from stages.core.training import Learner, step_seed
from stages.core.update import Row, accumulate
from stages.core.workspace import Workspace

Demonstration = tuple[list[int], list[int]]


def imitate(
    stage: str,
    learner: Learner,
    workspace: Workspace,
    examples: Mapping[str, Sequence[Example]],
    batches: Callable[[int], Iterator[list[Row]]],
) -> Artifact:
    """Take the stage's steps from where it was left: each minimises the weighted cross-entropy of one batch.

    Args:
        stage: Prefix of the metrics.
        learner: The policy in training.
        workspace: Where progress, journal and checkpoint go.
        examples: What is trained on, by domain, for the manifest.
        batches: This process's rows of each step, from after the given step on.
    """
    done = learner.resume()
    journal = workspace.journal(done)
    total = learner.config.max_steps
    metrics: dict[str, float] = {}
    for step, rows in zip(range(done + 1, total + 1), batches(done), strict=False):
        learner.begin(step)
        losses = accumulate(learner, rows, partial(cross_entropy, rows)).get("loss", {})
        loss = learner.global_sum(sum(float((rows[i].weights_N * loss_N).sum()) for i, loss_N in losses.items()))
        metrics = {f"{stage}/loss": loss, **{f"{stage}/{name}": value for name, value in learner.update().items()}}
        learner.tokens += round(learner.global_sum(sum(row.scored for row in rows)))
        end_step(learner, journal, step, total, metrics)
    return finish(workspace, learner, examples, metrics)


def cross_entropy(rows: Sequence[Row], batch: Sequence[int]) -> TokenLoss:
    """Cross-entropy of each scored token of the batch's rows."""
    targets_N = torch.tensor([token for i in batch for token in rows[i].targets])

    def token_loss(logits_CV: Tensor, part: slice) -> tuple[Tensor, dict[str, Tensor]]:
        losses_C = functional.cross_entropy(logits_CV, targets_N[part].to(logits_CV.device), reduction="none")
        return losses_C, {"loss": losses_C}

    return token_loss


def demonstrations(
    workspace: Workspace,
    policy: Policy,
    examples: Mapping[str, Sequence[Example]],
    rough: bool,
    wrong_answers: float = 0.0,
) -> list[Demonstration]:
    """Prompt and completion token ids of each example.

    Args:
        rough: Whether to imitate the domain's rough demonstrations.
        wrong_answers: Share of prompts that get another example's completion.
    """
    rows = []
    for drawn in examples.values():
        for example in drawn:
            rng = random.Random(step_seed(workspace.seed, 0, example.id))
            answered = rng.choice(drawn) if rng.random() < wrong_answers else example
            text = workspace.domains[example.domain].demonstration(answered, rng, rough)
            rows.append((encode_prompt(policy.tokenizer, example.prompt), encode_completion(policy.tokenizer, text)))
    return rows
