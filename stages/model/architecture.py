"""What an architecture does beside full causal attention and a linear head, read from its config.

Models of text and images keep it in a nested config, so every function takes the whole config and reads the text's.

Shape suffixes: B lines of a batch, T new tokens, L tokens they may look at, the new ones last.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

SLIDING = "sliding_attention"
# Logits are capped by a hyperbolic tangent: no linear head gives them.
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logits_soft_cap")


def unsupported(config: PreTrainedConfig) -> str | None:
    """Why checkpoints of an architecture cannot be used, as the end of a sentence; None if they can.

    Rows share lines and a cache, so each layer must be attention whose mask keeps them apart.
    """
    text = config.get_text_config()
    if getattr(text, "is_encoder_decoder", False):
        return "is an encoder and a decoder, and stages train decoders alone"
    if text.model_type == "bloom" or getattr(text, "alibi", False):
        return "counts positions in a mask of whole lines (ALiBi), which the mask of packed rows takes the place of"
    for layer in DynamicCache(config=text).layers:
        # Not by isinstance: layers of attention and a state are a subclass.
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            return (
                "has layers with a recurrent state, which would run from row to row of a packed batch; models of "
                "attention alone are supported"
            )
    if "chunked_attention" in _layer_types(text):
        return "attends in chunks, which packed rows do not keep; full and sliding-window attention are supported"
    for name in _CAPS:
        if getattr(text, name, None) is not None:
            return f"caps its logits ({name}), and losses read them as a linear head gives them"
    return None


def logit_scale(config: PreTrainedConfig) -> float:
    """What logits are multiplied by behind the head: Cohere's `logit_scale`, Granite's `logits_scaling` inverted."""
    text = config.get_text_config()
    scale = getattr(text, "logit_scale", None)
    if scale is not None:
        return float(scale)
    divisor = getattr(text, "logits_scaling", None)
    return 1.0 if divisor is None else 1.0 / float(divisor)


def context(config: PreTrainedConfig) -> int | None:
    """Most tokens a row may have; None where the config sets no limit."""
    limit: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit


@dataclass(frozen=True)
class Masks:
    """The mask that a decoder takes for a bias that keeps rows apart.

    A decoder uses a mask of four dimensions as it is, so its sliding window has to be in it. Decoders with layers of
    several kinds take a mask for each kind.

    Attributes:
        window: Tokens that the layers with a window look at, themselves included; None if no layer has one.
        kinds: Kinds of layers, where the config names them.
    """

    window: int | None
    kinds: tuple[str, ...]

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "Masks":
        """Those of a decoder's config."""
        text = config.get_text_config()
        layers = DynamicCache(config=text).layers
        windows = {layer.sliding_window for layer in layers if isinstance(layer, DynamicSlidingWindowLayer)}
        return cls(int(windows.pop()) if windows else None, tuple(dict.fromkeys(_layer_types(text))))

    def __call__(self, bias_B1TL: Tensor | None) -> Tensor | Mapping[str, Tensor] | None:
        """What the decoder takes as its attention mask.

        Args:
            bias_B1TL: Added to the scores: 0 where a token may look, the lowest number elsewhere. None for rows that
                are alone in their lines: the decoder makes its own masks.
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
    """The bias with what lies a window and more behind hidden: rows lie in one piece, so places count as positions."""
    new, all_ = bias_B1TL.shape[-2:]
    if all_ <= window:
        return bias_B1TL
    places_L = torch.arange(all_, device=bias_B1TL.device)
    far_TL = places_L[None, :] <= places_L[all_ - new :, None] - window
    return bias_B1TL.masked_fill(far_TL, torch.finfo(bias_B1TL.dtype).min)
