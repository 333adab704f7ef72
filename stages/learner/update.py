"""One optimizer update from rows of tokens: micro-batches of like length, logits in chunks, gradients summed.

Shape suffixes: B rows, T tokens, N scored tokens of several rows laid end to end.

Every row brings the weight of each of its scored tokens in the whole update's loss, so how the rows are split into
micro-batches, or over processes, changes nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.learner.dropout import begin_update
from stages.learner.training import Learner
from stages.losses.chunked import TokenLoss, chunk_length, chunked_token_loss
from stages.rows.packing import micro_batches, pack


@dataclass(frozen=True)
class Row:
    """One sequence to learn from.

    Attributes:
        tokens: Token ids.
        start: Index of the first scored token; all after it are scored. At least 1.
        weights_N: Weight of each scored token in the update's loss.
    """

    tokens: Sequence[int]
    start: int
    weights_N: Tensor

    @property
    def scored(self) -> int:
        """Number of scored tokens."""
        return len(self.tokens) - self.start

    @property
    def targets(self) -> Sequence[int]:
        """The scored tokens."""
        return self.tokens[self.start :]


def token_weights(lengths: Sequence[int], normalisation: str, learner: Learner) -> list[Tensor]:
    """Weights that make a sum over tokens a mean over the whole batch of all processes.

    Args:
        lengths: Scored tokens of each row of this process.
        normalisation: `token`: every token counts the same; `sequence`: every row does.

    Returns:
        One vector [N] a row.
    """
    if normalisation == "token":
        total = learner.global_sum(float(sum(lengths)))
        return [torch.full((length,), 1.0 / total) for length in lengths]
    rows = learner.global_sum(float(len(lengths)))
    return [torch.full((length,), 1.0 / (rows * length)) for length in lengths]


def accumulate(
    learner: Learner,
    rows: Sequence[Row],
    token_loss: Callable[[list[int]], TokenLoss],
    chunk_tokens: int | None = None,
    only: Sequence[int] | None = None,
) -> dict[str, dict[int, Tensor]]:
    """Add the gradient of the rows' weighted loss; the optimizer is not stepped.

    Args:
        learner: The student.
        rows: This process's rows; may be empty where another process has some.
        token_loss: Given the indices of a micro-batch's rows in the order their tokens are laid out, the loss of
            those tokens.
        chunk_tokens: Tokens whose logits exist at one time; by default what `chunk_length` says.
        only: Indices of the rows that carry a gradient; all when absent.

    Returns:
        For each metric of the loss one vector a row that was run, by the row's index.
    """
    run = list(range(len(rows))) if only is None else list(only)
    batches = micro_batches([len(rows[i].tokens) for i in run], learner.config.micro_batch_tokens)
    metrics: dict[str, dict[int, Tensor]] = {}
    begin_update(learner.policy.model, own_dropout=learner.config.own_dropout)
    rounds = learner.num_micro_batches(len(batches))
    for number in range(rounds):
        with learner.synchronised(number == rounds - 1):
            if number >= len(batches):
                learner.empty_backward()
                continue
            batch = [run[position] for position in batches[number]]
            tokens, starts = [rows[i].tokens for i in batch], [rows[i].start for i in batch]
            hidden_NH = learner.hidden(pack(tokens, starts, learner.policy.pad_id, learner.device))
            head_VH = learner.policy.head_VH
            weights_N = torch.cat([rows[i].weights_N for i in batch]).to(learner.device)
            size = chunk_tokens or chunk_length(len(head_VH))
            loss, values = chunked_token_loss(hidden_NH, head_VH, weights_N, token_loss(batch), size)
            learner.backward(loss)
        for name, value_N in values.items():
            parts = value_N.cpu().split([rows[i].scored for i in batch])
            metrics.setdefault(name, {}).update(zip(batch, parts, strict=True))
    learner.policy.model.eval()
    return metrics
