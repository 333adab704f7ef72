"""Several processes of one stage: number types, gradients between micro-batches, waits, measurements."""

import json
from pathlib import Path

import pytest

from tests.support.ranks import run_script

LEARNER = """
import json, sys
from functools import partial
from pathlib import Path
import torch
from accelerate.state import AcceleratorState
from torch.distributed.tensor import DTensor
from stages.config.training import SFTConfig
from stages.learner.supervised import cross_entropy
from stages.learner.training import Learner
from stages.learner.update import Row, accumulate, token_weights
from stages.sampling.sampler import sample
from stages.sampling.samples import Sampling
from tests.numerics.conftest import tiny_policy

found = {}
for name, settings in json.loads(sys.argv[2]).items():
    AcceleratorState._reset_state()
    policy = tiny_policy(0, 1.0)
    learner = Learner(policy, SFTConfig(micro_batch_tokens=64, **settings), 10, Path(sys.argv[1]), 0)
    mine = learner.shard([list(range(5, 5 + length)) for length in (40, 30, 20, 50, 12, 9, 9)])
    weights = token_weights([len(row) - 2 for row in mine], "token", learner)
    rows = [Row(row, 2, weight) for row, weight in zip(mine, weights)]
    inner, shards, norms = learner.backward, [], []

    def backward(loss):
        inner(loss)
        if learner.sharded:
            grads = [parameter.grad for parameter in policy.model.parameters()]
            whole = sum(p.numel() for p in policy.model.parameters())
            assert all(isinstance(grad, DTensor) and grad.dtype == torch.float32 for grad in grads), grads
            shards.append(sum(grad.to_local().numel() for grad in grads) / whole)

    learner.backward = backward
    for _ in range(3):
        accumulate(learner, rows, partial(cross_entropy, rows))
        norms.append(learner.update()["grad_norm"])
    with learner.gathered_weights():
        kinds = sorted({str(parameter.dtype) for parameter in policy.model.parameters()})
        # Different numbers of prompts: no process waits for another one's tokens.
        sample(policy, [[7, 8, 9]] * (1 + learner.rank), 1, Sampling(4 + 8 * learner.rank), 0)
    kept = sorted({str(parameter.dtype) for parameter in policy.model.parameters()})
    views = None if learner.sharded else learner.module.gradient_as_bucket_view
    found[name] = {"norms": norms, "gathered": kinds, "kept": kept, "shards": shards, "views": views}
if learner.rank == 0:
    print(json.dumps(found))
torch.distributed.destroy_process_group()
"""

STAGE = """
import json, sys, time
from datetime import timedelta
import torch
import stages.learner.training as training
from base.store.checkpoint import Store
from flows.engines.worker import run_spec
from pathlib import Path

seconds = float(sys.argv[2])
commit, write_state = Store.commit, training.write_state

def slow(function):
    def late(*arguments):
        time.sleep(seconds)
        return function(*arguments)
    return late

Store.commit, training.write_state = slow(commit), slow(write_state)
code = run_spec(Path(sys.argv[1]))
limit = torch.distributed.distributed_c10d._get_default_group()._get_backend(torch.device("cpu")).options._timeout
print(json.dumps({"code": code, "limit": limit.total_seconds()}))
sys.exit(code)
"""

MONITOR = """
import json, sys
from experts.loading import load_domain
from evals.measure.monitor import Monitor
from stages.config.on_policy import MonitorConfig
from tests.numerics.conftest import tiny_policy
import torch
from stages.learner.device import accelerator

accelerator()
domains = {name: load_domain(name, "strings", {"task": name}) for name in ("sort", "reverse")}
sampled = []
for domain in domains.values():
    domain.score = lambda example, completion: sampled.append(1) or (len(completion) + len(example.prompt)) % 7 / 6
found = Monitor(domains, MonitorConfig(examples=9), max_new_tokens=6)(tiny_policy(3), 0)
print(json.dumps({"scores": found, "scored": len(sampled)}), flush=True)
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
"""


def answers(script: str, folder: Path, processes: int, *arguments: str) -> list[dict]:
    """The JSON object that each of a script's processes prints."""
    file = folder / "script.py"
    file.write_text(script)
    printed = run_script(file, arguments, processes)
    return [json.loads(text[text.index("{") :]) for text in printed if "{" in text]


@pytest.fixture(scope="module")
def learners(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """Three updates by two processes, with every sharding, number type and checkpointing."""
    settings = {
        f"{sharding} {dtype}{' checkpointed' if again else ''}": {
            "sharding": sharding,
            "dtype": dtype,
            "gradient_checkpointing": again,
        }
        for sharding in ("none", "fsdp")
        for dtype in ("float32", "bfloat16")
        for again in (False, True)
    }
    folder = tmp_path_factory.mktemp("learners")
    (found,) = answers(LEARNER, folder, 2, str(folder), json.dumps(settings))
    return found


def test_no_process_keeps_whole_gradients_between_micro_batches(learners):
    for name in ("fsdp float32", "fsdp bfloat16"):
        # Three updates of two or more micro-batches.
        assert len(learners[name]["shards"]) >= 6
        assert all(0.45 < share < 0.55 for share in learners[name]["shards"])


def test_gathered_weights_have_the_stage_s_number_type_and_shards_stay_float32(learners):
    assert learners["fsdp bfloat16"]["gathered"] == ["torch.bfloat16"]
    assert learners["fsdp float32"]["gathered"] == ["torch.float32"]
    assert all(found["kept"] == ["torch.float32"] for found in learners.values())


def test_shards_make_the_updates_of_whole_copies(learners):
    assert learners["fsdp float32"]["norms"] == pytest.approx(learners["none float32"]["norms"], rel=1e-5)
    assert learners["fsdp bfloat16"]["norms"] == pytest.approx(learners["none float32"]["norms"], rel=1e-2)
    assert learners["fsdp bfloat16"]["norms"] != learners["fsdp float32"]["norms"]


def test_recomputed_activations_change_no_update(learners):
    for name in ("none float32", "none bfloat16", "fsdp float32", "fsdp bfloat16"):
        assert learners[f"{name} checkpointed"]["norms"] == pytest.approx(learners[name]["norms"], rel=1e-5)


def test_gradients_of_whole_copies_are_views_of_their_buckets(learners):
    assert learners["none float32"]["views"] is True


def test_the_others_wait_longer_for_the_main_process_than_a_collective_may_take(tmp_path):
    limit = 6.0
    node = {
        "name": "k",
        "key": "k",
        "stage": "pretrain",
        "seed": 0,
        "config": {
            "max_steps": 2,
            "examples": 30,
            "batch_tokens": 200,
            "save_every": 1,
            "model": {"hidden_size": 32, "layers": 1},
        },
        "parents": {},
        "domains": {"sort": {"kind": "strings", "options": {"task": "sort"}}},
        "provenance": {"stage": "test"},
    }
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps({"home": str(tmp_path), "threads": 1, "nodes": [node], "timeout_minutes": limit / 60}))
    found = answers(STAGE, tmp_path, 2, str(spec), str(1.5 * limit))
    assert found == [{"code": 0, "limit": limit}] * 2


def test_processes_share_the_monitor_s_examples_and_get_the_scores_of_one(tmp_path):
    (alone,) = answers(MONITOR, tmp_path, 1)
    two = answers(MONITOR, tmp_path, 2)
    assert alone["scored"] == 18
    assert [found["scored"] for found in two] == [9, 9]
    assert all(found["scores"] == alone["scores"] for found in two)
    assert 0 < alone["scores"]["score/sort"] < 1
