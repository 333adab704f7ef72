"""Hand-overs of weights to a real vLLM server that fail: no number comes of them, and the server is started anew."""

import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import httpx
import pytest
from safetensors.torch import load_file, save_file
from transformers import Qwen3MoeConfig

from base.errors import UserError
from base.store.checkpoint import Store
from flows.engines.fork_client import ForkServer, child_environment
from flows.engines.server_health import Health, ask_health
from flows.engines.vllm_commands import rollout_servers
from flows.engines.vllm_servers import RunningServer, VllmServers
from flows.run_file.resources import ResourcesConfig
from stages.config.on_policy import RLConfig, SamplerConfig
from stages.config.training import LoraConfig
from stages.learner.training import Learner
from stages.learner.workspace import Workspace
from stages.model.policy import Policy
from stages.model.tiny import character_tokenizer, tiny_model
from stages.rows.trained_on import TrainedOn
from stages.sampling.samples import Sampling
from stages.vllm.handover import Probe
from stages.vllm.remote_handover import save_weights
from stages.vllm.remote_sampler import RemoteSampler
from stages.vllm.server import Ends, ServerFailedError, ServerLostError, VllmServer
from stages.vllm.settings import NO_VERSION
from tests.integration.vllm.conftest import AUTHORIZED, KEY
from tests.support.processes import eventually
from tests.support.vllm_scenario import PROMPTS, SHAPE, gap, make_moe, make_policy, move, random_checkpoint

TOLERANCE = 1e-4
LORA = LoraConfig(rank=12)
START_SECONDS = 900
pytestmark = pytest.mark.vllm


@dataclass
class Served:
    """A supervised server and those who sample with it."""

    store: Store
    server: RunningServer
    experts: RunningServer
    samplers: list[RemoteSampler] = field(default_factory=list)

    @property
    def url(self) -> str:
        return self.server.url

    def student(
        self, key: str, lora: LoraConfig | None = None, policy: Policy | None = None, url: str | None = None
    ) -> RemoteSampler:
        config = RLConfig(lora=lora, sampler=SamplerConfig(backend="vllm_server", timeout_seconds=600))
        place = Workspace(self.store, key, key, 0, {}, {}, {}, {"rollout": [url or self.url]})
        learner = Learner(policy or make_policy(lora), config, 10, place.progress, 0)
        self.samplers.append(RemoteSampler(learner, config, place))
        return self.samplers[-1]


def of_shape(**changes: int) -> Policy:
    """A student that differs from the server's in shape, not in the width of its hidden states."""
    tokenizer = character_tokenizer()
    return Policy(tiny_model(SHAPE.model_copy(update=changes), tokenizer, 5), tokenizer)


def mixture() -> Policy:
    return make_moe(Qwen3MoeConfig, num_experts=4, moe_intermediate_size=64)


def gives_no_number(server: VllmServer, model: str) -> None:
    """Completions and scores are refused, and there is no version to trust."""
    with pytest.raises(ServerLostError, match="HTTP 503"):
        server.complete(model, PROMPTS[0], 1, Sampling(4), 0, Ends([2]))
    with pytest.raises(ServerLostError, match="HTTP 503"):
        server.score(model, [*PROMPTS[0], 7], len(PROMPTS[0]), 0)
    body = {"model": model, "messages": [{"role": "user", "content": "1"}]}
    assert httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=AUTHORIZED).status_code == 503


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Two rollout servers under supervision: one with room for an adapter, and one of a mixture of experts."""
    home = tmp_path_factory.mktemp("home")
    store = Store(home)
    folder = store.staging("experts")
    mixture().save(folder)
    experts = Workspace(store, "experts", "experts", 0, {}, {}, {}).commit(folder, trained_on=TrainedOn(), metrics={})
    commands = rollout_servers(RLConfig(lora=LORA), random_checkpoint(store, "start", 0), store, ResourcesConfig())
    commands += rollout_servers(RLConfig(), experts, store, ResourcesConfig())
    fork_server = ForkServer(home / "fork.log", child_environment(1), preload=())
    over = threading.Event()
    with VllmServers(commands, home) as group:

        def tend() -> None:
            while not over.wait(0.2):
                group.tend()

        group.start(fork_server)
        thread = threading.Thread(target=tend)
        thread.start()
        try:
            eventually(group.ready, within=START_SECONDS)
            yield Served(store, *group.servers)
        finally:
            over.set()
            thread.join()
    fork_server.close()


@pytest.fixture(autouse=True)
def let_go(served: Served) -> Iterator[None]:
    yield
    while served.samplers:
        served.samplers.pop().close()


def test_a_server_that_was_given_nothing_has_no_version_and_gives_no_number(served):
    server = VllmServer(served.url, 60)
    assert server.weight_version() == NO_VERSION
    gives_no_number(server, server.base_model())
    assert server.healthy() and ask_health(served.url) == Health(well=True)
    server.close()


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer another"}, {"Authorization": KEY}], ids=str)
def test_without_its_key_a_server_does_nothing(served, headers):
    before = VllmServer(served.url, 60)
    for method, path in [
        ("POST", "/collective_rpc"), ("POST", "/v1/completions"), ("POST", "/reset_prefix_cache"), ("POST", "/sleep"),
        ("GET", "/server_info"), ("GET", "/v1/models"), ("GET", "/weight_info"), ("GET", "/metrics"), ("GET", "/docs"),
    ]:  # fmt: skip
        refused = httpx.request(method, served.url + path, json={} if method == "POST" else None, headers=headers)
        assert (path, refused.status_code) == (path, 401)
    assert httpx.get(f"{served.url}/health").status_code == 200
    assert before.models()
    before.close()


def test_weights_of_another_shape_are_refused_by_name_before_a_byte_is_sent(served):
    servers = served.student("fits")
    servers.update_weights(servers.learner.policy, 1)
    version = servers.servers[0].weight_version()
    servers.close()
    found = r"model\.layers\.0\.mlp\.gate_proj\.weight is \[96, 64\] in the student and \[64, 64\] in the engine"
    with pytest.raises(UserError, match=rf"{served.url} was started for a model of another shape: {found}.*No weights"):
        served.student("wide", policy=of_shape(intermediate_size=96))
    with pytest.raises(UserError, match=r"model\.layers\.1\S+ is absent in the student and \[64, 64\] in the engine"):
        served.student("shallow", policy=of_shape(layers=1))
    other = VllmServer(served.url, 60)
    assert other.weight_version() == version
    other.close()


def test_weights_that_vllm_takes_by_mistake_are_nobodys_version(served, tmp_path):
    servers = served.student("mistake")
    policy = servers.learner.policy
    servers.update_weights(policy, 1)
    save_weights(of_shape(intermediate_size=96), tmp_path / "wide")
    server = servers.servers[0]
    # vLLM 0.32 loads what it has room for, and raises nothing.
    server.load_weights(tmp_path / "wide")
    assert server.weight_version() == NO_VERSION
    gives_no_number(server, servers.model)
    # The stage that samples with it hands its weights over again, and verifies them.
    assert gap(policy, servers.sample(PROMPTS, 4, Sampling(16), 1), 1.0) < TOLERANCE


def test_a_server_that_computes_something_else_stops_the_stage(served, monkeypatch):
    servers = served.student("off")
    policy = servers.learner.policy
    drawn = Probe.of

    def off(*arguments: object) -> Probe:
        probe = drawn(*arguments)
        return Probe(probe.tokens, probe.start, [value - 0.13 for value in probe.logprobs], probe.tolerance)

    monkeypatch.setattr(Probe, "of", off)
    message = rf"{served.url} took the weights, but .* 0\.13 nats a token .* tolerance is 0\.001\. Sample with "
    with pytest.raises(UserError, match=message):
        servers.update_weights(policy, 1)
    assert servers.servers[0].weight_version() == NO_VERSION
    gives_no_number(servers.servers[0], servers.model)
    # It would fit the tolerance of a stage in bfloat16, and is what a failed hand-over was seen to give.
    monkeypatch.setattr(Probe, "of", drawn)
    servers.update_weights(policy, 1)
    assert gap(policy, servers.sample(PROMPTS, 4, Sampling(16), 1), 1.0) < TOLERANCE


def test_the_experts_of_a_mixture_follow_to_a_server_too(served):
    servers = served.student("experts", policy=mixture(), url=served.experts.url)
    policy = servers.learner.policy
    for version in range(3):
        servers.update_weights(policy, version)
        assert gap(policy, servers.sample(PROMPTS, 4, Sampling(16), 1), 1.0) < TOLERANCE
        move(policy)


def test_a_load_that_fails_ends_the_server_and_the_second_one_the_stage(served):
    servers = served.student("failed")
    policy, before = servers.learner.policy, served.server.restarts
    servers.update_weights(policy, 1)
    publish, server = servers._student.publish, servers.servers[0]

    def spoilt(*arguments: object) -> None:
        """The files are of another shape than the student."""
        publish(*arguments)
        folder = servers.folder / servers._student.current()["folder"]
        shutil.rmtree(folder)
        save_weights(of_shape(layers=3), folder)

    servers._student.publish = spoilt
    servers.update_weights(policy, 2)
    assert any("no module or parameter named 'layers.2'" in line for line in servers.drain_log())
    # Until its supervisor ends it, it refuses everything; from then on nothing answers at all.
    with pytest.raises(ServerLostError):
        server.weight_version()
    with pytest.raises(ServerLostError):
        server.complete(servers.model, PROMPTS[0], 1, Sampling(4), 0, Ends([2]))
    assert not ask_health(served.url).well
    with pytest.raises(UserError, match=r"cannot load the student's weights, not even after a restart \(.*layers\.2"):
        servers.sample(PROMPTS, 1, Sampling(4), 0)
    eventually(lambda: served.server.restarts == before + 2 and served.server.answered, START_SECONDS)
    servers._student.publish = publish
    for version in (3, 4):
        move(policy)
        servers.update_weights(policy, version)
        assert gap(policy, servers.sample(PROMPTS, 4, Sampling(16), 1), 1.0) < TOLERANCE


def test_after_an_adapter_that_failed_to_load_no_number_is_given(served, tmp_path):
    servers = served.student("adapter", LORA)
    policy = servers.learner.policy
    servers.update_weights(policy, 1)
    assert gap(policy, servers.sample(PROMPTS, 4, Sampling(16), 1), 1.0) < TOLERANCE
    server, name = servers.servers[0], str(servers._student.current()["name"])
    folder = tmp_path / "adapter"
    policy.model.save_pretrained(folder, save_embedding_layers=False, selected_adapters=["default"])
    file = folder / "adapter_model.safetensors"
    whole = file.read_bytes()
    # vLLM 0.32 takes an adapter of which each tensor has one column; nobody has verified it.
    save_file({key: tensor[:, :1].contiguous() for key, tensor in load_file(file).items()}, file)
    server.load_adapter("narrow", folder)
    assert server.weight_version() == NO_VERSION
    gives_no_number(server, "narrow")
    # Also not with the adapter that was there before.
    gives_no_number(server, name)
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ServerFailedError, match="load_lora_adapter"):
        server.load_adapter("half", folder)
    with pytest.raises(ServerLostError):
        server.complete(name, PROMPTS[0], 1, Sampling(4), 0, Ends([2]))
    assert not ask_health(served.url).well
