"""Deviations of an architecture from full causal attention and a linear head, read from its config.

Models of text and images have a nested text config, so every function takes the whole config and reads the text's.

Shape suffixes: B lines of a batch, T new tokens, L tokens they may attend to, the new ones last.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from stages.model.attention import NAME, block_causal_bias, has_varlen, rows_of
from stages.model.precision import computes_in_bfloat16

SLIDING = "sliding_attention"
# Caps by a hyperbolic tangent. Capped logits are not the output of a linear head; transformers' SDPA ignores the cap of
# attention scores without an error.
_OF_LOGITS = "caps its logits ({}), and losses need the output of a linear head"
_CAPS = {
    **dict.fromkeys(("final_logit_softcapping", "logits_soft_cap", "output_logits_soft_cap"), _OF_LOGITS),
    "attn_logit_softcapping": "caps its attention scores ({}), which the fused attention of training and sampling "
    "leaves out",
}


def unsupported(config: PreTrainedConfig) -> str | None:
    """Why checkpoints of an architecture cannot be used, as the end of a sentence; None if they can.

    Rows share lines and a cache, so each layer must be attention with a mask that separates them.
    """
    text = config.get_text_config()
    if getattr(text, "is_encoder_decoder", False):
        return "is an encoder and a decoder, and stages train only decoders"
    if text.model_type == "bloom" or getattr(text, "alibi", False):
        return "counts positions in a mask of whole lines (ALiBi), which the mask of packed rows replaces"
    for layer in DynamicCache(config=text).layers:
        # Not isinstance: layers with attention and a recurrent state are a subclass.
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            return (
                "has layers with a recurrent state, which would leak from row to row of a packed batch; only models "
                "of attention alone are supported"
            )
    if "chunked_attention" in _layer_types(text):
        return "attends in chunks, which packed rows do not preserve; full and sliding-window attention are supported"
    return next((reason.format(name) for name, reason in _CAPS.items() if getattr(text, name, None) is not None), None)


def logit_scale(config: PreTrainedConfig) -> float:
    """The factor of the head's logits: Cohere's `logit_scale`, Granite's `logits_scaling` inverted."""
    text = config.get_text_config()
    scale = getattr(text, "logit_scale", None)
    if scale is not None:
        return float(scale)
    divisor = getattr(text, "logits_scaling", None)
    return 1.0 if divisor is None else 1.0 / float(divisor)


def context(config: PreTrainedConfig) -> int | None:
    """The most tokens of a row; None if the config sets no limit."""
    limit: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit


@dataclass(frozen=True)
class Masks:
    """Turns a bias that separates rows into a decoder's attention mask.

    A decoder uses a four-dimensional mask unchanged, so the mask must include its sliding window. Decoders with several
    kinds of layers take a mask for each kind.

    Attributes:
        window: Tokens in the window of layers that have one, including the token itself; None if no layer has one.
        kinds: Kinds of layers, if the config names them.
        by_bounds: Whether the layers attend by `stages.model.attention.attend`, and so take bounds of rows instead of a
            mask.
    """

    window: int | None
    kinds: tuple[str, ...]
    by_bounds: bool = False

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "Masks":
        """The masks for a decoder's config."""
        text = config.get_text_config()
        layers = DynamicCache(config=text).layers
        windows = {layer.sliding_window for layer in layers if isinstance(layer, DynamicSlidingWindowLayer)}
        by_bounds = text._attn_implementation == NAME
        return cls(int(windows.pop()) if windows else None, tuple(dict.fromkeys(_layer_types(text))), by_bounds)

    def of_rows(self, bounds_S: Tensor, lines: int, width: int) -> tuple[Any, Tensor]:
        """The decoder's attention mask for packed rows, and the positions [B, T] of their tokens in their rows.

        The mask is made on the device of the bounds. It is the bounds themselves where a kernel takes them: in bfloat16
        on a GPU, unless a window is narrower than the lines.

        Args:
            bounds_S: Indices (int32) into the flattened lines at which rows and fillings begin, and B * T.
            lines: B.
            width: T.
        """
        rows_BT, positions_BT = rows_of(bounds_S, lines, width)
        narrow = computes_in_bfloat16(bounds_S.device)
        if self.by_bounds and narrow and has_varlen(bounds_S.device) and (self.window is None or width <= self.window):
            mask = bounds_S[None, None, None]
            return (dict.fromkeys(self.kinds, mask) if self.window and self.kinds else mask), positions_BT
        return self(block_causal_bias(rows_BT, torch.bfloat16 if narrow else torch.float32)), positions_BT

    def __call__(self, bias_B1TL: Tensor | None) -> Tensor | Mapping[str, Tensor] | None:
        """The decoder's attention mask.

        Args:
            bias_B1TL: Added to the scores: 0 where a token may attend, the lowest number elsewhere. None if every line
                has one row: the decoder then makes its own masks.
        """
        if bias_B1TL is None or self.window is None:
            return bias_B1TL
        windowed_B1TL = _windowed(bias_B1TL, self.window)
        if not self.kinds:
            return windowed_B1TL
        return {kind: windowed_B1TL if kind == SLIDING else bias_B1TL for kind in self.kinds}


def _layer_types(text: PreTrainedConfig) -> list[str]:
    kinds: Any = getattr(text, "layer_types", None)
    return list(kinds or [])


def _windowed(bias_B1TL: Tensor, window: int) -> Tensor:
    """The bias with tokens outside of the window masked too; rows are contiguous, so distances are those of indices."""
    new, all_ = bias_B1TL.shape[-2:]
    if all_ <= window:
        return bias_B1TL
    index_L = torch.arange(all_, device=bias_B1TL.device)
    far_TL = index_L[None, :] <= index_L[all_ - new :, None] - window
    return bias_B1TL.masked_fill(far_TL, torch.finfo(bias_B1TL.dtype).min)
