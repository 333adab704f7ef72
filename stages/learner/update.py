"""One optimizer update from rows of tokens: micro-batches of similar length, logits in chunks, gradients summed.

Shape suffixes: B rows, T tokens, N concatenated scored tokens of several rows.

Every row has the weight of each of its scored tokens in the whole update's loss. So the split of rows into
micro-batches, or over processes, does not change the result.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.learner.dropout import begin_update
from stages.learner.training import Learner
from stages.losses.chunked import TokenLoss, chunk_length, chunked_token_loss
from stages.model.precision import as_factor
from stages.rows.packing import micro_batches, pack


@dataclass(frozen=True)
class Row:
    """One training sequence.

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
    """Weights with which the sum over tokens is the mean over the whole batch of all processes.

    Args:
        lengths: Scored tokens of each row of this process.
        normalisation: `token`: every token has the same weight; `sequence`: every row has the same weight.

    Returns:
        One vector [N] per row.
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
        rows: This process's rows; may be empty if another process has some.
        token_loss: Given the indices of a micro-batch's rows, returns the loss of their concatenated tokens, in the
            same order.
        chunk_tokens: Tokens whose logits exist at the same time; `chunk_length` of the vocabulary by default.
        only: Indices of the rows that have a gradient; all when absent.

    Returns:
        For each metric of the loss, one vector [N] per row that was run, by the row's index.
    """
    run = list(range(len(rows))) if only is None else list(only)
    batches = micro_batches([len(rows[i].tokens) for i in run], learner.config.micro_batch_tokens)
    found: list[tuple[list[int], dict[str, Tensor]]] = []
    begin_update(learner.policy.model, own_dropout=learner.config.own_dropout)
    count = learner.num_micro_batches(len(batches))
    for number in range(count):
        with learner.synchronised(number == count - 1):
            if number >= len(batches):
                learner.empty_backward()
                continue
            batch = [run[position] for position in batches[number]]
            tokens, starts = [rows[i].tokens for i in batch], [rows[i].start for i in batch]
            packed = pack(tokens, starts, learner.policy.pad_id, learner.device)
            # Wrappers of the model return float32.
            hidden_NH = as_factor(learner.hidden(packed), learner.config.dtype)
            head_VH = learner.policy.head_VH
            weights_N = torch.cat([rows[i].weights_N for i in batch]).to(learner.device)
            size = chunk_tokens or chunk_length(len(head_VH), learner.device)
            loss, values = chunked_token_loss(hidden_NH, head_VH, weights_N, token_loss(batch), size)
            learner.backward(loss)
        found.append((batch, values))
    learner.policy.model.eval()
    # Read at the end: the device would wait for the host at every micro-batch.
    metrics: dict[str, dict[int, Tensor]] = {}
    for name in dict.fromkeys(name for _, values in found for name in values):
        having = [(batch, values[name]) for batch, values in found if name in values]
        order = [i for batch, _ in having for i in batch]
        parts = torch.cat([value_N for _, value_N in having]).cpu().split([rows[i].scored for i in order])
        metrics[name] = dict(zip(order, parts, strict=True))
    return metrics
