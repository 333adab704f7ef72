"""Sizes of a run's models, read from the store, a folder, the Hub's cache or settings. Free of torch."""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from base.errors import UserError, first_line
from base.store.checkpoint import Store
from base.store.foreign import shapes
from flows.plan.nodes import Node, StageGraph

CONFIG = "config.json"
# Families whose queries and keys are normed before they are rotated.
_NORMED_HEADS = ("qwen3", "gemma3", "olmo2", "olmo3")


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that determine its memory; zeros where they are unknown before it is loaded.

    Attributes:
        parameters: Number of parameters; a tied matrix counts once.
        hidden: Width of the residual stream.
        layers: Decoder layers.
        vocabulary: Rows of the embedding.
        queries: Attention heads x head size.
        keys: Key-value heads x head size.
        inner: Width of the feed-forward layer.
        tied: Whether embedding and output head are one matrix.
        normed_heads: Whether queries and keys are normed.
        context: Longest row; 0 without a limit.
    """

    parameters: int = 0
    hidden: int = 0
    layers: int = 0
    vocabulary: int = 0
    queries: int = 0
    keys: int = 0
    inner: int = 0
    tied: bool = False
    normed_heads: bool = False
    context: int = 0

    @property
    def embedding(self) -> int:
        """Values of the embedding, which are as many as the output head's."""
        return self.vocabulary * self.hidden

    @property
    def linear(self) -> int:
        """Parameters of the decoder's layers: all without the embedding and the output head."""
        return max(0, self.parameters - self.embedding * (1 if self.tied else 2))


def origin(graph: StageGraph, node: Node) -> Node:
    """The node from which this one has its model and tokenizer, found by following `start` and `checkpoint`."""
    while parent := node.parents.get("start") or node.parents.get("checkpoint"):
        node = graph.node(parent)
    return node


def full_checkpoint(graph: StageGraph, node: Node) -> Node:
    """The node of the full weights of a checkpoint: its own, or those below its adapter."""
    while node.config.get("lora") and "start" in node.parents:
        node = graph.node(node.parents["start"])
    return node


def shape_of(node: Node, store: Store) -> Shape:
    """The shape of an `origin` node's model, from the store, the model's folder, the Hub's cache or its settings."""
    artifact = store.find(node.key)
    if artifact is not None:
        config = _read(artifact.path / CONFIG) if store.is_here(artifact) else {}
        return shape_of_config(config, int(artifact.manifest.get("parameters", 0)))
    if node.stage == "pretrain":
        model = node.config["model"]
        width, inner, layers = model["hidden_size"], model["intermediate_size"], model["layers"]
        layer = 4 * width**2 + 3 * width * inner
        return Shape(layers * layer, width, layers, queries=width, keys=width, inner=inner, context=model["max_length"])
    place = Path(str(node.config.get("location", "")))
    kind = node.config.get("kind")
    if kind == "gguf":
        return _gguf_shape(place, place.stat().st_mtime_ns if place.exists() else 0)
    if kind == "directory":
        return shape_of_config(_read(place / CONFIG), _parameters(place))
    return shape_of_config(_of_hub(str(place), node.config.get("revision")), 0) if kind == "hub" else Shape()


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a `config.json` that describes the language model; models of text and images nest it."""
    nested: Mapping[str, Any] = config.get("text_config") or config
    return nested


def shape_of_config(config: Mapping[str, Any], parameters: int) -> Shape:
    """The shape that a `config.json` describes.

    Args:
        config: Its contents; empty if it is not at hand.
        parameters: Number of parameters, counted in the weights; 0 computes it from the sizes of a decoder with a
            gated feed-forward layer.
    """
    text = text_config(config)

    def size(*names: str) -> int:
        return next((int(text[name]) for name in names if text.get(name)), 0)

    hidden, layers = size("hidden_size", "n_embd", "d_model"), size("num_hidden_layers", "n_layer")
    if not hidden:
        return Shape(parameters)
    heads = size("num_attention_heads", "n_head") or 1
    width = size("head_dim") or hidden // heads
    queries, keys = heads * width, (size("num_key_value_heads") or heads) * width
    inner = size("intermediate_size", "n_inner") or 4 * hidden
    vocabulary = size("vocab_size")
    # The default of transformers' configs.
    tied = bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", True)))
    return Shape(
        parameters=parameters or _counted(text, hidden, layers, vocabulary, queries, keys, inner, tied),
        hidden=hidden,
        layers=layers,
        vocabulary=vocabulary,
        queries=queries,
        keys=keys,
        inner=inner,
        tied=tied,
        normed_heads=str(text.get("model_type", "")).startswith(_NORMED_HEADS),
        context=size("max_position_embeddings", "n_positions"),
    )


def _counted(
    text: Mapping[str, Any], hidden: int, layers: int, vocabulary: int, queries: int, keys: int, inner: int, tied: bool
) -> int:
    """Parameters of a decoder; of a mixture of experts all experts."""
    experts = int(text.get("num_experts") or text.get("num_local_experts") or 0)
    inner = experts * int(text.get("moe_intermediate_size") or inner) if experts else inner
    layer = hidden * (2 * queries + 2 * keys + 3 * inner + experts + 2)
    return vocabulary * hidden * (1 if tied else 2) + layers * layer + hidden


@functools.cache
def _gguf_shape(file: Path, changed: int) -> Shape:
    """The shape of a GGUF file's model; every node of a run asks for it, and to read a vocabulary takes seconds."""
    del changed
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
        kind = reader.fields["general.architecture"].contents()

        def value(name: str) -> int:
            field = reader.fields.get(f"{kind}.{name}")
            return int(field.contents()) if field else 0

        hidden, heads = value("embedding_length"), value("attention.head_count") or 1
        width = value("attention.key_length") or hidden // heads
        names = {tensor.name for tensor in reader.tensors}
        rows = next((int(t.shape[-1]) for t in reader.tensors if t.name == "token_embd.weight"), 0)
        return Shape(
            parameters=sum(int(tensor.n_elements) for tensor in reader.tensors),
            hidden=hidden,
            layers=value("block_count"),
            vocabulary=value("vocab_size") or rows,
            queries=heads * width,
            keys=(value("attention.head_count_kv") or heads) * width,
            inner=value("feed_forward_length") or 4 * hidden,
            tied="output.weight" not in names,
            normed_heads=any(name.endswith("attn_q_norm.weight") for name in names),
            context=value("context_length"),
        )
    except (ValueError, LookupError, TypeError, ArithmeticError, AttributeError) as error:
        raise UserError(f"base.gguf: {file}: not readable as a GGUF file: {first_line(error)}") from error


def _parameters(folder: Path) -> int:
    return sum(prod(shape) for path in folder.glob("*.safetensors") for shape in shapes(path))


def _of_hub(repository: str, revision: str | None) -> dict[str, Any]:
    """The config in the Hub's cache, where the check of architectures leaves it; empty without one."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, CONFIG, revision=revision)
    return _read(Path(found)) if isinstance(found, str) else {}


def _read(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return loaded
