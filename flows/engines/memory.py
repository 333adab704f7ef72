"""Estimates the memory that a stage needs, before it is launched. Free of torch.

A stage has phases that follow each other, such as rollout and update; it needs what its largest phase does. The terms
are in `flows.engines.memory_terms`. The peak of an earlier stage with the same settings on the same kind of device is
shown beside the estimate. It refuses nothing, and a stage that it shows to fit is not refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from base.store.checkpoint import Store
from flows.engines import memory_terms as terms
from flows.engines.device_memory import Memory, available, gib
from flows.engines.memory_peaks import peaks_of, settings_of
from flows.engines.memory_terms import Trained, row_tokens
from flows.engines.server_memory import devices_of_each, engine_of, server_problems, teachers
from flows.engines.shapes import Shape, full_checkpoint, origin, shape_of
from flows.plan.nodes import Node, StageGraph
from stages.config.chunks import CHUNK_BYTES, chunk_bytes
from stages.config.kinds import STAGES
from stages.config.on_policy import OnPolicyConfig
from stages.vllm.settings import cpu_cache_bytes, rows_at_a_time

# A process that has imported torch and transformers; on a device, its CUDA context.
PROCESS_BYTES, CONTEXT_BYTES = 450 * 2**20, 500 * 2**20
# API server and engine of a vLLM server on a host, without weights.
SERVER_BYTES = 3 * 2**29
ROOM = 0.9
SHOWN_BYTES = 2**24
IGNORE = "--ignore-memory runs it all the same"


@dataclass(frozen=True)
class Need:
    """The memory of one stage's process, in bytes.

    Attributes:
        node: Id of the stage's node.
        phases: Phase -> purpose -> bytes.
        measured: Peak of earlier stages with the same settings on the same kind of device; 0 if there was none.
        offloaded: What all processes of a stage on devices keep in the host's memory.
    """

    node: str
    phases: Mapping[str, Mapping[str, int]]
    measured: int = 0
    offloaded: int = 0

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
        parts = ", ".join(f"{name} {gib(size)}" for name, size in self.parts.items() if size >= SHOWN_BYTES)
        measured = f"; measured earlier {gib(self.measured)}" if self.measured else ""
        host = f"; in the host's memory {gib(self.offloaded)}" if self.offloaded else ""
        return f"{self.node}: about {gib(self.total)} GiB in its {self.phase} ({parts}{measured}{host})"


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
    peaks = peaks_of(store)
    found = []
    for node in missing:
        kind = STAGES[node.stage]
        estimated = kind.trains or (kind.measures and kind.on_device)
        shape = shape_of(origin(graph, node), store) if estimated else Shape()
        if shape.parameters:
            offloaded = 0
            if kind.trains:
                stage = trained(graph, node, shape)
                phases, offloaded = training_phases(graph, node, stage, memory), terms.in_host_memory(stage)
            else:
                phases = _measurement(graph, node, shape, memory)
            processes = int(node.ingredients.get("world_size", 1))
            key = settings_of(node.stage, shape.parameters, node.config, processes, memory.kind)
            found.append(Need(node.id, phases, peaks.get(key, 0), offloaded))
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
    served = _misfitting_engines(graph, store, missing)
    if not found or not memory.total:
        return served, []
    have = f"{memory.place} has {memory.total / 2**30:.1f} GiB"
    large = [need for need in found if need.total > memory.total and not 0 < need.measured <= memory.total]
    problems = [f"{need}; {have}: {_advice(graph, need)}; {IGNORE}" for need in large]
    host = available(0)
    problems += [
        f"{need}; {host.place} has {host.total / 2**30:.1f} GiB: use more memory or train adapters (lora); {IGNORE}"
        for need in found
        if need.offloaded > host.total
    ]
    warnings = [
        f"{need.node}: a stage with these settings took {gib(need.measured)} GiB; {have}: {_advice(graph, need)}"
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
    return problems + served, warnings


def _misfitting_engines(graph: StageGraph, store: Store, missing: Sequence[Node]) -> list[str]:
    """The vLLM servers and engines that do not fit on their devices; a run on the CPU may have such servers too."""
    resources = graph.config.resources
    if not any(devices_of_each(each, resources) for each in (resources.rollout_servers, resources.teacher_servers)):
        return []
    memory = available(1)
    if not memory.total:
        return []
    return [f"{problem}; {IGNORE}" for problem in server_problems(graph, store, missing, memory)]


def trained(graph: StageGraph, node: Node, shape: Shape) -> Trained:
    """What the terms of a training node depend on, but for the chunks of its logits."""
    monitor, gpus = node.config.get("monitor"), graph.config.resources.gpus
    return Trained(
        shape,
        node.config,
        max(1, gpus),
        _teachers_here(graph, node),
        int(monitor["examples"]) * len(node.domains) if monitor else 0,
        on_device=gpus > 0,
    )


def _chunk(graph: StageGraph, memory: Memory, held: Mapping[str, int]) -> int:
    """Bytes of a chunk's logits: on a device they depend on what is free beside the tensors held at that time
    (`stages.losses.chunked.chunk_length`)."""
    return chunk_bytes(memory.total - sum(held.values())) if graph.config.resources.gpus else CHUNK_BYTES


def _process(graph: StageGraph) -> dict[str, int]:
    return {"CUDA context": CONTEXT_BYTES} if graph.config.resources.gpus else {"process": PROCESS_BYTES}


def training_phases(graph: StageGraph, node: Node, stage: Trained, memory: Memory) -> dict[str, dict[str, int]]:
    """The phases of a training stage."""
    shape = stage.shape
    beside = _servers(graph, node, shape)
    taught = any(stage.teachers)
    kept = {**_process(graph), "weights": terms.weights(stage), "optimizer": terms.moments(stage)}
    update = {
        **kept,
        "teachers": terms.teachers(stage) if taught else 0,
        "gradients": terms.gradients(stage) + terms.buckets(stage),
        "gathered weights": terms.gathered_for_update(stage),
        "bfloat16 copies": 0 if stage.recomputed else terms.narrow_copies(stage),
        "activations": terms.activations(stage),
        "teachers' states": terms.teacher_states(stage) if taught else 0,
    }
    stage = replace(stage, chunk_bytes=_chunk(graph, memory, update))
    update |= {
        "head's gradient": terms.head_gradient(stage),
        "head in bfloat16": terms.head_factor(stage),
        "bfloat16 copies": terms.narrow_copies(stage),
        "logits": terms.logits(stage, taught),
    }
    if "prompts_per_step" not in node.config:
        return {"update": update}
    engine = _engine(_on_policy(node), shape, memory, graph.config.resources.gpus > 0)
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


def _measurement(graph: StageGraph, node: Node, shape: Shape, memory: Memory) -> dict[str, dict[str, int]]:
    """The phases of an evaluation or of a shift, which hold models and sample with them."""
    config = node.config
    models = 2 if node.stage == "shift" else 1
    whole = {**_process(graph), "weights": models * terms.frozen(shape, config.get("dtype") == "bfloat16")}
    if config.get("backend") == "vllm":
        return {"sampling": whole | _engine(engine_of(graph, node), shape, memory, graph.config.resources.gpus > 0)}
    rows = min(int(config["batch_size"]), int(config.get("examples", config["batch_size"])))
    how = {"narrow": config.get("dtype") == "bfloat16", "on_device": graph.config.resources.gpus > 0}
    found = {"greedy pass": whole | _sampling(shape, rows, 1, row_tokens(config), **how)}
    if group := int(config.get("samples") or 0):
        rows = min(max(group, int(config["batch_size"])), int(config["examples"]) * group)
        found["sampled pass"] = whole | _sampling(shape, rows, group, row_tokens(config), **how)
    if node.stage == "shift":
        run = min(terms.SHIFT_TOKENS, rows * row_tokens(config))
        held = whole | {"hidden states": 2 * run * shape.hidden * terms.FLOAT}
        logits = min(_chunk(graph, memory, held), run * shape.vocabulary * terms.FLOAT)
        found["hidden states"] = held | {"activations": terms.forward(shape, run)}
        found["comparison"] = held | {"logits": terms.SHIFT_COPIES * logits}
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


def _on_policy(node: Node) -> OnPolicyConfig:
    config: OnPolicyConfig = STAGES[node.stage].config(**node.config)
    return config


def _engine(config: OnPolicyConfig, shape: Shape, memory: Memory, on_device: bool) -> dict[str, int]:
    """vLLM in the stage's process: its share of the device, or its weights and cache on a host."""
    if config.sampler.backend != "vllm":
        return {}
    share = config.sampler.memory_share
    if on_device and memory.total:
        return {"vLLM's share of the device": int(share * memory.total)}
    return {"vLLM's weights and cache": _served(config, shape, share)}


def _served(config: OnPolicyConfig, shape: Shape, share: float) -> int:
    """Weights and paged cache of a vLLM engine on a host, in the stage's number type."""
    sizes = SimpleNamespace(
        num_hidden_layers=shape.layers, num_key_value_heads=shape.keys, head_dim=1, num_attention_heads=shape.keys,
        hidden_size=shape.hidden, max_position_embeddings=shape.context,
    )  # fmt: skip
    cache = cpu_cache_bytes(sizes, config.dtype, rows_at_a_time(config), config.max_new_tokens, share)
    return shape.parameters * (terms.NARROW if config.dtype == "bfloat16" else terms.FLOAT) + cache


def _servers(graph: StageGraph, node: Node, shape: Shape) -> dict[str, int]:
    """vLLM servers that share this machine's memory with the stage; on devices they have some of their own."""
    config, resources = node.config, graph.config.resources
    if resources.gpus:
        return {}
    parts = {}
    rollouts, taught = resources.rollout_servers, resources.teacher_servers
    if config.get("sampler", {}).get("backend") == "vllm_server" and not rollouts.urls:
        parts["rollout servers"] = rollouts.count * (
            SERVER_BYTES + _served(_on_policy(node), shape, rollouts.memory_share)
        )
    if config.get("teacher_backend") == "vllm_server" and not taught.urls:
        served = len({full_checkpoint(graph, teacher).key for teacher in teachers(graph, node)})
        scored = terms.scored_logits(shape, row_tokens(config))
        parts["teacher servers"] = served * (
            SERVER_BYTES + _served(_on_policy(node), shape, taught.memory_share) + scored
        )
    return parts


def _teachers_here(graph: StageGraph, node: Node) -> tuple[int, int]:
    """The full checkpoints that score in the stage's process and are in memory at one time, and further output heads.

    Adapters of one base share it; those of the student's own base share the student's, in a single process.
    """
    objective = node.config.get("objective") or {}
    here = teachers(graph, node) if node.config.get("teacher_backend", "local") == "local" else []
    if node.config.get("reference_kl") or objective.get("reference_kl") or objective.get("extrapolation", 1.0) != 1.0:
        here.append(graph.node(node.parents["start"]))
    bases = {full_checkpoint(graph, teacher).key for teacher in here}
    if node.config.get("lora") and graph.config.resources.gpus <= 1:
        bases -= {full_checkpoint(graph, node).key}
    resident = min(len(bases), int(node.config.get("max_resident", 1)))
    return resident, len(bases) - resident


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
    return ", ".join([*advice, *_smaller_state(config, graph.config.resources.gpus)])


def _smaller_state(config: Mapping[str, Any], gpus: int) -> list[str]:
    """Settings with which a device holds less of the weights and of the optimizer's state."""
    optimizer = config.get("optimizer") or {}
    if config.get("sharding") == "fsdp":
        return [] if config.get("cpu_offload") else ["keep its shards in the host's memory (cpu_offload: true)"]
    found = ["shard it (sharding: fsdp)"] if gpus > 1 else []
    if config.get("lora") is None and optimizer.get("states") != "8bit":
        found.append("keep AdamW's moments in 8 bits (optimizer: {states: 8bit})")
    elif config.get("lora") is None and gpus and not optimizer.get("paged"):
        found.append("let AdamW's moments move to the host (optimizer: {states: 8bit, paged: true})")
    return found
