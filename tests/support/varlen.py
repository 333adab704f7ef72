"""A stand-in for `torch.nn.attention.varlen.varlen_attn`, which has kernels for GPUs alone: row by row on the CPU."""

import itertools

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """Causal attention [N, H, D] of rows of several lengths; refuses what the kernel does not take."""
    assert {part.dtype for part in (query, key, value)} == {torch.bfloat16}
    assert cu_seq_q.dtype == torch.int32
    assert cu_seq_k is cu_seq_q
    assert window_size == (-1, 0)
    assert enable_gqa == (query.shape[1] != key.shape[1])
    assert query.shape[-1] % 8 == 0
    bounds = cu_seq_q.tolist()
    lengths = [end - start for start, end in itertools.pairwise(bounds)]
    assert bounds[0] == 0
    assert bounds[-1] == len(query)
    assert min(lengths) > 0
    assert max(lengths) <= max_q == max_k
    rows = zip(*(part.transpose(0, 1)[None].split(lengths, 2) for part in (query, key, value)), strict=True)
    found = [scaled_dot_product_attention(*row, is_causal=True, scale=scale, enable_gqa=enable_gqa) for row in rows]
    return torch.cat(found, 2)[0].transpose(0, 1)
