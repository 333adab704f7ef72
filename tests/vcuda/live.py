"""Bytes of living storages and their peak: what torch's allocator would have handed out, without its rounding."""

import weakref
from functools import partial

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live:
    """Counts storages from when they are first seen until they are freed.

    Attributes:
        bytes: Bytes of living storages.
        peak: The most at one time since `reset`.
    """

    def __init__(self) -> None:
        self.bytes = self.peak = 0
        # The weak references must stay: torch keeps a storage's Python object until the storage itself is freed.
        self._known: dict[int, weakref.ref] = {}

    def add(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage, once."""
        with torch._C.DisableTorchFunction():
            storage = tensor.untyped_storage()
        size, key = storage.nbytes(), storage._cdata
        known = self._known.get(key)
        if known is not None and known() is not None:
            return
        self._known[key] = weakref.ref(storage, partial(self._free, key, size))
        self.bytes += size
        self.peak = max(self.peak, self.bytes)

    def reset(self) -> None:
        """Let the peak begin with what lives now."""
        self.peak = self.bytes

    def _free(self, key: int, size: int, reference: weakref.ref) -> None:
        self.bytes -= size
        if self._known.get(key) is reference:
            del self._known[key]


class Counting(TorchDispatchMode):
    """Counts every storage that operations return; above FakeTensorMode also those of fake tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.live = Live()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.live.add(leaf)
        return result
