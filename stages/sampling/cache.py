"""A key-value cache with room for the whole completion, filled from packed prompts.

A decoding step writes its token in place and copies nothing. Prompts are run without padding, packed into shared lines
if that is shorter. Their keys and values are then copied into one left-padded batch.

Shape suffixes: B rows, K key-value heads, R room in tokens, D head size, T new tokens, L tokens so far, P width of the
prompts, N concatenated prompt tokens of several rows, H hidden.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from stages.model.architecture import Masks
from stages.rows.packing import micro_batches, pack

PREFILL_TOKENS = 16384


def prefill(
    decoder: PreTrainedModel,
    prompts: Sequence[list[int]],
    room: int,
    pad_id: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> tuple[DynamicCache, Tensor]:
    """Run prompts through a decoder.

    Args:
        decoder: The model without its head.
        prompts: Token ids, none empty.
        room: The most tokens that a row can reach, including padding on the left.
        pad_id: The padding token.
        device: The decoder's device.
        dtype: Type of the keys and values.

    Returns:
        The cache of left-padded prompts, and the hidden states [B, H] after each prompt.
    """
    lengths = [len(prompt) for prompt in prompts]
    layers = [_RoomyLayer(len(prompts), max(lengths), room, dtype) for _ in range(decoder.config.num_hidden_layers)]
    masks = Masks.of(decoder.config)
    last: list[Tensor] = [torch.empty(0)] * len(prompts)
    for batch in micro_batches(lengths, PREFILL_TOKENS):
        packed = pack([prompts[i] for i in batch], [1] * len(batch), pad_id, device)
        tokens_BT, bounds_S = packed.inputs
        mask, positions_BT = (None, None) if bounds_S is None else masks.of_rows(bounds_S, *tokens_BT.shape)
        # Without a config the cache keeps every token also in sliding-window layers: the masks apply the window.
        found = DynamicCache()
        hidden_BTH = decoder(
            input_ids=tokens_BT,
            position_ids=positions_BT,
            attention_mask=mask,
            past_key_values=found,
            use_cache=True,
        ).last_hidden_state
        hidden_NH = hidden_BTH.flatten(0, 1)
        for i, offset in zip(batch, packed.offsets, strict=True):
            last[i] = hidden_NH[offset + lengths[i] - 1]
        for layer, run in zip(layers, found.layers, strict=True):
            for i, offset in zip(batch, packed.offsets, strict=True):
                line, start = divmod(offset, tokens_BT.shape[1])
                layer.fill(i, *(part[line, :, start : start + lengths[i]] for part in (run.keys, run.values)))
    cache = DynamicCache(config=decoder.config)
    cache.layers = layers
    return cache, torch.stack(last)


class _RoomyLayer(DynamicLayer):
    """Keys and values [B, K, R, D], of which the first `length` tokens are filled."""

    def __init__(self, rows: int, width: int, room: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.kept = dtype
        self.rows = rows
        self.length = width
        self.room = room

    def fill(self, row: int, keys_KTD: Tensor, values_KTD: Tensor) -> None:
        """Copy a prompt's keys and values into the cache, aligned so that all prompts end at the same position."""
        if not self.is_initialized:
            self.lazy_initialization(keys_KTD, values_KTD)
            # Zeros, not uninitialised memory: padding is multiplied by weights of zero, and 0 * NaN would be NaN.
            self.keys, self.values = (
                part.new_zeros((self.rows, part.shape[0], self.room, part.shape[-1]), dtype=self.kept)
                for part in (keys_KTD, values_KTD)
            )
        start = self.length - keys_KTD.shape[1]
        self.keys[row, :, start : self.length] = keys_KTD
        self.values[row, :, start : self.length] = values_KTD

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, K, T, D]; returns all [B, K, L, D] as views."""
        end = self.length + key_states.shape[-2]
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        """Tokens so far."""
        return self.length
