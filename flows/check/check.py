"""The checks of a run before any training: sufficient data, matching tokenizers, disk space.

Only nodes that have to run are checked, so that a run with few missing nodes starts at once.
"""

import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from base.errors import UserError, first_line
from base.extras import require_bitsandbytes, require_vllm
from base.store.checkpoint import Store
from experts.loading import load_domain
from flows.check.architectures import architecture_problems, checkpoint_key
from flows.check.copies import copy_warnings
from flows.check.draws import config_key, draw_examples, unit_warnings
from flows.check.programs import program_problems
from flows.check.rates import rate_warnings
from flows.check.tokens import TokenCheck
from flows.engines.devices import host_devices
from flows.engines.gpus import gpu_problems, gpu_warnings
from flows.engines.memory import fit
from flows.engines.server_memory import devices_beside, devices_of_each, places, teachers
from flows.engines.shapes import full_checkpoint, origin
from flows.plan.harness import harness_problems
from flows.plan.nodes import Node, StageGraph
from flows.plan.shifts import SHIFT
from stages.config.kinds import STAGES
from stages.model.remote_code import OWN_CODE
from stages.on_policy.shares import without_prompts
from stages.rows.rendering import rendering
from stages.vllm.settings import is_local

# With less free space even a tiny run is likely to fail.
SMALLEST_FREE_BYTES = 200 * 2**20
BYTES_A_PARAMETER = 4
# A saved state has the weights and two moments of the optimizer, and the next is written before the last is deleted.
STATE_COPIES = 6
GGUF_GROWTH = 8
NARROWEST_HEAD_ON_CPU = 32
HEALTH_SECONDS = 5.0


def deep_check(graph: StageGraph, store: Store, *, ignore_memory: bool = False) -> list[str]:
    """Check what planning alone cannot detect.

    Args:
        graph: The run.
        store: The store of its artifacts.
        ignore_memory: Whether a stage that is estimated not to fit is a warning.

    Returns:
        Warnings.

    Raises:
        UserError: with all mistakes in one message: a domain with too few examples, a teacher whose tokenizer differs
            from the student's, an imported checkpoint that no stage can use, completions that leave no room for a
            prompt, too few devices or devices that torch cannot use, a disk that is too full.
    """
    missing = [node for node in graph.nodes if store.find(node.key) is None]
    warnings: list[str] = []
    with rendering(graph.rendering):
        # The checks below read these models' configs and tokenizers.
        if unusable := list(architecture_problems(graph, store, missing)):
            raise UserError("\n".join(unusable))
        draws, problems = draw_examples(graph, missing, warnings)
        warnings += copy_warnings(graph, draws)
        warnings += unit_warnings(graph, draws)
        problems += _tokenizer_problems(graph, store, missing)
        tokens = TokenCheck(graph, store, draws, partial(_tokenizer, remote_code=graph.config.remote_code))
        for node in missing:
            tokens.look(node, config_key(node))
        problems += tokens.problems
    problems += [
        *_scorer_problems(graph, missing),
        *_sampling_problems(graph, missing),
        *_device_problems(graph, missing),
        *_engine_problems(graph, missing),
        *_optimizer_problems(missing),
        *program_problems(missing),
        *harness_problems(graph.config, missing),
    ]
    warnings += tokens.warnings
    if missing:
        problems += gpu_problems(graph.config.resources)
        warnings += gpu_warnings(graph.config.resources)
        needed, free = disk_needed(graph, store, missing), shutil.disk_usage(store.home).free
        text = f"{store.home}: {_gigabytes(free)} free, about {_gigabytes(needed)} needed"
        too_large, tight = fit(graph, store, missing)
        (warnings if ignore_memory else problems).extend(too_large)
        warnings += tight
        warnings += rate_warnings(graph, store, missing)
        if free < needed:
            problems.append(f"{text}; free some space or choose another --home")
        elif free < 2 * needed:
            warnings.append(text)
    if problems:
        # Nodes that share a domain or a checkpoint repeat its faults.
        raise UserError("\n".join(dict.fromkeys(problems)))
    return warnings


def _scorer_problems(graph: StageGraph, missing: list[Node]) -> Iterator[str]:
    """Yield an error for each scorer that lacks something external, such as a judge's endpoint."""
    for name in sorted({domain for node in missing if node.stage != SHIFT for domain in node.domains}):
        entry = graph.config.domains[name]
        try:
            load_domain(name, entry.kind, entry.options).preflight()
        except UserError as error:
            yield str(error)


def _sampling_problems(graph: StageGraph, missing: list[Node]) -> Iterator[str]:
    """Steps with fewer prompts than domains, and completions as long as a fresh model's whole context."""
    for node in missing:
        per_step = node.config.get("prompts_per_step")
        if per_step is not None:
            weights = {name: node.config.get("domain_weights", {}).get(name, 1.0) for name in node.domains}
            yield from (f"{node.id}: {problem}" for problem in without_prompts(per_step, weights))
        asked = node.config.get("max_new_tokens")
        if asked is None:
            continue
        first = origin(graph, node)
        limit = first.config["model"]["max_length"] if first.stage == "pretrain" else None
        if limit is not None and asked >= limit:
            yield f"{node.id}: max_new_tokens {asked} leaves no room for a prompt in a context of {limit} tokens"


def _engine_problems(graph: StageGraph, missing: list[Node]) -> Iterator[str]:
    """vLLM that is not installed or cannot run the model, and missing servers."""
    resources = graph.config.resources
    inside = [node for node in missing if _backend(node) == "vllm"]
    measured = [node for node in missing if node.config.get("backend") == "vllm"]
    rollouts = [node for node in missing if _backend(node) == "vllm_server"]
    taught = [node for node in missing if node.config.get("teacher_backend") == "vllm_server"]
    if graph.config.remote_code and (asking := [*inside, *measured, *rollouts, *taught]):
        yield f"remote_code: {config_key(asking[0])} uses vLLM, to which the code of checkpoints is not given here"
    started = {f"{config_key(node)}.sampler.backend": (node, min(1, resources.gpus)) for node in inside}
    started |= {f"{config_key(node)}.backend": (node, min(1, resources.gpus)) for node in measured}
    if not resources.rollout_servers.urls:
        gpus = devices_of_each(resources.rollout_servers, resources)
        started |= {f"{config_key(node)}.sampler.backend": (node, gpus) for node in rollouts}
    if not resources.teacher_servers.urls:
        gpus = devices_of_each(resources.teacher_servers, resources)
        started |= {f"{config_key(node)}.teacher_backend": (node, gpus) for node in taught}
    for key, (node, gpus) in started.items():
        try:
            require_vllm(key, gpus)
        except UserError as error:
            yield str(error)
        yield from _narrow_heads(graph, node, key)
    asked = {config_key(node): _devices_of(graph, node) for node in [*rollouts, *taught]}
    for key, count in asked.items():
        if count > resources.gpus and count > (shown := len(host_devices())):
            yield f"{key}: the stage and its vLLM servers need at least {count} devices, but this machine has {shown}"
    if rollouts:
        yield from _silent_servers("rollout", resources.rollout_servers.urls)
    if taught:
        yield from _silent_servers("teacher", resources.teacher_servers.urls)


def _devices_of(graph: StageGraph, node: Node) -> int:
    """Devices of a stage and of the servers it starts."""
    resources = graph.config.resources
    total = devices_beside(resources, STAGES[node.stage].config(**node.config))
    if node.config.get("teacher_backend") == "vllm_server" and not resources.teacher_servers.urls:
        servers = len({full_checkpoint(graph, teacher).key for teacher in teachers(graph, node)})
        if gpus := devices_of_each(resources.teacher_servers, resources):
            total += gpus * places(servers, resources.teacher_servers, gpus, total)
    return total


def _backend(node: Node) -> str | None:
    name: str | None = node.config.get("sampler", {}).get("backend")
    return name


def _narrow_heads(graph: StageGraph, node: Node, key: str) -> Iterator[str]:
    """A fresh model whose attention vLLM cannot compute on a CPU."""
    first = origin(graph, node)
    if graph.config.resources.gpus or first.stage != "pretrain":
        return
    model = first.config["model"]
    width = model["hidden_size"] // model["heads"]
    if width < NARROWEST_HEAD_ON_CPU:
        yield (
            f"{key}: vLLM's attention on a CPU takes heads of {NARROWEST_HEAD_ON_CPU} and more; base.pretrain.model "
            f"has {model['heads']} of {width}"
        )


def _silent_servers(kind: str, urls: Sequence[str]) -> Iterator[str]:
    """Servers in the run file that do not respond."""
    import httpx

    for url in urls:
        try:
            answer = httpx.get(f"{url}/health", timeout=HEALTH_SECONDS, trust_env=not is_local(url))
        except httpx.TransportError as error:
            fault = f"{type(error).__name__}: {error}"
        else:
            if answer.is_success:
                continue
            fault = f"HTTP {answer.status_code}"
        command = "rollout" if kind == "rollout" else "teachers"
        yield (
            f"resources.{kind}_servers.urls: {url} does not answer ({fault}); `mopd serve {command}` starts such "
            f"servers, and without urls the run starts its own"
        )


def _device_problems(graph: StageGraph, missing: list[Node]) -> Iterator[str]:
    """Weights sharded over a single device."""
    gpus = graph.config.resources.gpus
    if gpus >= 2:
        return
    for key in dict.fromkeys(config_key(node) for node in missing if node.config.get("sharding") == "fsdp"):
        yield f"{key}.sharding: fsdp shards over 2 devices or more; resources.gpus is {gpus}"


def _optimizer_problems(missing: list[Node]) -> Iterator[str]:
    """bitsandbytes that is not installed."""
    narrow = [node for node in missing if (node.config.get("optimizer") or {}).get("states") == "8bit"]
    for key in dict.fromkeys(config_key(node) for node in narrow):
        try:
            require_bitsandbytes(f"{key}.optimizer.states")
        except UserError as error:
            yield str(error)


def _tokenizer_problems(graph: StageGraph, store: Store, missing: list[Node]) -> Iterator[str]:
    """Compare the tokenizers of imported students and teachers; checkpoints trained here inherit theirs."""
    for student in missing:
        if student.stage != "distill":
            continue
        start = origin(graph, graph.node(student.parents["start"]))
        for role, parent in student.parents.items():
            teacher = origin(graph, graph.node(parent))
            if teacher.key == start.key or role == "start":
                continue
            ours, theirs = (_tokenizer(node, store, graph.config.remote_code) for node in (start, teacher))
            if ours is None or theirs is None:
                continue
            from stages.model.tokenizers import tokenizer_difference

            if difference := tokenizer_difference(ours, theirs):
                key = f"merge.teachers.{role.removeprefix('teacher/').replace('/', '.')}"
                yield (
                    f"{key}: the tokenizer of teacher {graph.node(parent).name} differs from that of "
                    f"the student's start, {start.name}: {difference}; a teacher scores the student's own tokens, so "
                    f"both must share one tokenizer"
                )


def _tokenizer(node: Node, store: Store, remote_code: bool) -> Any:
    """An origin's tokenizer; None if it is in a GGUF file that is not read yet.

    Raises:
        UserError: an imported checkpoint's tokenizer cannot be read.
    """
    artifact = store.find(node.key)
    if artifact is None and (node.stage != "load" or node.config["kind"] == "gguf"):
        if node.stage != "pretrain":
            return None
        from stages.model.tiny import character_tokenizer

        return character_tokenizer()
    from transformers import AutoTokenizer

    place = artifact.uri if artifact is not None else node.config["location"]
    revision = None if artifact is not None else node.config["revision"]
    try:
        return AutoTokenizer.from_pretrained(place, revision=revision, trust_remote_code=remote_code)
    except Exception as error:  # each kind of tokenizer has its own errors; those of `tokenizers` are bare Exceptions
        fault = OWN_CODE if "trust_remote_code" in str(error) else f"its tokenizer cannot be read: {first_line(error)}"
        raise UserError(f"{checkpoint_key(node)}: {place}: {fault}") from error


def disk_needed(graph: StageGraph, store: Store, missing: list[Node]) -> int:
    """Bytes that the missing nodes will probably write: a checkpoint each, and saved states of concurrent ones."""
    made = [node for node in missing if not STAGES[node.stage].measures]
    sizes = {node.key: _checkpoint_bytes(origin(graph, node), store) for node in made}
    side_by_side = sorted((sizes[node.key] for node in made if STAGES[node.stage].trains), reverse=True)
    states = STATE_COPIES * sum(side_by_side[: graph.config.resources.parallel_experts])
    return SMALLEST_FREE_BYTES + sum(sizes.values()) + states


def _checkpoint_bytes(first: Node, store: Store) -> int:
    """Size of an origin's weights; 0 if only the Hub has it."""
    if artifact := store.find(first.key):
        return _folder_bytes(artifact.path)
    config = first.config
    if first.stage == "pretrain":
        model = config["model"]
        layer = 4 * model["hidden_size"] ** 2 + 3 * model["hidden_size"] * model["intermediate_size"]
        return int(model["layers"] * layer * BYTES_A_PARAMETER)
    if config["kind"] == "gguf":
        return Path(config["location"]).stat().st_size * GGUF_GROWTH
    return _folder_bytes(Path(config["location"])) if config["kind"] == "directory" else 0


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _gigabytes(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
