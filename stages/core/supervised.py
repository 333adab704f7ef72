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
from stages.config import ConflictMaskConfig
from stages.core.chat import encode_demonstration
from stages.core.checkpoint import Artifact
from stages.core.loss import TokenLoss
from stages.core.policy import Policy
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
    conflicts: ConflictMaskConfig | None = None,
) -> Artifact:
    """Take the stage's steps from where it was left: each minimises the weighted cross-entropy of one batch.

    Args:
        stage: Prefix of the metrics.
        learner: The policy in training.
        workspace: Where progress, journal and checkpoint go.
        examples: What is trained on, by domain, for the manifest.
        batches: This process's rows of each step, from after the given step on. Over all processes the weights of a
            step sum to 1.
        conflicts: Which tokens are left out; none when absent.
    """
    done = learner.resume()
    journal = workspace.journal(done)
    total = learner.config.max_steps
    metrics: dict[str, float] = {}
    for step, rows in zip(range(done + 1, total + 1), batches(done), strict=False):
        learner.begin(step)
        values = accumulate(learner, rows, partial(cross_entropy, rows, conflicts=conflicts))
        loss = learner.global_sum(
            sum(float((rows[i].weights_N * loss_N).sum()) for i, loss_N in values.get("loss", {}).items())
        )
        if conflicts is None:
            found = {"loss": loss, **learner.update()}
        else:
            found = _update_on_kept(learner, rows, values.get("masked", {}), loss)
        metrics = {f"{stage}/{name}": value for name, value in found.items()}
        learner.tokens += round(learner.global_sum(sum(row.scored for row in rows)))
        end_step(learner, journal, step, total, metrics)
    return finish(workspace, learner, examples, metrics)


def _update_on_kept(
    learner: Learner, rows: Sequence[Row], masked: Mapping[int, Tensor], loss: float
) -> dict[str, float]:
    """Update on the mean over the tokens that are left; where none is, leave the weights as they are.

    Which tokens are left is known only after the last micro-batch of the last process, so the summed gradient is
    divided by their weight.

    Args:
        learner: With the gradient of the weighted sum over what is left.
        rows: This process's rows of the step.
        masked: 1 for each token [N] of a row that was left out, else 0.
        loss: The weighted sum over what is left, of all processes.
    """
    # Not 1 minus what was left out: rounding would leave something of a batch with nothing left.
    kept = learner.global_sum(sum(float((rows[i].weights_N * (1 - out_N)).sum()) for i, out_N in masked.items()))
    tokens = learner.global_sum(sum(len(out_N) for out_N in masked.values()))
    share = learner.global_sum(sum(float(out_N.sum()) for out_N in masked.values())) / max(1.0, tokens)
    if kept == 0:
        learner.skip_update()
        return {"loss": 0.0, "masked_share": share}
    for parameter in learner.policy.model.parameters():
        if parameter.grad is not None:
            parameter.grad.div_(kept)
    return {"loss": loss / kept, "masked_share": share, **learner.update()}


def cross_entropy(rows: Sequence[Row], batch: Sequence[int], conflicts: ConflictMaskConfig | None = None) -> TokenLoss:
    """Cross-entropy of each scored token of the batch's rows.

    Args:
        rows: A step's rows.
        batch: Indices of those whose tokens are laid end to end.
        conflicts: Tokens of a lower probability where the entropy [nats] is lower too have the loss 0 and no gradient,
            and the metric `masked` 1 (Diao et al. 2026, arXiv:2601.02151).
    """
    targets_N = torch.tensor([token for i in batch for token in rows[i].targets])

    def token_loss(logits_CV: Tensor, part: slice) -> tuple[Tensor, dict[str, Tensor]]:
        losses_C = functional.cross_entropy(logits_CV, targets_N[part].to(logits_CV.device), reduction="none")
        if conflicts is None:
            return losses_C, {"loss": losses_C}
        with torch.no_grad():
            entropy_C = torch.special.entr(logits_CV.softmax(-1)).sum(-1)
            masked_C = ((-losses_C).exp() < conflicts.probability) & (entropy_C < conflicts.entropy)
        kept_C = losses_C.masked_fill(masked_C, 0.0)
        return kept_C, {"loss": kept_C, "masked": masked_C.to(losses_C.dtype)}

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
            rows.append(encode_demonstration(policy.tokenizer, example.prompt, text))
    return rows
