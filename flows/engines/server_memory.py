"""The devices and memory of vLLM servers: what each needs, and how teachers' servers share devices. Free of torch.

A server takes a share of its devices' memory (`--gpu-memory-utilization`), which must be free when it starts: weights
and the tensors of a forward pass, and a cache that fills the rest. The share leaves out the CUDA context and the logits
of a row that is scored, which vLLM makes after it has measured its memory. So servers that share devices start one
after another (`flows.engines.vllm_servers`), and their shares leave room for what is outside of them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import ceil, floor

from base.store.checkpoint import Store
from flows.engines import memory_terms as terms
from flows.engines.device_memory import Memory, gib
from flows.engines.devices import host_devices
from flows.engines.shapes import Shape, full_checkpoint, origin, shape_of
from flows.plan.nodes import Node, StageGraph
from flows.run_file.resources import ResourcesConfig, ServersConfig, TeacherServersConfig
from stages.config.evaluation import EvaluationConfig
from stages.config.kinds import STAGES
from stages.config.on_policy import OnPolicyConfig, SamplerConfig
from stages.config.roles import is_teacher
from stages.config.training import LoraConfig
from stages.vllm.settings import SCORED_TOKENS, lora_rank, needed_context, rows_at_a_time

# A server's CUDA context. Its CUDA graphs, of which vLLM keeps an estimate within its share; both are assumed.
CONTEXT_BYTES, GRAPH_BYTES = 500 * 2**20, 2**30
# Tokens of one forward pass of a server that samples: vLLM's default on large devices.
PASS_TOKENS = 8192
# Digits of a share.
DIGITS = 4
# Prefix of the roles of a merge's teachers among its parents.


@dataclass(frozen=True)
class Served:
    """A full checkpoint with the adapters of it on one server.

    Attributes:
        name: The checkpoints, for messages.
        shape: The model.
        config: The stage's: number type and lengths.
        ranks: The adapters' ranks.
        devices: Devices that share the model (tensor parallelism).
        scores: Whether it scores rows, as teachers do.
        processes: Engines that draw a step's rows, each its part of them.
    """

    name: str
    shape: Shape
    config: OnPolicyConfig
    ranks: Sequence[int] = ()
    devices: int = 1
    scores: bool = False
    processes: int = 1

    @property
    def weights(self) -> int:
        """Bytes of weights on each device; adapters have slots of one rank, and one slot more than adapters."""
        slots = len(self.ranks) + 1 if self.ranks else 0
        rank = lora_rank(LoraConfig(rank=max(self.ranks))) if self.ranks else 0
        values = self.shape.parameters + slots * terms.adapter_parameters(self.shape, rank)
        return values * self._bytes // self.devices

    @property
    def token(self) -> int:
        """Bytes of one token's keys and values on each device."""
        return self.shape.layers * 2 * self.shape.keys * self._bytes // self.devices

    @property
    def row(self) -> int:
        """Bytes of the longest row's keys and values, the least cache with which a server starts."""
        limit = self.shape.context or None
        context = needed_context(limit, self.config.max_prompt_tokens, self.config.max_new_tokens)
        return self.token * (context or 0)

    @property
    def least(self) -> int:
        """Bytes of the smallest share of a device with which the server starts."""
        sampled = rows_at_a_time(self.config, self.processes) * self.shape.vocabulary * terms.FLOAT * terms.DRAWN_COPIES
        tokens = SCORED_TOKENS if self.scores else PASS_TOKENS
        passed = terms.forward(self.shape, tokens) * self._bytes // terms.FLOAT
        return self.weights + self.row + GRAPH_BYTES + (sampled + passed) // self.devices

    @property
    def outside(self) -> int:
        """Bytes of a device outside of the share."""
        scored = terms.scored_logits(self.shape, SCORED_TOKENS) // self.devices if self.scores else 0
        return CONTEXT_BYTES + scored

    @property
    def _bytes(self) -> int:
        return terms.NARROW if self.config.dtype == "bfloat16" else terms.FLOAT


def devices_of_each(settings: ServersConfig, resources: ResourcesConfig) -> int:
    """The number of devices of each server; 0 is the CPU."""
    return min(1, resources.gpus) if settings.gpus is None else settings.gpus


def devices_beside(resources: ResourcesConfig, config: OnPolicyConfig) -> int:
    """The devices of a merge and of the rollout servers that are started for it."""
    rollouts = resources.rollout_servers
    started = config.sampler.backend == "vllm_server" and not rollouts.urls
    return resources.gpus + (rollouts.count * devices_of_each(rollouts, resources) if started else 0)


def places(servers: int, settings: TeacherServersConfig, gpus: int, beside: int) -> int:
    """The number of places, each of `gpus` devices, on which teachers' servers run.

    Without `per_device` it is one for each server, or as many as this machine has beside the stage if those are fewer.

    Args:
        servers: Number of servers.
        settings: Of the run file.
        gpus: Devices of each server, 1 or more.
        beside: Devices of the stage and its rollout servers.
    """
    if settings.per_device is not None:
        return ceil(servers / settings.per_device)
    return min(servers, max(1, (len(host_devices()) - beside) // gpus))


def pack(sizes: Sequence[int], count: int, most: int | None = None) -> list[int]:
    """Spread servers over places: the largest first, each to the place that has least so far.

    Args:
        sizes: Bytes of each server.
        count: Number of places.
        most: Largest number of servers of one place.

    Returns:
        The place of each server.
    """
    filled, members, found = [0] * count, [0] * count, [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda each: -sizes[each]):
        free = [place for place in range(count) if most is None or members[place] < most]
        found[index] = place = min(free, key=lambda each: (filled[each], members[each]))
        filled[place] += sizes[index]
        members[place] += 1
    return found


def memory_shares(servers: Sequence[Served], settings: ServersConfig, total: int) -> list[float]:
    """The shares of a device's memory of the servers that run on it; together at most `memory_share`.

    Each gets the least it starts with; what is left is divided so that each has room for as many tokens more.

    Args:
        servers: In the order of their start.
        settings: Of the run file.
        total: Bytes of the device; 0 if they are unknown, which divides `memory_share` by the servers' least needs.
    """
    least = [max(1, server.least) for server in servers]
    budget = room(servers, settings.memory_share, total) if total else 0
    if len(servers) == 1:
        return [settings.memory_share if budget >= floor(settings.memory_share * total) else _rounded(budget / total)]
    if (left := budget - sum(least)) < 0:
        return [_rounded(settings.memory_share * each / sum(least)) for each in least]
    tokens = [max(1, server.token) for server in servers]
    return [_rounded((own + left * t / sum(tokens)) / total) for own, t in zip(least, tokens, strict=True)]


def room(servers: Sequence[Served], memory_share: float, total: int) -> int:
    """Bytes of a device that all servers on it may take together."""
    return min(floor(memory_share * total), total - sum(server.outside for server in servers))


def teachers(graph: StageGraph, node: Node) -> list[Node]:
    """A merge's teachers, each once."""
    found = [graph.node(parent) for role, parent in node.parents.items() if is_teacher(role)]
    return list({teacher.key: teacher for teacher in found}.values())


def server_problems(graph: StageGraph, store: Store, missing: Sequence[Node], memory: Memory) -> Iterator[str]:
    """Yield an error for each group of servers that the run starts and that do not fit on their devices, and for each
    engine in the trainer's processes that does not fit in its share.

    Models whose size is unknown before their download are left out.

    Args:
        graph: The run.
        store: The store of its artifacts.
        missing: Nodes that are to run.
        memory: Of one device.
    """
    for node in missing:
        kind, resources = STAGES[node.stage], graph.config.resources
        if node.config.get("backend") == "vllm" and resources.gpus:
            own = engine_of(graph, node)
            yield from _misfits(node, "evaluate", [_engine(graph, store, node, own)], own.sampler, memory)
        if not kind.samples:
            continue
        config: OnPolicyConfig = kind.config(**node.config)
        if config.sampler.backend == "vllm" and resources.gpus:
            yield from _misfits(node, "sampler", [_engine(graph, store, node, config)], config.sampler, memory)
        rollouts = resources.rollout_servers
        gpus = devices_of_each(rollouts, resources)
        if config.sampler.backend == "vllm_server" and not rollouts.urls and gpus:
            shape = shape_of(origin(graph, node), store)
            ranks = [config.lora.rank] if config.lora else []
            student = Served(f"rollouts of {node.name}", shape, config, ranks, gpus)
            yield from _misfits(node, "resources.rollout_servers", [student], rollouts, memory)
        settings = resources.teacher_servers
        gpus = devices_of_each(settings, resources)
        if getattr(config, "teacher_backend", None) == "vllm_server" and not settings.urls and gpus:
            served = planned(graph, store, node, config, gpus)
            count = places(len(served), settings, gpus, devices_beside(resources, config))
            of_place = pack([each.least for each in served], count, settings.per_device)
            for place in range(count):
                group = [each for each, at in zip(served, of_place, strict=True) if at == place]
                yield from _misfits(node, "resources.teacher_servers", group, settings, memory)


def engine_of(graph: StageGraph, node: Node) -> OnPolicyConfig:
    """The settings of the vLLM engine of an evaluation."""
    settings = {name: value for name, value in node.config.items() if name in EvaluationConfig.model_fields}
    lora = graph.node(node.parents["checkpoint"]).config.get("lora")
    return EvaluationConfig(**settings).engine(LoraConfig(**lora) if lora else None)


def _engine(graph: StageGraph, store: Store, node: Node, config: OnPolicyConfig) -> Served:
    """The engine of each process of a stage or evaluation, with the context of the longest prompt, whose length is
    assumed."""
    shape, ranks = shape_of(origin(graph, node), store), [config.lora.rank] if config.lora else []
    limited = config.model_copy(update={"max_prompt_tokens": config.max_prompt_tokens or terms.PROMPT_TOKENS})
    trains = STAGES[node.stage].trains
    name = f"rollouts of {node.name} in its processes" if trains else node.name
    return Served(name, shape, limited, ranks, processes=graph.config.resources.gpus if trains else 1)


def planned(graph: StageGraph, store: Store, node: Node, config: OnPolicyConfig, gpus: int) -> list[Served]:
    """The servers of a merge's teachers: one for each full checkpoint, with the adapters of it."""
    keyed = sorted(teachers(graph, node), key=lambda teacher: full_checkpoint(graph, teacher).key)
    found = []
    for _, group in groupby(keyed, key=lambda teacher: full_checkpoint(graph, teacher).key):
        own = list(group)
        ranks = [int(teacher.config["lora"]["rank"]) for teacher in own if teacher.config.get("lora")]
        name = ", ".join(teacher.name for teacher in own)
        found.append(Served(name, shape_of(origin(graph, own[0]), store), config, ranks, gpus, True))
    return found


def _misfits(
    node: Node, key: str, group: Sequence[Served], settings: ServersConfig | SamplerConfig, memory: Memory
) -> Iterator[str]:
    if not all(server.shape.parameters for server in group):
        return
    need, have = sum(server.least for server in group), room(group, settings.memory_share, memory.total)
    if need <= have:
        return
    inside = isinstance(settings, SamplerConfig)
    what = "engine" if inside else "server" if len(group) == 1 else "servers"
    parts = "; ".join(
        f"{server.name}: weights {gib(server.weights)}, a row's cache {gib(server.row)}, least {gib(server.least)}"
        for server in group
    )
    measured = not STAGES[node.stage].trains
    if measured:
        advice = [f"lower {key}.batch_size, or take {key}.backend: transformers"]
    else:
        advice = [f"raise {key}.memory_share, or take sampler.backend: vllm_server" if inside else f"raise {key}.gpus"]
    if len(group) > 1:
        advice.insert(0, f"lower {key}.per_device or use more devices")
    if any(server.row > server.least / 5 for server in group) and not measured:
        advice.append("set max_prompt_tokens, which limits the context")
    if node.config.get("dtype") != "bfloat16":
        advice.append("dtype: bfloat16")
    named = f"{key}.backend" if measured else f"{key}.memory_share" if inside else key
    yield (
        f"{named}: {node.id}: {len(group)} vLLM {what} on a device need {gib(need)} GiB "
        f"({parts}); {memory.place} has {gib(memory.total)}, of which they get {gib(have)}: {', '.join(advice)}"
    )


def _rounded(share: float) -> float:
    return floor(share * 10**DIGITS) / 10**DIGITS
