"""The supervised half of the training core: cross-entropy on given tokens. Pretraining and SFT are thin layers over it.

Shape suffixes: N concatenated scored tokens, C tokens of one chunk, V vocabulary.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from base.errors import UserError
from base.store.checkpoint import Artifact
from experts.domain import Example, Prompt
from stages.config.training import ConflictMaskConfig, TrainConfig
from stages.learner.stage import end_step, finish, left_out
from stages.learner.training import Learner, step_seed
from stages.learner.update import Row, accumulate
from stages.learner.workspace import Workspace
from stages.losses.chunked import TokenLoss
from stages.model.policy import Policy
from stages.rows.chat import encode_demonstration, encode_demonstrations, encode_prompt
from stages.rows.lengths import Limit, shorten

Demonstration = tuple[list[int], list[int]]
# Demonstrations whose texts are tokenised as one batch.
ENCODED_AT_ONCE = 1024


def imitate(
    stage: str,
    learner: Learner,
    workspace: Workspace,
    examples: Mapping[str, Sequence[Example]],
    batches: Callable[[int], Iterator[list[Row]]],
    conflicts: ConflictMaskConfig | None = None,
    notes: Sequence[str] = (),
) -> Artifact:
    """Run the stage's steps from its last saved state; each minimises the weighted cross-entropy of one batch.

    Args:
        stage: Prefix of the metrics.
        learner: The policy in training.
        workspace: Where progress, journal and checkpoint go.
        examples: The training examples by domain, for the manifest.
        batches: Given the number of finished steps, yields this process's rows of each further step. Over all
            processes the weights of a step sum to 1.
        conflicts: Selects the tokens that are left out; none when absent.
        notes: Lines for the log before the first step.

    Returns:
        The committed checkpoint.
    """
    done = learner.resume()
    journal = workspace.journal(done)
    if done == 0 and learner.accelerator.is_main_process:
        for text in notes:
            journal.note(0, text)
    total = learner.config.max_steps
    metrics: dict[str, float] = {}
    for step, rows in zip(range(done + 1, total + 1), batches(done), strict=False):
        learner.seed_step(step)
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
    """Update on the mean over the kept tokens; without any, the weights do not change.

    The kept tokens are known only after the last micro-batch of the last process, so the summed gradient is divided by
    their weight.

    Args:
        learner: Has the gradient of the weighted sum over kept tokens.
        rows: This process's rows of the step.
        masked: 1 for each token [N] of a row that was left out, else 0.
        loss: The weighted sum over the kept tokens of all processes.

    Returns:
        The step's metrics by name.
    """
    # Not 1 minus the weight of masked tokens: rounding would leave a remainder for a batch without kept tokens.
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
        batch: Indices of the rows whose tokens are concatenated.
        conflicts: Limits of probability and entropy [nats]. A token below both has the loss 0, no gradient, and the
            metric `masked` 1 (Diao et al. 2026, arXiv:2601.02151).
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
    config: TrainConfig,
    rough: bool,
    wrong_answers: float = 0.0,
) -> tuple[list[Demonstration], list[str]]:
    """Prompt and completion token ids of each example, and lines for the journal.

    Args:
        workspace: Domains and seed.
        policy: Has the tokenizer and the context length.
        examples: The drawn examples by domain.
        config: `longer_prompts` sets the treatment of prompts that leave no room for their completions.
        rough: Whether to imitate the domain's rough demonstrations.
        wrong_answers: Share of prompts that get another example's completion.

    Raises:
        UserError: prompts are too long and refused, none is left, or the template refuses one; the message names the
            domain.
    """
    rows: list[Demonstration] = []
    notes = left_out(workspace)
    for name, drawn in examples.items():
        fitting = Fitting(policy, config)
        texts = []
        for example in drawn:
            rng = random.Random(step_seed(workspace.seed, 0, example.id))
            answered = rng.choice(drawn) if rng.random() < wrong_answers else example
            texts.append(workspace.domains[example.domain].demonstration(answered, rng, rough))
        fitting.take(drawn, texts)
        rows += fitting.rows
        notes += fitting.lines(name, len(drawn))
    return rows, notes


class Fitting:
    """Collects the demonstrations of one domain that fit the model, and counts those that do not.

    Args:
        policy: Has the tokenizer and the context length.
        config: The stage's config.
    """

    def __init__(self, policy: Policy, config: TrainConfig) -> None:
        self.tokenizer, self.context, self.config = policy.tokenizer, policy.context, config.model_dump()
        self.rows: list[Demonstration] = []
        self.limit = Limit.of(self.config, self.context, 0)
        self._long: list[int] = []

    def take(self, examples: Sequence[Example], texts: Sequence[str]) -> None:
        """Add the examples with these completions that fit or may be cut."""
        pairs = [(example.prompt, text) for example, text in zip(examples, texts, strict=True)]
        for first in range(0, len(pairs), ENCODED_AT_ONCE):
            batch = pairs[first : first + ENCODED_AT_ONCE]
            for pair, row in zip(batch, encode_demonstrations(self.tokenizer, batch), strict=True):
                self._take(*pair, row)

    def _take(self, prompt: Prompt, text: str, row: Demonstration) -> None:
        limit = Limit.of(self.config, self.context, len(row[1]))
        if limit.tokens is not None and len(row[0]) > limit.tokens:
            self._long.append(sum(map(len, row)))
            if limit.longer != "truncate":
                return
            cut = shorten(prompt, limit.tokens, lambda text: len(encode_prompt(self.tokenizer, text)))
            row = encode_demonstration(self.tokenizer, cut, text)
        self.rows.append(row)

    def lines(self, domain: str, total: int) -> list[str]:
        """Lines for the journal on demonstrations that do not fit.

        Raises:
            UserError: they are refused, or none is left.
        """
        if not self._long:
            return []
        limit = self.config["max_prompt_tokens"]
        limits = [f"a context of {self.context} tokens", *([f"max_prompt_tokens {limit}"] if limit else [])]
        text = (
            f"domains.{domain}: {len(self._long)} of {total} prompts with their completions do not fit "
            f"{' and '.join(limits)} (the longest have {max(self._long)} tokens)"
        )
        if self.limit.longer == "refuse":
            raise UserError(f"{text}; shorten them, or set longer_prompts: drop or truncate")
        if not self.rows:
            raise UserError(f"{text}; longer_prompts: drop leaves none")
        return [f"{text}: {'dropped' if self.limit.longer == 'drop' else 'truncated'}"]
