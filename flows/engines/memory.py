"""Estimates the memory that a stage needs, before it is launched. Free of torch.

A stage has phases that follow each other, such as rollout and update; it needs what its largest phase does. The terms
are in `flows.engines.memory_terms`. The peak of an earlier stage with the same settings on the same kind of device is
shown beside the estimate. It refuses nothing, and a stage that it shows to fit is not refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from base.hashing import stable_hash
from base.store.checkpoint import Artifact, Store
from flows.engines import memory_terms as terms
from flows.engines.device_memory import Memory, available
from flows.engines.memory_terms import Trained, row_tokens
from flows.engines.shapes import Shape, full_checkpoint, origin, shape_of
from flows.plan.nodes import Node, StageGraph
from stages.config.chunks import CHUNK_BYTES, chunk_bytes
from stages.config.kinds import STAGES
from stages.config.on_policy import OnPolicyConfig
from stages.vllm.settings import cpu_cache_bytes, rows_at_a_time

# A process that has imported torch and transformers; on a device, its CUDA context.
PROCESS_BYTES, CONTEXT_BYTES = 450 * 2**20, 500 * 2**20
# API server, engine and worker of a vLLM server, without weights.
SERVER_BYTES = 2 * 2**30
ROOM = 0.9
SHOWN_BYTES = 2**24
IGNORE = "--ignore-memory runs it all the same"
# The settings that decide a stage's memory, beside its model, its processes and its device.
DECIDING = (
    "lora", "dtype", "sharding", "gradient_checkpointing", "micro_batch_tokens", "batch_tokens", "batch_size",
    "prompts_per_step", "group_size", "max_new_tokens", "max_prompt_tokens", "sampler", "samples", "monitor",
    "reference_kl", "max_resident", "teacher_cache", "teacher_backend", "objective",
)  # fmt: skip


@dataclass(frozen=True)
class Need:
    """The memory of one stage's process, in bytes.

    Attributes:
        node: Id of the stage's node.
        phases: Phase -> purpose -> bytes.
        measured: Peak of earlier stages with the same settings on the same kind of device; 0 if there was none.
    """

    node: str
    phases: Mapping[str, Mapping[str, int]]
    measured: int = 0

    @property
    def phase(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def parts(self) -> Mapping[str, int]:
        """The purposes of the largest phase, with their bytes."""
        return self.phases[self.phase]

    @property
    def total(self) -> int:
        """The sum of the largest phase."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {_gib(size)}" for name, size in self.parts.items() if size >= SHOWN_BYTES)
        measured = f"; measured earlier {_gib(self.measured)}" if self.measured else ""
        return f"{self.node}: about {_gib(self.total)} GiB in its {self.phase} ({parts}{measured})"


def needs(graph: StageGraph, store: Store, missing: Sequence[Node], memory: Memory | None = None) -> list[Need]:
    """The needs of the stages and measurements that are to run, largest first.

    Nodes whose model is unknown before its download, or that compute on the host tensor by tensor, are left out.

    Args:
        graph: The run.
        store: Has the models that are made, and the peaks of earlier stages.
        missing: The nodes that are to run.
        memory: What one process may use; `available` of the run's devices when absent.
    """
    memory = memory or available(graph.config.resources.gpus)
    peaks = _peaks(store)
    found = []
    for node in missing:
        kind = STAGES[node.stage]
        estimated = kind.trains or (kind.measures and kind.on_device)
        shape = shape_of(origin(graph, node), store) if estimated else Shape()
        if shape.parameters:
            phases = training_phases(graph, node, shape, memory) if kind.trains else _measurement(graph, node, shape)
            processes = int(node.ingredients.get("world_size", 1))
            key = _settings(node.stage, shape.parameters, node.config, processes, memory.kind)
            found.append(Need(node.id, phases, peaks.get(key, 0)))
    return sorted(found, key=lambda need: -need.total)


def fit(graph: StageGraph, store: Store, missing: Sequence[Node]) -> tuple[list[str], list[str]]:
    """Compare the needs with the memory of this machine or of one of its devices.

    Returns:
        Problems (a stage that cannot fit) and warnings (parallel stages that may not fit together, and measured peaks
        above the memory).
    """
    found = needs(graph, store, missing)
    resources = graph.config.resources
    memory = available(resources.gpus)
    if not found or not memory.total:
        return [], []
    have = f"{memory.place} has {memory.total / 2**30:.1f} GiB"
    large = [need for need in found if need.total > memory.total and not 0 < need.measured <= memory.total]
    problems = [f"{need}; {have}: {_advice(graph, need)}; {IGNORE}" for need in large]
    warnings = [
        f"{need.node}: a stage with these settings took {_gib(need.measured)} GiB; {have}: {_advice(graph, need)}"
        for need in found
        if need.measured > memory.total
    ]
    at_once = found[: resources.parallel_experts] if not resources.gpus else found[:1]
    together = sum(need.total for need in at_once)
    if not problems and together > ROOM * memory.total and len(at_once) > 1:
        warnings.append(
            f"{len(at_once)} stages side by side may need {together / 2**30:.1f} GiB of {memory.place}'s "
            f"{memory.total / 2**30:.1f}; lower resources.parallel_experts"
        )
    elif not problems and found[0].total > ROOM * memory.total:
        warnings.append(f"{found[0]}: nearly all of {memory.place}'s {memory.total / 2**30:.1f} GiB")
    elif not problems and found[0].total > memory.free:
        warnings.append(f"{found[0]}: more than the {memory.free / 2**30:.1f} GiB free now on {memory.place}")
    return problems, warnings


def trained(graph: StageGraph, node: Node, shape: Shape, memory: Memory) -> Trained:
    """What the terms of a training node depend on."""
    monitor, gpus = node.config.get("monitor"), graph.config.resources.gpus
    return Trained(
        shape,
        node.config,
        max(1, gpus),
        _teachers_here(graph, node),
        int(monitor["examples"]) * len(node.domains) if monitor else 0,
        chunk_bytes(memory.total) if gpus else CHUNK_BYTES,
        gpus > 0,
    )


def _process(graph: StageGraph) -> dict[str, int]:
    return {"CUDA context": CONTEXT_BYTES} if graph.config.resources.gpus else {"process": PROCESS_BYTES}


def training_phases(graph: StageGraph, node: Node, shape: Shape, memory: Memory) -> dict[str, dict[str, int]]:
    """The phases of a training stage."""
    stage = trained(graph, node, shape, memory)
    beside = _servers(graph, node, shape)
    taught = any(stage.teachers)
    kept = {**_process(graph), "weights": terms.weights(stage), "optimizer": terms.moments(stage)}
    update = {
        **kept,
        "teachers": terms.teachers(stage) if taught else 0,
        "gradients": terms.gradients(stage) + terms.buckets(stage),
        "head's gradient": terms.head_gradient(stage),
        "head in bfloat16": terms.head_factor(stage),
        "gathered weights": terms.gathered_for_update(stage),
        "bfloat16 copies": terms.narrow_copies(stage),
        "activations": terms.activations(stage),
        "logits": terms.logits(stage, taught),
        "teachers' states": terms.teacher_states(stage) if taught else 0,
    }
    if "prompts_per_step" not in node.config:
        return {"update": update}
    engine = _engine(node, shape, memory, bool(graph.config.resources.gpus))
    rollout = {
        **kept,
        "teachers": terms.teachers(stage),
        "gathered weights": terms.gathered_for_rollout(stage),
        **engine,
    }
    if node.config.get("sampler", {}).get("backend") not in ("vllm", "vllm_server"):
        prompts = -(-stage.rows // int(node.config["group_size"]))
        rollout |= _sampling(
            shape, stage.rows, prompts, row_tokens(node.config), narrow=stage.narrow, on_device=stage.on_device
        )
        rollout["head in bfloat16"] = terms.head_factor(stage)
    if not graph.config.resources.gpus:
        # Without a device the engine does not sleep during the update.
        update |= engine
    return {"rollout": rollout | beside, "update": update | beside}


def _measurement(graph: StageGraph, node: Node, shape: Shape) -> dict[str, dict[str, int]]:
    """The phases of an evaluation or of a shift. Both hold float32 models and sample with them."""
    config = node.config
    models = 2 if node.stage == "shift" else 1
    whole = {**_process(graph), "weights": models * shape.parameters * terms.FLOAT}
    rows = min(int(config["batch_size"]), int(config.get("examples", config["batch_size"])))
    how = {"narrow": config.get("dtype") == "bfloat16", "on_device": graph.config.resources.gpus > 0}
    found = {"greedy pass": whole | _sampling(shape, rows, 1, row_tokens(config), **how)}
    if group := int(config.get("samples") or 0):
        rows = min(max(group, int(config["batch_size"])), int(config["examples"]) * group)
        found["sampled pass"] = whole | _sampling(shape, rows, group, row_tokens(config), **how)
    if node.stage == "shift":
        run = min(terms.SHIFT_TOKENS, rows * row_tokens(config))
        states = 2 * run * shape.hidden * terms.FLOAT
        found["comparison"] = whole | {
            "activations": terms.forward(shape, run) + states,
            "logits": terms.TAUGHT_COPIES * CHUNK_BYTES,
        }
    return found


def _sampling(shape: Shape, rows: int, group: int, tokens: int, *, narrow: bool, on_device: bool) -> dict[str, int]:
    """The parts of the sampler in the stage's process, in its decoding or its prefill, whichever needs more."""
    prompts = -(-rows // group)
    decoding = {
        "sampler's cache": terms.cache(shape, rows, tokens, narrow),
        "decoding": terms.decoding(shape, rows, tokens, repeats=not narrow and not on_device),
    }
    # A group's rows share a prefill, after which the cache is repeated for them.
    prefill = {
        "sampler's cache": terms.cache(shape, prompts, tokens, narrow),
        "prefill": terms.prefill(shape, prompts, terms.PROMPT_TOKENS),
    }
    return max(decoding, prefill, key=lambda parts: sum(parts.values()))


def _engine(node: Node, shape: Shape, memory: Memory, on_device: bool) -> dict[str, int]:
    """vLLM in the trainer's process: its share of the device, or its weights and cache on a host."""
    sampler = node.config.get("sampler", {})
    if sampler.get("backend") != "vllm":
        return {}
    if on_device and memory.total:
        return {"vLLM (sampler.memory_share)": int(float(sampler["memory_share"]) * memory.total)}
    return {"vLLM's weights and cache": _served(node, shape, float(sampler["memory_share"]))}


def _served(node: Node, shape: Shape, share: float) -> int:
    """Weights and paged cache of a vLLM engine on a host, in the stage's number type."""
    config: OnPolicyConfig = STAGES[node.stage].config(**node.config)
    sizes = SimpleNamespace(
        num_hidden_layers=shape.layers, num_key_value_heads=shape.keys, head_dim=1, num_attention_heads=shape.keys,
        hidden_size=shape.hidden, max_position_embeddings=shape.context,
    )  # fmt: skip
    cache = cpu_cache_bytes(sizes, config.dtype, rows_at_a_time(config), config.max_new_tokens, share)
    return _model(node, shape) + cache


def _model(node: Node, shape: Shape) -> int:
    return shape.parameters * (terms.NARROW if node.config.get("dtype") == "bfloat16" else terms.FLOAT)


def _servers(graph: StageGraph, node: Node, shape: Shape) -> dict[str, int]:
    """vLLM servers that share this machine's memory with the stage; on devices they have some of their own."""
    config, resources = node.config, graph.config.resources
    if resources.gpus:
        return {}
    parts = {}
    rollouts, teachers = resources.rollout_servers, resources.teacher_servers
    if config.get("sampler", {}).get("backend") == "vllm_server" and not rollouts.urls:
        parts["rollout servers"] = rollouts.count * (SERVER_BYTES + _served(node, shape, rollouts.memory_share))
    if config.get("teacher_backend") == "vllm_server" and not teachers.urls:
        served = len({full_checkpoint(graph, teacher).key for teacher in _teachers(graph, node)})
        parts["teacher servers"] = served * (SERVER_BYTES + _served(node, shape, teachers.memory_share))
    return parts


def _teachers(graph: StageGraph, node: Node) -> list[Node]:
    """A merge's teachers, each once."""
    found = [graph.node(parent) for role, parent in node.parents.items() if role.startswith("teacher/")]
    return list({teacher.key: teacher for teacher in found}.values())


def _teachers_here(graph: StageGraph, node: Node) -> tuple[int, int]:
    """The full checkpoints that score in the stage's process and are in memory at one time, and further output heads.

    Adapters of one base share it; those of the student's own base share the student's, in a single process.
    """
    objective = node.config.get("objective") or {}
    here = _teachers(graph, node) if node.config.get("teacher_backend", "local") == "local" else []
    if node.config.get("reference_kl") or objective.get("reference_kl") or objective.get("extrapolation", 1.0) != 1.0:
        here.append(graph.node(node.parents["start"]))
    bases = {full_checkpoint(graph, teacher).key for teacher in here}
    if node.config.get("lora") and graph.config.resources.gpus <= 1:
        bases -= {full_checkpoint(graph, node).key}
    resident = min(len(bases), int(node.config.get("max_resident", 1)))
    return resident, len(bases) - resident


def _settings(stage: str, parameters: int, config: Mapping[str, Any], processes: int, kind: str) -> str:
    """A hash of what decides a stage's memory."""
    chosen = {name: config[name] for name in DECIDING if name in config}
    return stable_hash([stage, parameters, chosen, processes, kind])


def _peaks(store: Store) -> dict[str, int]:
    """Settings -> the largest peak measured with them."""
    artifacts = {artifact.key: artifact for artifact in store.artifacts()}
    peaks: dict[str, int] = {}
    for artifact in artifacts.values():
        manifest = artifact.manifest
        if not isinstance(manifest.get("config"), Mapping) or "device" not in manifest:
            continue
        processes = int((manifest.get("ingredients") or {}).get("world_size", 1))
        parameters = _full_size(artifact, artifacts)
        key = _settings(str(manifest.get("stage")), parameters, manifest["config"], processes, str(manifest["device"]))
        peaks[key] = max(peaks.get(key, 0), int(manifest.get("peak_memory") or 0))
    return peaks


def _full_size(artifact: Artifact, artifacts: Mapping[str, Artifact]) -> int:
    """Parameters of a checkpoint without its adapter; of a measurement, those of the checkpoint measured."""
    manifest = artifact.manifest
    parents = manifest.get("parents") or {}
    measured = artifacts.get((parents.get("checkpoint") or {}).get("key", ""))
    manifest = measured.manifest if measured else manifest
    base = artifacts.get(str(manifest.get("adapter_base") or ""))
    return int((base.manifest if base else manifest).get("parameters") or 0)


def _advice(graph: StageGraph, need: Need) -> str:
    node = graph.node(need.node)
    config = node.config
    if not STAGES[node.stage].trains:
        shift = ["set evaluate.shift: null"] if node.stage == "shift" else []
        return ", ".join(["lower evaluate.batch_size", *shift])
    advice = []
    if need.parts.get("teachers", 0) > need.total / 5:
        advice.append("lower max_resident")
    if not config.get("gradient_checkpointing"):
        advice.append("set gradient_checkpointing")
    if need.phase == "rollout":
        advice.append("lower prompts_per_step, group_size or max_new_tokens")
    else:
        advice.append("lower micro_batch_tokens")
    if config.get("lora") is None:
        advice.append("train adapters (lora)")
    if graph.config.resources.gpus > 1 and config.get("sharding") != "fsdp":
        advice.append("shard it (sharding: fsdp)")
    return ", ".join(advice)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"
