"""Real vLLM servers, two that a stage samples with and one it is taught by, started as the pipeline starts them."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch

import stages.distill
from base.errors import UserError
from base.store.checkpoint import Artifact, Store
from base.store.journal import read
from evals.measure.monitor import Monitor
from experts.loading import load_domain
from flows.engines.fork_client import ForkServer, child_environment
from flows.engines.vllm_commands import rollout_servers, teacher_servers
from flows.engines.vllm_servers import VllmServers
from flows.run_file.resources import ResourcesConfig
from stages.config.distill import DistillConfig
from stages.config.on_policy import MonitorConfig, SamplerConfig
from stages.config.training import LoraConfig, OptimizerConfig
from stages.learner.training import Learner
from stages.learner.update import Row
from stages.learner.workspace import Workspace
from stages.model.policy import load_policy
from stages.sampling.sampler import sample
from stages.sampling.samples import Sample, Sampling
from stages.teachers.remote_teachers import RemoteTeachers
from stages.teachers.scoring import Routed, TeacherPool
from stages.vllm.remote_sampler import RemoteSampler
from stages.vllm.settings import rows_at_a_time
from tests.support.chance import score_by_chance
from tests.support.processes import eventually
from tests.support.vllm_measures import adapter_of
from tests.support.vllm_scenario import (
    LONG,
    PROMPTS,
    cut_by_a_string,
    ends,
    gap,
    make_policy,
    move,
    random_checkpoint,
    tokens,
)

TOLERANCE = 1e-4
UPDATES = 3
TOP = 5
LORA = LoraConfig(rank=12)
SORT = {"sort": load_domain("sort", "strings", {"task": "sort"})}
# Three servers that load side by side are up long before; only a machine that hangs takes so long.
START_SECONDS = 900
pytestmark = pytest.mark.vllm


@dataclass
class Served:
    """The servers and what they serve."""

    store: Store
    group: VllmServers
    start: Artifact
    teachers: list[Artifact]
    samplers: list[RemoteSampler] = field(default_factory=list)

    def workspace(self, key: str, parents: dict[str, Artifact] | None = None, rollout: int = 2) -> Workspace:
        urls = {**self.group.urls, "rollout": self.group.urls["rollout"][:rollout]}
        return Workspace(self.store, key, key, 0, parents or {}, SORT, {}, urls)

    def student(self, key: str, config: DistillConfig, rollout: int = 2) -> tuple[Learner, RemoteSampler]:
        place = self.workspace(key, rollout=rollout)
        learner = Learner(make_policy(config.lora), config, 10, place.progress, 0)
        self.samplers.append(RemoteSampler(learner, config, place))
        return learner, self.samplers[-1]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Two rollout servers and one with three teachers; restarted when they end, as a run does."""
    home = tmp_path_factory.mktemp("home")
    store, resources = Store(home), ResourcesConfig(rollout_servers={"count": 2})
    start = random_checkpoint(store, "start", 0)
    teachers = [start, *(adapter_of(store, start, name, LORA, seed) for seed, name in ((1, "sorter"), (2, "other")))]
    rollout = rollout_servers(DistillConfig(lora=LORA), start, store, resources)
    teaching = teacher_servers(
        DistillConfig(objective={"type": "reverse_kl", "top_k": {"k": TOP}}, teacher_backend="vllm_server"),
        teachers,
        store,
        resources,
    )
    fork_server = ForkServer(home / "fork.log", child_environment(1), preload=())
    over = threading.Event()
    with VllmServers([*rollout, *teaching], home) as group:

        def tend() -> None:
            while not over.wait(0.2):
                group.tend()

        group.start(fork_server)
        thread = threading.Thread(target=tend)
        thread.start()
        try:
            eventually(group.ready, within=START_SECONDS)
            yield Served(store, group, start, teachers)
        finally:
            over.set()
            thread.join()
    fork_server.close()


@pytest.fixture(autouse=True)
def let_go(served: Served) -> Iterator[None]:
    """A test that fails keeps no other from the servers."""
    yield
    while served.samplers:
        served.samplers.pop().close()


def ends_as_it_should(one: Sample, eos_id: int, limit: int) -> bool:
    """With EOS and nothing after it, or as long as allowed."""
    ended = eos_id in one.completion_ids
    return one.finished == ended and (one.completion_ids.index(eos_id) + 1 if ended else limit) == len(
        one.completion_ids
    )


def config_of(**changes: object) -> DistillConfig:
    return DistillConfig(**{"sampler": SamplerConfig(backend="vllm_server", timeout_seconds=600), **changes})


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_servers_follow_the_weights(served, lora):
    learner, servers = served.student(f"follow-{lora is None}", config_of(lora=lora))
    policy = learner.policy
    for update in range(1 + UPDATES):
        servers.update_weights(policy, update)
        greedy = servers.sample(PROMPTS, 2, Sampling(16, 0.0), 0)
        drawn = servers.sample(PROMPTS, 4, Sampling(16, 1.0), 1)
        assert tokens(greedy) == tokens(sample(policy, PROMPTS, 2, Sampling(16, 0.0), 0))
        assert gap(policy, greedy, 0.0) < TOLERANCE
        cut, own_cut = cut_by_a_string(policy, greedy, 16)
        cut_there = servers.sample(PROMPTS, 1, cut, 0)
        assert (tokens(cut_there), ends(cut_there)) == (tokens(own_cut), ends(own_cut))
        assert gap(policy, cut_there, 0.0) < TOLERANCE
        assert gap(policy, drawn, 1.0) < TOLERANCE
        # More to read in all than one forward pass takes.
        assert gap(policy, servers.sample(LONG, 8, Sampling(8), 2), 1.0) < TOLERANCE
        assert tokens(drawn) == tokens(servers.sample(PROMPTS, 4, Sampling(16, 1.0), 1))
        assert len({tuple(one.completion_ids) for one in drawn[0]}) > 1
        assert {one.version for group in drawn for one in group} == {update}
        assert all(ends_as_it_should(one, policy.eos_id, 16) for group in drawn for one in group)
        move(policy)
        assert gap(policy, drawn, 1.0) > 0.1
    assert servers.drain_log() == []
    servers.close()
    assert not servers.folder.exists()


def test_teachers_on_a_server_say_what_they_say_here(served):
    config = DistillConfig(
        objective={"type": "reverse_kl", "top_k": {"k": TOP}},
        teacher_backend="vllm_server",
        sampler=SamplerConfig(timeout_seconds=600),
    )
    student = make_policy(None)
    names = {teacher.key: teacher.name for teacher in served.teachers}
    remote = RemoteTeachers(served.group.urls["teachers"], names, config, student.head_VH.shape[0])
    routes = {teacher.key: (Routed(teacher),) for teacher in served.teachers}
    drawn = sample(student, PROMPTS, 3, Sampling(12), 0)
    rows = [
        Row(one.tokens, len(one.prompt_ids), torch.ones(len(one.completion_ids))) for group in drawn for one in group
    ]
    domains = [served.teachers[i % 3].key for i in range(len(rows))]
    here = TeacherPool(routes, served.store, student, DistillConfig()).score(rows, domains)
    there = TeacherPool(routes, served.store, student, config, remote=remote).score(rows, domains)
    every = list(range(len(rows)))
    tokens_N = torch.tensor([token for row in rows for token in row.targets])
    mine_N, theirs_N = (scores.logprobs(every, tokens_N, 1.0) for scores in (there, here))
    torch.testing.assert_close(mine_N, theirs_N, rtol=TOLERANCE, atol=TOLERANCE)
    mine_NV, theirs_NV = (scores.logits(every)(slice(None)).log_softmax(-1) for scores in (there, here))
    likeliest_NK = theirs_NV.topk(TOP).indices
    torch.testing.assert_close(
        mine_NV.gather(1, likeliest_NK), theirs_NV.gather(1, likeliest_NK), rtol=TOLERANCE, atol=TOLERANCE
    )
    assert torch.equal(mine_NV.topk(TOP).values.sort().values, mine_NV.gather(1, likeliest_NK).sort().values)
    # Three teachers that differ, each asked about its own rows.
    other = TeacherPool(routes, served.store, student, DistillConfig()).score(rows, domains[1:] + domains[:1])
    assert (other.logprobs(every, tokens_N, 1.0) - mine_N).abs().max() > 0.1
    assert set(there.seconds) == set(names.values())
    assert remote.drain_log() == []
    remote.close()


def test_a_teacher_no_server_has_is_named(served):
    config = DistillConfig(objective="sampled_reverse_kl", teacher_backend="vllm_server")
    with pytest.raises(UserError, match=r"no server serves caesar \(abc\); they serve start, .*`mopd serve teachers`"):
        RemoteTeachers(served.group.urls["teachers"], {"abc": "caesar"}, config, 113)


def test_a_server_of_another_kind_is_refused(served):
    with pytest.raises(UserError, match=r"mode raw_logprobs; temperature 0\.7 needs --logprobs-mode processed"):
        served.student("warm", config_of(temperature=0.7))


@pytest.mark.parametrize("ahead", [False, True], ids=["in step", "ahead"])
def test_a_merge_with_rollouts_and_teachers_on_servers(served, ahead, monkeypatch):
    monkeypatch.setattr(SORT["sort"], "score", score_by_chance)
    config = config_of(
        lora=LORA,
        max_steps=6,
        examples=40,
        prompts_per_step=8,
        max_new_tokens=8,
        optimizer=OptimizerConfig(learning_rate=3e-3),
        objective={"type": "reverse_kl", "top_k": {"k": TOP}},
        teacher_backend="vllm_server",
        sampler=SamplerConfig(backend="vllm_server", timeout_seconds=600, ahead=ahead),
    )
    place = served.workspace(f"merge-{ahead}", {"start": served.start, "teacher/sort": served.teachers[1]})
    watch = Monitor(SORT, MonitorConfig(every=3, examples=20), config.max_new_tokens)
    student = stages.distill.train(config, place, watch)
    records = list(read(place.folder / "journal.jsonl"))
    logged = [record["values"] for record in records if record["kind"] == "metrics"]
    metrics = [values for values in logged if "distill/reverse_kl" in values]
    assert len(metrics) == 6
    # The servers score the student after each third step; the trainer's model does while they draw ahead.
    curve = [values["distill/score/sort"] for values in logged if "distill/score/sort" in values]
    assert len(curve) == 3
    assert curve[-1] == pytest.approx(watch(load_policy(student, served.store), 6)["score/sort"])
    assert metrics[-1]["distill/reverse_kl"] < metrics[0]["distill/reverse_kl"]
    assert [values["distill/staleness"] for values in metrics] == [0.0] + [float(ahead)] * 5
    assert {values["distill/stale"] for values in metrics} == {0.0}
    in_step = metrics[:1] if ahead else metrics
    # In every step, also where what was drawn tells of older weights.
    assert 0 < max(values["distill/mismatch_max"] for values in metrics) < TOLERANCE
    assert all(0 < values["distill/mismatch"] <= values["distill/mismatch_max"] for values in metrics)
    # Ahead, the trainer is a batch of updates further from the second step on.
    drift = [values["distill/drift"] for values in metrics if "distill/drift" in values]
    assert len(drift) == len(metrics) - len(in_step)
    assert not drift or max(drift) > TOLERANCE
    assert {record["weights"] for record in records if record["kind"] == "sample"} == {0}
    before, after = [record["text"] for record in records if record["kind"] == "note"]
    assert before.startswith("preflight: sampler and trainer agree within")
    assert after.startswith("preflight after the first update: sampler and trainer agree within")
    assert not (place.folder / "rollout-weights").exists()


def test_two_servers_share_the_prompts_and_one_that_is_lost_leaves_them_to_the_other(served):
    learner, servers = served.student("shared", config_of(lora=LORA))
    prompts = [[5 + i % 90, 6 + i % 80, 7] for i in range(400)]
    servers.update_weights(learner.policy, 1)
    asked: dict[str, int] = {}
    under_way = threading.Event()

    def counting(server):
        drew = server.complete

        def complete(*arguments):
            answer = drew(*arguments)
            asked[server.url] = asked.get(server.url, 0) + 1
            under_way.set()
            return answer

        server.complete = complete

    for server in servers.servers:
        counting(server)
    expected = tokens(sample(learner.policy, prompts, 1, Sampling(60, 0.0), 0))
    assert tokens(servers.sample(prompts, 1, Sampling(60, 0.0), 0)) == expected
    assert servers.drain_log() == []
    # Each was dealt its share, however slow; the rest went to whoever was quicker.
    assert set(asked) == set(served.group.urls["rollout"]) and min(asked.values()) >= rows_at_a_time(servers.config)

    asked.clear()
    under_way.clear()
    lost = served.group.servers[0]
    before = lost.restarts
    killer = threading.Thread(target=lambda: (under_way.wait(), os.kill(lost.child.pid, signal.SIGKILL)))
    killer.start()
    assert tokens(servers.sample(prompts, 1, Sampling(60, 0.0), 0)) == expected
    killer.join()
    assert any(line.startswith(f"lost: {lost.url}") for line in servers.drain_log())
    # It comes back without weights and is handed an adapter's base and the adapter before it is asked again.
    eventually(lambda: lost.restarts == before + 1 and lost.answered, within=600)
    move(learner.policy)
    asked.clear()
    servers.update_weights(learner.policy, 2)
    assert tokens(servers.sample(prompts, 1, Sampling(60, 0.0), 0)) == tokens(
        sample(learner.policy, prompts, 1, Sampling(60, 0.0), 0)
    )
    assert set(asked) == set(served.group.urls["rollout"])
    servers.close()


def test_a_server_killed_in_the_midst_of_a_merge_costs_no_step(served):
    config = config_of(
        max_steps=8,
        examples=40,
        prompts_per_step=8,
        max_new_tokens=8,
        optimizer=OptimizerConfig(learning_rate=3e-3),
        sampler=SamplerConfig(backend="vllm_server", timeout_seconds=600, ahead=True),
    )
    place = served.workspace("merge-killed", {"start": served.start, "teacher/sort": served.teachers[1]}, rollout=1)
    server, journal = served.group.servers[0], place.folder / "journal.jsonl"
    before = server.restarts

    def steps() -> list[dict]:
        return [r["values"] for r in read(journal) if r["kind"] == "metrics"] if journal.exists() else []

    killer = threading.Thread(target=lambda: (eventually(lambda: len(steps()) >= 2, 600), os.kill(server.child.pid, 9)))
    killer.start()
    stages.distill.train(config, place)
    killer.join()
    assert server.restarts == before + 1
    metrics = steps()
    assert len(metrics) == 8 and {values["distill/stale"] for values in metrics} == {0.0}
    assert any(r["text"].startswith("lost: ") for r in read(journal) if r["kind"] == "note")
    # Also after it was handed the weights anew it draws with the student's.
    assert max(values["distill/mismatch_max"] for values in metrics if "distill/mismatch_max" in values) < TOLERANCE
    assert metrics[-1]["distill/reverse_kl"] < metrics[0]["distill/reverse_kl"]


def test_a_server_killed_in_the_middle_of_a_step_costs_what_it_had_not_answered(served):
    learner, servers = served.student("killed", config_of(), rollout=1)
    prompts = [[5 + i % 90, 6 + i % 80, 7] for i in range(600)]
    servers.update_weights(learner.policy, 1)
    rollout = served.group.servers[0]
    restarts = rollout.restarts
    answered = threading.Event()
    drew = servers.servers[0].complete

    def complete(*arguments):
        answer = drew(*arguments)
        answered.set()
        return answer

    servers.servers[0].complete = complete
    before = rollout.child.pid

    def kill() -> None:
        answered.wait()
        time.sleep(0.3)
        os.kill(before, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    drawn = servers.sample(prompts, 1, Sampling(100, 0.0), 0)
    thread.join()
    assert rollout.restarts == restarts + 1
    assert tokens(drawn) == tokens(sample(learner.policy, prompts, 1, Sampling(100, 0.0), 0))
    assert {one.version for (one,) in drawn} == {1}
    news = servers.drain_log()
    assert any(line.startswith("lost: ") for line in news)
    # Of a server that comes back slowly more than once.
    missing = [int(line.split(" ")[0]) for line in news if "asked again" in line]
    assert 0 < missing[0] < len(prompts) and missing == sorted(missing, reverse=True)
    servers.close()
