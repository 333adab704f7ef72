"""Estimates the memory that a stage needs, before it is launched. Free of torch.

Weights, gradients and both moments of Adam are float32, as trained here; frozen parts have weights only. Activations
are those of one forward and backward pass of `micro_batch_tokens`, about `34 H` bytes a token and layer without
attention's squares (Korthikanti et al. 2022, arXiv:2205.05198, eq. 1, at 2 bytes a value, so 17 values here); with
`gradient_checkpointing` only a layer's input is kept. The sampler's cache has keys and values of every token drawn at
one time. The measured peak of an earlier stage of the same size is more reliable than the formula and is used where
it is larger.
"""

import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import psutil

from base.errors import UserError, first_line
from base.store.checkpoint import Store
from base.store.foreign import shapes
from flows.engines.devices import host_devices
from flows.plan.nodes import Node, StageGraph
from stages.config.kinds import STAGES

BYTES = 4
# A process that has imported torch and transformers.
PROCESS_BYTES = 450 * 2**20
# API server, engine and worker of a vLLM server, without weights.
SERVER_BYTES = 2 * 2**30
ACTIVATIONS_PER_HIDDEN = 17
# The logits of a chunk, their log-probabilities and their gradient.
LOGIT_COPIES, CHUNK_TOKENS = 3, 1024
# Assumed tokens of an SFT row and of a prompt, for a stage whose batch is smaller than a micro-batch.
ROW_TOKENS, PROMPT_TOKENS = 1024, 512
ROOM = 0.9
SHOWN_BYTES = 2**24
NARROW_SHARE = 0.6


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that determine its memory; zeros where they are unknown before it is loaded."""

    parameters: int = 0
    hidden: int = 0
    layers: int = 0
    vocabulary: int = 0


@dataclass(frozen=True)
class Need:
    """The memory of one stage's process, in bytes.

    Attributes:
        node: Id of the stage's node.
        parts: Purpose -> bytes.
        measured: Peak of an earlier stage of this kind on a model of this size; 0 if there was none.
    """

    node: str
    parts: Mapping[str, int]
    measured: int = 0

    @property
    def total(self) -> int:
        """The sum of the parts, or the measured peak if that is larger."""
        return max(sum(self.parts.values()), self.measured)

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in self.parts.items() if size >= SHOWN_BYTES)
        measured = f"; measured earlier {self.measured / 2**30:.2f}" if self.measured else ""
        return f"{self.node}: about {self.total / 2**30:.2f} GiB ({parts}{measured})"


def needs(graph: StageGraph, store: Store, missing: Sequence[Node]) -> list[Need]:
    """The needs of the stages that are to run, largest first.

    Stages whose model is unknown before its download are left out.
    """
    peaks = _peaks(store)
    found = []
    for node in missing:
        if not STAGES[node.stage].trains:
            continue
        shape = shape_of(origin(graph, node), store)
        if shape.parameters:
            parts = _parts(graph, node, shape)
            found.append(Need(node.id, parts, peaks.get((node.stage, shape.parameters), 0)))
    return sorted(found, key=lambda need: -need.total)


def fit(graph: StageGraph, store: Store, missing: Sequence[Node]) -> tuple[list[str], list[str]]:
    """Compare the needs with the memory of this machine or its GPUs.

    Returns:
        Problems (a stage that cannot fit) and warnings (parallel stages that may not fit together).
    """
    found = needs(graph, store, missing)
    resources = graph.config.resources
    have, free, place = _memory(resources.gpus)
    if not found or not have:
        return [], []
    problems = [
        f"{need}; {place} has {have / 2**30:.1f} GiB: {_advice(graph, need)}" for need in found if need.total > have
    ]
    at_once = found[: resources.parallel_experts] if not resources.gpus else found[:1]
    together = sum(need.total for need in at_once)
    warnings = []
    if not problems and together > ROOM * have and len(at_once) > 1:
        warnings.append(
            f"{len(at_once)} stages side by side may need {together / 2**30:.1f} GiB of {place}'s {have / 2**30:.1f}; "
            f"lower resources.parallel_experts"
        )
    elif not problems and found[0].total > ROOM * have:
        warnings.append(f"{found[0]}: nearly all of {place}'s {have / 2**30:.1f} GiB")
    elif not problems and found[0].total > free:
        warnings.append(f"{found[0]}: more than the {free / 2**30:.1f} GiB free now on {place}")
    return problems, warnings


def _parts(graph: StageGraph, node: Node, shape: Shape) -> dict[str, int]:
    config, resources = node.config, graph.config.resources
    lora = config.get("lora")
    shards = max(1, resources.gpus) if config.get("sharding") == "fsdp" else 1
    trained = _adapter_parameters(shape, int(lora["rank"])) if lora else shape.parameters
    weights = shape.parameters * BYTES + (trained * BYTES if lora else 0)
    per_token = ACTIVATIONS_PER_HIDDEN * shape.hidden * shape.layers * BYTES
    if config.get("gradient_checkpointing"):
        per_token = (ACTIVATIONS_PER_HIDDEN + shape.layers) * shape.hidden * BYTES
    if config.get("dtype") == "bfloat16":
        per_token = int(per_token * NARROW_SHARE)
    tokens = min(int(config.get("micro_batch_tokens", 0)), _step_tokens(config))
    parts = {
        "process": PROCESS_BYTES,
        "weights": weights // shards,
        "gradients and optimizer": 3 * trained * BYTES // shards,
        "activations": tokens * per_token,
        "logits": LOGIT_COPIES * CHUNK_TOKENS * shape.vocabulary * BYTES,
    }
    if node.stage == "distill" and config.get("teacher_backend", "local") == "local":
        teachers = min(len(_teachers(graph, node)), int(config.get("max_resident", 1)))
        parts["teachers"] = teachers * shape.parameters * BYTES
    if "prompts_per_step" in config:
        parts |= _sampling(graph, node, shape)
    return parts


def _sampling(graph: StageGraph, node: Node, shape: Shape) -> dict[str, int]:
    """Memory of the sampler, and of vLLM servers that share this machine's memory with the stage."""
    config, resources = node.config, graph.config.resources
    rows = int(config["prompts_per_step"]) * int(config["group_size"])
    cache = 2 * rows * int(config["max_new_tokens"]) * shape.layers * shape.hidden * BYTES
    backend = config.get("sampler", {}).get("backend")
    if backend not in ("vllm", "vllm_server"):
        parts = {"sampler's cache": cache}
    elif backend == "vllm":
        # The engine's own copy of the weights. It is counted even though the engine drops them while it sleeps.
        parts = {"vLLM's weights and cache": shape.parameters * BYTES + cache}
    else:
        parts = {}
    if resources.gpus:
        return parts
    server = SERVER_BYTES + shape.parameters * BYTES
    if backend == "vllm_server" and not resources.rollout_servers.urls:
        parts["rollout servers"] = resources.rollout_servers.count * (server + cache)
    if config.get("teacher_backend") == "vllm_server" and not resources.teacher_servers.urls:
        # An upper bound: one server for each full teacher, but adapters of one base share a server.
        parts["teacher servers"] = len(_teachers(graph, node)) * server
    return parts


def _teachers(graph: StageGraph, node: Node) -> set[str]:
    """Content keys of a merge's teachers."""
    return {graph.node(parent).key for role, parent in node.parents.items() if role.startswith("teacher/")}


def _step_tokens(config: Mapping[str, Any]) -> int:
    """Tokens of one step, from the settings. Lengths of prompts and rows are not among them and are assumed."""
    if "batch_tokens" in config:
        return int(config["batch_tokens"])
    if "batch_size" in config:
        return int(config["batch_size"]) * ROW_TOKENS
    rows = int(config.get("prompts_per_step", 0)) * int(config.get("group_size", 1))
    return rows * (PROMPT_TOKENS + int(config.get("max_new_tokens", 0)))


def _adapter_parameters(shape: Shape, rank: int) -> int:
    """Parameters of adapters on all linear layers: seven a layer, two of which are wider than the others."""
    return shape.layers * rank * 2 * shape.hidden * 10


def origin(graph: StageGraph, node: Node) -> Node:
    """The node from which this one has its model and tokenizer, found by following `start` and `checkpoint`."""
    while parent := node.parents.get("start") or node.parents.get("checkpoint"):
        node = graph.node(parent)
    return node


def shape_of(node: Node, store: Store) -> Shape:
    """The shape of the model of an `origin` node, from the store, the model's folder or its settings."""
    artifact = store.find(node.key)
    if artifact is not None:
        config = _read(artifact.path / "config.json") if store.is_here(artifact) else {}
        return _shape(config, int(artifact.manifest.get("parameters", 0)))
    if node.stage == "pretrain":
        model = node.config["model"]
        layer = 4 * model["hidden_size"] ** 2 + 3 * model["hidden_size"] * model["intermediate_size"]
        return Shape(model["layers"] * layer, model["hidden_size"], model["layers"])
    place = Path(str(node.config.get("location", "")))
    if node.config.get("kind") == "gguf":
        return _gguf_shape(place)
    if node.config.get("kind") == "directory":
        return _shape(_read(place / "config.json"), _parameters(place))
    return Shape()


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a `config.json` that describes the language model; models of text and images nest it."""
    nested: Mapping[str, Any] = config.get("text_config") or config
    return nested


def _shape(config: Mapping[str, Any], parameters: int) -> Shape:
    names = ("hidden_size", "num_hidden_layers", "vocab_size")
    text = text_config(config)
    return Shape(parameters, *(int(text.get(name) or 0) for name in names))


def _gguf_shape(file: Path) -> Shape:
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
        kind = reader.fields["general.architecture"].contents()
        sizes = [reader.fields.get(f"{kind}.{name}") for name in ("embedding_length", "block_count", "vocab_size")]
        parameters = sum(int(tensor.n_elements) for tensor in reader.tensors)
        return Shape(parameters, *(int(size.contents()) if size else 0 for size in sizes))
    except (ValueError, LookupError, TypeError, ArithmeticError, AttributeError) as error:
        raise UserError(f"base.gguf: {file}: not readable as a GGUF file: {first_line(error)}") from error


def _parameters(folder: Path) -> int:
    return sum(prod(shape) for path in folder.glob("*.safetensors") for shape in shapes(path))


def _read(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return loaded


def _peaks(store: Store) -> dict[tuple[str, int], int]:
    """(stage, parameters) -> the largest peak measured."""
    peaks: dict[tuple[str, int], int] = {}
    for artifact in store.artifacts():
        manifest = artifact.manifest
        kind = str(manifest.get("stage")), int(manifest.get("parameters", 0))
        peaks[kind] = max(peaks.get(kind, 0), int(manifest.get("peak_memory") or 0))
    return peaks


def _memory(gpus: int) -> tuple[int, int, str]:
    """The memory one stage may use, the part of it that is free now, and its owner for a message; 0 if unknown.

    All of a device counts as free: it is leased to one stage at a time, so its present use does not matter.
    """
    if not gpus:
        memory = psutil.virtual_memory()
        return memory.total, memory.available, "this machine"
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        printed = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return 0, 0, ""
    sizes = [int(size) * 2**20 for size in printed if size.isdigit()]
    return (min(sizes), min(sizes), "a GPU") if sizes and host_devices() else (0, 0, "")


def _advice(graph: StageGraph, need: Need) -> str:
    config = graph.node(need.node).config
    advice = []
    if need.parts.get("teachers", 0) > sum(need.parts.values()) / 5:
        advice.append("lower max_resident")
    if not config.get("gradient_checkpointing"):
        advice.append("set gradient_checkpointing")
    advice.append("lower micro_batch_tokens")
    if config.get("lora") is None:
        advice.append("train adapters (lora)")
    if graph.config.resources.gpus > 1 and config.get("sharding") != "fsdp":
        advice.append("shard it (sharding: fsdp)")
    return ", ".join(advice)
