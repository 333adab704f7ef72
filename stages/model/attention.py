"""Attention of the product's models: transformers' SDPA on a CPU in float32, and what fused kernels take elsewhere.

Registered with transformers under `NAME`. In bfloat16 or on a GPU it differs from transformers' in three points, none
of which changes the scores. Packed rows go through a kernel for rows of several lengths, which needs no mask, where the
GPU has one. A step of decoding multiplies the queries that share keys together, so that the cache is not repeated. In
float32 on a GPU keys and values of a prompt are repeated, since no fused kernel takes fewer of them than queries.

Shape suffixes: B lines, H heads, K key-value heads, G heads of one key-value head, T tokens of a line, L tokens they
attend to, D head size, N = B * T, S bounds of rows.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import varlen
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from stages.model.precision import computes_in_bfloat16

NAME = "mopd"
# The oldest GPUs with the kernel for rows of several lengths (Ampere), its head sizes and their step.
VARLEN_CAPABILITY, VARLEN_MOST, VARLEN_STEP = (8, 0), 256, 8


def use_attention(model: PreTrainedModel) -> None:
    """Let a model that uses transformers' SDPA attend by `attend`; its saved config does not change."""
    if model.config._attn_implementation == "sdpa" and model._supports_attention_backend:
        model.set_attn_implementation(NAME)


def has_varlen(device: torch.device) -> bool:
    """Whether a device has torch's kernel for rows of several lengths (`torch.nn.attention.varlen`)."""
    if device.type != "cuda" or not torch.backends.cuda.is_flash_attention_available():
        return False
    return bool(torch.cuda.get_device_capability(device) >= VARLEN_CAPABILITY)


def rows_of(bounds_S: Tensor, lines: int, width: int) -> tuple[Tensor, Tensor]:
    """The row [B, T] of each token of packed lines, and its position [B, T] in it.

    Args:
        bounds_S: Indices (int32) into the flattened lines at which rows and fillings begin, and B * T.
        lines: B.
        width: T.
    """
    index_N = torch.arange(lines * width, dtype=bounds_S.dtype, device=bounds_S.device)
    row_N = torch.searchsorted(bounds_S, index_N, right=True) - 1
    positions_N = index_N - bounds_S.index_select(0, row_N)
    return row_N.view(lines, width), positions_N.view(lines, width).long()


def block_causal_bias(rows_BT: Tensor, dtype: torch.dtype) -> Tensor:
    """Attention bias [B, 1, T, T] with which a token attends to itself and to earlier tokens of its own row."""
    width, device = rows_BT.shape[1], rows_BT.device
    earlier_TT = torch.ones(width, width, dtype=torch.bool, device=device).tril()
    allowed_BTT = (rows_BT[:, :, None] == rows_BT[:, None, :]) & earlier_TT
    bias_BTT = torch.zeros(allowed_BTT.shape, dtype=dtype, device=device)
    return bias_BTT.masked_fill_(~allowed_BTT, torch.finfo(dtype).min)[:, None]


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it.

    Args:
        module: The layer.
        query: [B, H, T, D].
        key: [B, K, L, D].
        value: [B, K, L, D].
        attention_mask: Added to the scores [B, 1, T, L], or their boolean mask; or, as int32, the bounds [1, 1, 1, S]
            of packed rows, each of which attends causally to itself.
        dropout: Of the attention weights.
        scaling: Of the scores; 1 / sqrt(D) when absent.
        is_causal: Whether the layer is causal; by default its attribute.
        kwargs: Passed on to transformers.

    Returns:
        The output [B, T, H, D], and None for the weights.
    """
    if attention_mask is not None and attention_mask.dtype == torch.int32:
        if dropout == 0.0 and _fits_varlen(query, key, value):
            return _by_rows(query, key, value, attention_mask.flatten(), scaling), None
        rows_BT, _ = rows_of(attention_mask.flatten(), query.shape[0], query.shape[2])
        attention_mask = block_causal_bias(rows_BT, torch.bfloat16)
    narrow = query.dtype != torch.float32 or computes_in_bfloat16(query.device)
    plain = query.device.type == "cpu" and not narrow
    if not plain and query.shape[1] != key.shape[1] and not kwargs.keys() & {"position_bias", "cache"}:
        if query.shape[2] == 1 and (attention_mask is None or attention_mask.shape[1:3] == (1, 1)):
            return _grouped(query, key, value, attention_mask, dropout, scaling), None
        if not narrow and attention_mask is None and query.shape[2] == key.shape[2]:
            causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
            return _repeated(query, key, value, causal and query.shape[2] > 1, dropout, scaling), None
    found: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
    )
    return found


def _grouped(
    query: Tensor, key: Tensor, value: Tensor, bias_B11L: Tensor | None, dropout: float, scaling: float | None
) -> Tensor:
    """Attention of one token a line: the G queries of one key-value head take the place of tokens."""
    lines, heads, _, size = query.shape
    query_BKGD = query.reshape(lines, key.shape[1], heads // key.shape[1], size)
    output_BKGD = functional.scaled_dot_product_attention(
        query_BKGD, key, value, attn_mask=bias_B11L, dropout_p=dropout, scale=scaling
    )
    return output_BKGD.reshape(lines, 1, heads, value.shape[-1])


def _repeated(query: Tensor, key: Tensor, value: Tensor, causal: bool, dropout: float, scaling: float | None) -> Tensor:
    """Attention without a mask, each key-value head repeated for its G queries."""
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    output_BHTD = functional.scaled_dot_product_attention(
        query, key, value, dropout_p=dropout, scale=scaling, is_causal=causal
    )
    return output_BHTD.transpose(1, 2).contiguous()


def _fits_varlen(query: Tensor, key: Tensor, value: Tensor) -> bool:
    size = query.shape[-1]
    same = size == value.shape[-1] and query.shape[2] == key.shape[2]
    return same and size <= VARLEN_MOST and size % VARLEN_STEP == 0 and has_varlen(query.device)


def _by_rows(query: Tensor, key: Tensor, value: Tensor, bounds_S: Tensor, scaling: float | None) -> Tensor:
    """Causal attention within each row, with rows as the sequences of a batch of several lengths."""
    lines, heads, width, size = query.shape
    query_NHD, key_NKD, value_NKD = (
        part.transpose(1, 2).reshape(lines * width, -1, size).to(torch.bfloat16) for part in (query, key, value)
    )
    output_NHD = varlen.varlen_attn(
        query_NHD,
        key_NKD,
        value_NKD,
        bounds_S,
        bounds_S,
        width,
        width,
        scale=scaling,
        window_size=(-1, 0),
        enable_gqa=heads != key.shape[1],
    )
    assert isinstance(output_NHD, Tensor)
    return output_NHD.view(lines, width, heads, size)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
