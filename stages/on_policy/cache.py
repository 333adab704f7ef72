"""A key-value cache with room for the whole completion: a step writes its token where it goes and copies nothing.

Shape suffixes: B rows, H heads, R room in tokens, D head size, T new tokens, L tokens so far.
"""

from typing import Any

from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer


def roomy_cache(config: PretrainedConfig, room: int) -> DynamicCache:
    """A cache for at most `room` tokens a row; layers that are not plain attention keep the kind they have."""
    cache = DynamicCache(config=config)
    cache.layers = [_RoomyLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class _RoomyLayer(DynamicLayer):
    """Keys and values [B, H, R, D], of which the first `length` tokens are there."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.length = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write keys and values [B, H, T, D] behind the others; returns all [B, H, L, D] as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            rows, heads, _, size = key_states.shape
            self.keys = key_states.new_empty((rows, heads, self.room, size))
            self.values = value_states.new_empty((rows, heads, self.room, value_states.shape[-1]))
        end = self.length + key_states.shape[-2]
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        """Tokens so far."""
        return self.length
