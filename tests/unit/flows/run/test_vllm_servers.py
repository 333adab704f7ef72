"""What vLLM servers a node needs, as commands; their devices, ports and place in the spec. No vLLM is started."""

import importlib
import json
import socket
from pathlib import Path
from typing import Any

import pytest

from base.errors import UserError
from base.store.checkpoint import Artifact, Store
from flows.engines.devices import Lease
from flows.engines.process_spec import ProcessSpec
from flows.engines.vllm_commands import (
    KEY_CHECK,
    PROTECTED,
    Needs,
    ServerCommand,
    devices_of,
    node_needs,
    together,
)
from flows.engines.vllm_servers import PORTS, VllmServers, free_ports, tail
from flows.plan.graph import build_graph
from flows.plan.nodes import StageGraph
from flows.run_file.resources import ResourcesConfig
from flows.run_file.schema import RunConfig
from stages.vllm.settings import SCORED_TOKENS
from tests.support.installed import install_vllm

HOST = "127.0.0.1"
SHAPE = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_hidden_layers": 1,
    "max_position_embeddings": 64,
}
TINY = {"max_steps": 2, "prompts_per_step": 4, "group_size": 2, "max_new_tokens": 8}
SAMPLED = {"type": "sampled_reverse_kl"}
ADAPTER = {"sft": {"max_steps": 1, "lora": {"rank": 4}}}
RUN: dict[str, Any] = {
    "name": "served",
    "base": {"pretrain": {"max_steps": 2}},
    "domains": {name: {"kind": "strings", "options": {"task": name}} for name in ("sort", "reverse", "uppercase")},
    "experts": {
        "sort": {"domain": "sort", "train": ADAPTER},
        "reverse": {"domain": "reverse", "train": ADAPTER},
    },
    "merge": {**TINY, "anchor": {"domains": ["uppercase"]}},
}


@pytest.fixture(autouse=True)
def vllm_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here starts it."""
    install_vllm(monkeypatch, "a build for every device")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def planned(tmp_path: Path, **merge: Any) -> StageGraph:
    return build_graph(RunConfig.model_validate({**RUN, "merge": {**RUN["merge"], **merge}}), tmp_path)


def put(store: Store, key: str, name: str, base: str | None = None, rank: int = 4) -> Artifact:
    """A checkpoint as far as a command needs it: a shape, or an adapter's."""
    folder = store.staging(key)
    if base is None:
        (folder / "config.json").write_text(json.dumps(SHAPE))
    else:
        config = {"r": rank, "target_modules": ["model.layers.0.self_attn.q_proj"]}
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return store.commit(folder, key, {"name": name, "adapter_base": base})


def made(graph: StageGraph, store: Store) -> dict[str, str]:
    """Put the base and two adapters of it into the store; returns node -> key."""
    keys = {node.id: node.key for node in graph.checkpoints}
    put(store, keys["base@0"], "base")
    put(store, keys["experts/sort@0"], "experts/sort", keys["base@0"], 4)
    put(store, keys["experts/reverse@0"], "experts/reverse", keys["base@0"], 12)
    return keys


def needs(graph: StageGraph, store: Store, **resources: Any) -> Needs:
    return node_needs(graph, graph.node("student@0"), store, ResourcesConfig.model_validate(resources))


def option(command: ServerCommand, name: str) -> str:
    return command.arguments[command.arguments.index(name) + 1]


def test_a_node_that_asks_for_no_server_gets_none(tmp_path, store):
    graph = planned(tmp_path)
    assert needs(graph, store) == Needs()
    base = graph.node("base@0")
    assert node_needs(graph, base, store, ResourcesConfig(sampler="vllm_server")) == Needs()
    assert node_needs(graph, graph.evaluations("base@0")[0], store, ResourcesConfig()) == Needs()


def test_servers_that_are_given_are_not_started(tmp_path, store):
    graph = planned(tmp_path, sampler={"backend": "vllm_server"}, teacher_backend="vllm_server", objective=SAMPLED)
    urls = {name: {"urls": [f"http://{name}:1/v1"]} for name in ("rollout_servers", "teacher_servers")}
    wanted = {"rollout": ["http://rollout_servers:1"], "teachers": ["http://teacher_servers:1"]}
    assert needs(graph, store, **urls) == Needs(wanted, ())


def test_rollout_servers_have_the_students_shape_and_no_weights(tmp_path, store):
    graph = planned(tmp_path, sampler={"backend": "vllm_server"})
    keys = made(graph, store)
    first, second = needs(graph, store, rollout_servers={"count": 2}).commands
    assert first == second
    assert (first.kind, first.gpus) == ("rollout", 0)
    assert option(first, "--model") == str(store.root / keys["base@0"])
    assert option(first, "--served-model-name") == "student"
    assert option(first, "--load-format") == "dummy"
    assert json.loads(option(first, "--hf-overrides"))["architectures"] == SHAPE["architectures"]
    assert option(first, "--logprobs-mode") == "raw_logprobs"
    assert option(first, "--max-num-seqs") == str(4 * 2)
    assert int(option(first, "--kv-cache-memory-bytes")) > 0
    assert "--enforce-eager" in first.arguments
    assert not {"--skip-tokenizer-init", "--enable-lora", "--gpu-memory-utilization"} & set(first.arguments)
    # vLLM finds both by these names, and what they name is there.
    for path in (option(first, "--worker-extension-cls"), option(first, "--middleware"), KEY_CHECK):
        module, _, attribute = path.rpartition(".")
        assert isinstance(getattr(importlib.import_module(module), attribute), type)
    # The key is checked before the guard sees a request.
    assert first.arguments[-2:] == PROTECTED
    assert first.environment["VLLM_SERVER_DEV_MODE"] == "1"
    assert first.environment["TORCHDYNAMO_DISABLE"] == "1"


def test_a_limit_of_prompts_limits_the_servers_context(tmp_path, store):
    shape = json.loads((put(store, "long", "long").path / "config.json").read_text())
    assert shape["max_position_embeddings"] < 512
    both = {"sampler": {"backend": "vllm_server"}, "teacher_backend": "vllm_server", "objective": SAMPLED}
    for limit, context in ((None, None), (7, shape["max_position_embeddings"])):
        graph = planned(tmp_path, max_prompt_tokens=limit, **both)
        if limit is None:
            made(graph, store)
        for command in needs(graph, store).commands:
            assert ("--max-model-len" in command.arguments) == (context is not None)
            if context is not None:
                assert option(command, "--max-model-len") == str(context)


def test_the_users_own_settings_of_vllm_win(tmp_path, store, monkeypatch):
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    graph = planned(tmp_path, sampler={"backend": "vllm_server"})
    made(graph, store)
    assert needs(graph, store).commands[0].environment["VLLM_LOGGING_LEVEL"] == "DEBUG"


def test_a_student_with_an_adapter_gets_room_for_one(tmp_path, store):
    graph = planned(tmp_path, sampler={"backend": "vllm_server"}, lora={"rank": 12}, temperature=0.7)
    made(graph, store)
    (command,) = needs(graph, store).commands
    assert option(command, "--max-lora-rank") == "16"
    assert option(command, "--max-loras") == "1"
    assert option(command, "--logprobs-mode") == "processed_logprobs"


def test_a_start_that_is_an_adapter_is_served_as_its_base(tmp_path, store):
    graph = planned(tmp_path, sampler={"backend": "vllm_server"}, start_from="sort", lora={"rank": 4})
    keys = made(graph, store)
    (command,) = needs(graph, store).commands
    assert option(command, "--model") == str(store.root / keys["base@0"])


@pytest.mark.parametrize(("asked", "gpus"), [(None, 1), (2, 2), (0, 0)])
def test_where_stages_train_on_devices_a_server_has_one_unless_told(tmp_path, store, asked, gpus):
    graph = planned(tmp_path, sampler={"backend": "vllm_server"})
    made(graph, store)
    settings = {"gpus": asked, "memory_share": 0.8}
    (command,) = needs(graph, store, gpus=4, rollout_servers=settings).commands
    assert command.gpus == gpus
    assert ("--enforce-eager" in command.arguments) == (gpus == 0)
    if gpus:
        assert option(command, "--tensor-parallel-size") == str(gpus)
        assert option(command, "--gpu-memory-utilization") == "0.8"
        assert json.loads(option(command, "--weight-transfer-config")) == {"backend": "nccl"}
        assert "TORCHDYNAMO_DISABLE" not in command.environment


def test_adapters_of_one_base_share_its_server_with_it(tmp_path, store):
    graph = planned(
        tmp_path,
        teacher_backend="vllm_server",
        objective={"type": "reverse_kl", "top_k": {"k": 40, "support": "teacher"}},
    )
    keys = made(graph, store)
    (command,) = needs(graph, store).commands
    assert (command.kind, command.serves) == ("teachers", "experts/sort, experts/reverse, base")
    assert option(command, "--served-model-name") == keys["base@0"]
    modules = [json.loads(word) for word in command.arguments if word.startswith('{"name"')]
    wanted = [keys["experts/sort@0"], keys["experts/reverse@0"]]
    assert modules == [{"name": key, "path": str(store.root / key)} for key in wanted]
    # Two, and one place left empty.
    assert option(command, "--max-loras") == "3"
    # Room for 12.
    assert option(command, "--max-lora-rank") == "16"
    # vLLM matches the last part of a module's name where several are packed into one.
    assert option(command, "--lora-target-modules") == "q_proj"
    assert option(command, "--max-logprobs") == "40"
    assert not {"--load-format", "--worker-extension-cls"} & set(command.arguments)
    assert command.arguments[-2:] == PROTECTED


def test_full_teachers_have_servers_of_their_own_and_the_same_checkpoint_has_one(tmp_path, store):
    teachers = {"sort": "sort", "reverse": "base", "uppercase": "base"}
    graph = planned(
        tmp_path,
        teacher_backend="vllm_server",
        teachers=teachers,
        anchor=None,
        objective=SAMPLED,
    )
    keys = {node.id: node.key for node in graph.checkpoints}
    put(store, keys["base@0"], "base")
    put(store, keys["experts/sort@0"], "experts/sort")
    commands = needs(graph, store).commands
    assert {option(command, "--served-model-name") for command in commands} == {keys["base@0"], keys["experts/sort@0"]}
    assert len(commands) == 2
    assert option(commands[0], "--max-logprobs") == "20"
    assert not any("--enable-lora" in command.arguments for command in commands)


def full_teachers(tmp_path: Path, store: Store) -> StageGraph:
    """A merge with three full teachers: two of one size, and the base."""
    graph = planned(tmp_path, teacher_backend="vllm_server", objective=SAMPLED, max_prompt_tokens=40)
    for node in graph.checkpoints:
        if node.id != "student@0":
            put(store, node.key, node.id)
    return graph


@pytest.mark.parametrize(
    ("devices", "settings", "places"),
    [
        # One for the trainer, and one for each teacher.
        (4, {}, [0, 1, 2]),
        # Fewer: those that are left are shared.
        (3, {}, [0, 1, 0]),
        (2, {}, [0, 0, 0]),
        (8, {"per_device": 2}, [0, 1, 0]),
        (8, {"per_device": 3}, [0, 0, 0]),
        (8, {"per_device": 1}, [0, 1, 2]),
        # Two devices each.
        (5, {"gpus": 2}, [0, 1, 0]),
    ],
)
def test_teachers_share_devices_where_there_are_too_few_or_as_asked(
    tmp_path, store, monkeypatch, devices, settings, places
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(f"GPU-{n}" for n in range(devices)))
    graph = full_teachers(tmp_path, store)
    commands = needs(graph, store, gpus=1, teacher_servers=settings).commands
    assert [command.place for command in commands] == places
    assert devices_of(commands) == len(set(places)) * settings.get("gpus", 1)
    for place in set(places):
        shares = [
            float(option(c, "--gpu-memory-utilization")) for c, at in zip(commands, places, strict=True) if at == place
        ]
        assert 0.89 < sum(shares) <= 0.9 and max(shares) - min(shares) < 1e-9
    # The logits of a long row's tokens are bounded by those of one pass.
    assert {option(command, "--max-num-batched-tokens") for command in commands} == {str(SCORED_TOKENS)}


def test_teachers_on_the_cpu_have_no_places(tmp_path, store):
    commands = needs(full_teachers(tmp_path, store), store, teacher_servers={"per_device": 2}).commands
    assert [command.place for command in commands] == [None] * 3
    assert devices_of(commands) == 0
    assert together(commands) == [[0], [1], [2]]


def test_without_vllm_the_error_names_the_key(tmp_path, store, monkeypatch):
    install_vllm(monkeypatch, None)
    graph = planned(tmp_path, sampler={"backend": "vllm_server"})
    made(graph, store)
    with pytest.raises(UserError, match=r"sampler.backend: vLLM is not installed; `make setup-vllm`"):
        needs(graph, store)


def test_the_spec_has_the_servers_and_two_runs_with_their_own_have_two_specs(tmp_path):
    graph = planned(tmp_path)
    job = ProcessSpec.of(graph, [graph.node("student@0")], tmp_path, 1, 45.0)
    # The longest time of the node is that of its processes' collectives.
    assert job.contents["timeout_minutes"] == 45.0
    first, second = (job.write(tmp_path, {"rollout": [f"http://127.0.0.1:{port}"]}) for port in (1, 2))
    assert first != second
    assert json.loads(first.read_text())["servers"] == {"rollout": ["http://127.0.0.1:1"]}
    assert json.loads(second.read_text())["servers"] == {"rollout": ["http://127.0.0.1:2"]}
    assert job.write(tmp_path, {}) == job.write(tmp_path, {})


def test_urls_are_known_before_the_start_and_the_log_is_the_ports(tmp_path):
    commands = [ServerCommand("rollout", "a", ("x",)), ServerCommand("teachers", "b", ("y",), gpus=2)]
    group = VllmServers(commands, tmp_path, lease=Lease(("3", "5"), (8, 9)), ports=[4001, 4002])
    assert group.urls == {"rollout": [f"http://{HOST}:4001"], "teachers": [f"http://{HOST}:4002"]}
    assert group.servers[1].arguments == ("y", "--host", HOST, "--port", "4002")
    assert group.servers[1].log == tmp_path / "servers" / "vllm-teachers-4002.log"
    assert [server.lease.environment["CUDA_VISIBLE_DEVICES"] for server in group.servers] == ["", "3,5"]
    assert group.servers[1].lease.descriptors == (8, 9)


def test_a_lease_is_shared_out_in_order():
    shares = Lease(("a", "b", "c"), (1, 2, 3)).split([1, 0, 2])
    assert [share.devices for share in shares] == [("a",), (), ("b", "c")]
    assert [share.descriptors for share in shares] == [(1,), (), (2, 3)]


def test_chosen_ports_are_free_and_differ():
    ports = free_ports(HOST, 3)
    assert len(set(ports)) == 3
    assert all(port >= PORTS.start for port in ports)


def test_named_ports_must_be_free_in_a_row():
    with socket.socket() as listener:
        # Not the kernel's choice: beside that are ports of connections.
        (taken,) = free_ports(HOST, 1)
        listener.bind((HOST, taken))
        listener.listen()
        with pytest.raises(UserError, match=f"vLLM server: port {taken} on {HOST} is taken"):
            free_ports(HOST, 2, taken - 1, exact=True)


def test_a_log_tells_the_first_error(tmp_path):
    log = tmp_path / "vllm.log"
    assert tail(log) == ""
    log.write_text("".join(f"line {i}\n" for i in range(20)))
    assert tail(log).splitlines()[0] == "line 5"
    prefix = "(EngineCore pid=7) ERROR 11-23 14:43:43 [core.py:1510] "
    log.write_text(
        "starting\nFutureWarning: old\n"
        f"{prefix}Traceback (most recent call last):\n"
        f"{prefix}    raise ValueError(\n"
        f"{prefix}ValueError: the cache is too small\n"
        "RuntimeError: Engine core initialization failed. See root cause above.\n"
    )
    assert tail(log) == "ValueError: the cache is too small"
    log.write_text("Traceback (most recent call last):\nOSError: [Errno 98] Address already in use\nbye\n")
    assert tail(log) == "OSError: [Errno 98] Address already in use"
