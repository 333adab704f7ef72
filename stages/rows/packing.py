"""Packs rows of tokens into batches with little padding: short rows share a line, and no row attends to another.

Shape suffixes: B lines of a batch, T tokens of a line, N concatenated scored tokens of the rows, H hidden, S rows and
fillings and one more.

To run rows through a model and read the hidden states that predict their scored tokens, in the order of the rows:

    for batch in micro_batches([len(row.tokens) for row in rows], max_tokens):
        packed = pack([rows[i].tokens for i in batch], [rows[i].start for i in batch], pad_id, device)
        hidden_NH = packed.scored(HiddenStates(model)(*packed.inputs))
        for i, part_NH in zip(batch, hidden_NH.split([rows[i].scored for i in batch]), strict=True):
            ...

A `Learner`'s own forward pass, with gradients attached, is `learner.hidden(packed)`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Times of an update on one core relative to this value: from 16 lab rows 1.25 at 1024 and 0.93 at 4096, from 64 rows
# 1.04 and 1.25.
ENOUGH_ON_CPU = 2048
ENOUGH_ON_GPU = 8192


@dataclass(frozen=True)
class Packed:
    """Rows packed into lines, with all tensors on the model's device.

    Attributes:
        tokens_BT: The rows' tokens, with padding on the right of every line.
        scored_N: Indices into the flattened [B * T] lines at which the scored tokens are predicted, in the rows' order.
        offsets: Index into the flattened lines at which each row begins.
        bounds_S: Indices (int32) into the flattened lines at which rows and fillings begin, and B * T; None if every
            line is one row, since plain causal attention then hides the padding.
    """

    tokens_BT: Tensor
    scored_N: Tensor
    offsets: tuple[int, ...]
    bounds_S: Tensor | None = None

    @property
    def inputs(self) -> tuple[Tensor, Tensor | None]:
        """The arguments of `HiddenStates`."""
        return self.tokens_BT, self.bounds_S

    def scored(self, hidden_BTH: Tensor) -> Tensor:
        """The hidden states [N, H] that predict the scored tokens, which are one position before them."""
        return hidden_BTH.flatten(0, 1).index_select(0, self.scored_N)


def pack(tokens: Sequence[Sequence[int]], starts: Sequence[int], pad_id: int, device: torch.device) -> Packed:
    """Pack rows into lines as wide as the longest row.

    Args:
        tokens: Token ids of each row.
        starts: Index of each row's first scored token, at least 1; all after it are scored.
        pad_id: The padding token.
        device: Device of the model that will run them.
    """
    lengths = [len(row) for row in tokens]
    width = max(lengths)
    lines = first_fit(lengths, width)
    tokens_BT = torch.full((len(lines), width), pad_id)
    scored: list[Tensor] = [torch.empty(0)] * len(tokens)
    offsets = [0] * len(tokens)
    bounds = []
    for line, rows in enumerate(lines):
        at = 0
        for row in rows:
            here = slice(at, at + lengths[row])
            tokens_BT[line, here] = torch.tensor(tokens[row])
            offset = line * width + at
            bounds.append(offset)
            offsets[row] = offset
            scored[row] = torch.arange(offset + starts[row] - 1, offset + lengths[row] - 1)
            at += lengths[row]
        if at < width:
            # Padding counts as a row of its own: it attends only to itself, and no row attends to it.
            bounds.append(line * width + at)
    tokens_BT, scored_N = tokens_BT.to(device), torch.cat(scored).to(device)
    if len(lines) == len(tokens):
        return Packed(tokens_BT, scored_N, tuple(offsets))
    bounds_S = torch.tensor([*bounds, tokens_BT.numel()], dtype=torch.int32)
    return Packed(tokens_BT, scored_N, tuple(offsets), bounds_S.to(device))


def first_fit(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Assign rows to lines of at most `width` tokens: the longest first, each to the first line with room (first-fit
    decreasing, at most 11/9 of the fewest lines plus one; Johnson 1973). Returns the rows of each line."""
    lines: list[list[int]] = []
    room: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        line = next((i for i, left in enumerate(room) if left >= lengths[row]), len(lines))
        if line == len(lines):
            lines.append([])
            room.append(width)
        lines[line].append(row)
        room[line] -= lengths[row]
    return lines


def micro_batches(lengths: Sequence[int], max_tokens: int, enough_tokens: int | None = None) -> list[list[int]]:
    """Split rows into micro-batches of similar length, each of at most `max_tokens` padded tokens.

    A micro-batch ends early if it keeps the device busy already and more than 1/8 of the next row would be padding. A
    smaller micro-batch also gets rows of other lengths, which `pack` places into shared lines.

    Args:
        lengths: Tokens of each row.
        max_tokens: Size of a micro-batch, padded and unpacked; a single longer row forms its own.
        enough_tokens: Size from which a micro-batch keeps the device busy; by default this device's constant.

    Returns:
        Indices of the rows of each micro-batch, every row once. No row is shorter than 1/8 of its batch's width,
        because attention in shared lines costs their width squared.
    """
    if enough_tokens is None:
        enough_tokens = ENOUGH_ON_GPU if torch.cuda.is_available() else ENOUGH_ON_CPU
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        # Rows are sorted by length, longest first, so a batch's first row is as wide as the batch.
        width = lengths[batches[-1][0]] if batches else 0
        size = width * len(batches[-1]) if batches else 0
        alike = 8 * lengths[row] >= (7 if size >= enough_tokens else 1) * width
        if batches and size + width <= max_tokens and alike:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches
