"""A sharded student and servers: weights are gathered tensor by tensor, and whole only where something samples here.

The servers are stand-ins that load what they are handed into transformers' model and draw with it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONPATH": str(ROOT),
    "HF_HUB_OFFLINE": "1",
}

STAGE = """
import json, sys, threading
from flows.engines.preload import LIBRARIES, preload
preload(LIBRARIES)
from pathlib import Path
import torch
from peft import PeftModel
from safetensors.torch import load_file

import stages.learner.sharding as sharding
import stages.rl
import stages.vllm.remote_sampler as remote_sampler
from base.store.checkpoint import Store
from base.store.journal import read
from experts.loading import load_domain
from stages.config.on_policy import RLConfig, SamplerConfig
from stages.config.training import LoraConfig, OptimizerConfig
from stages.learner.workspace import Workspace
from stages.losses.log_probabilities import token_logprobs
from stages.model.policy import load_policy
from stages.sampling.agreement import plain_logits
from stages.sampling.sampler import sample
from stages.sampling.samples import Sample
from stages.vllm.server import Completion
from stages.vllm.settings import NO_VERSION

home, sharding_of, lora, dtype = Path(sys.argv[1]), sys.argv[2], bool(int(sys.argv[3])), sys.argv[4]
store = Store(home)
start = store.get("base")
lora = LoraConfig(rank=4) if lora else None
key = "-".join(sys.argv[2:])
facts = home / f"server-{key}.json"
# Requests come from several threads, and loading a model is not safe in them.
LOCK = threading.Lock()


class Server:
    def __init__(self, url, timeout):
        self.url, self.loaded, self.policy = url, None, None

    def facts(self):
        return json.loads(facts.read_text()) if facts.exists() else {"version": NO_VERSION}

    def keep(self, **more):
        facts.write_text(json.dumps(self.facts() | more))

    def healthy(self):
        return True

    def weight_version(self):
        return self.facts()["version"]

    def set_weight_version(self, version):
        self.keep(version=version)

    def base_model(self):
        return "student"

    def context(self):
        return 512

    def setting(self, group, name):
        of = {"dtype": dtype, "logprobs_mode": "raw_logprobs", "model": str(start.path), "max_lora_rank": 16}
        return of[name] if name in of else None

    def models(self):
        return {"student": {}}

    def load_weights(self, folder):
        self.keep(folder=str(folder), loads=self.facts().get("loads", 0) + 1)

    def load_adapter(self, name, folder):
        self.keep(adapter=str(folder))

    def model(self):
        now = self.facts()
        if self.loaded != now:
            # A server has no part in the trainer's autocast.
            with torch.autocast("cpu", enabled=False):
                self.loaded, self.policy = now, load_policy(start, store)
            model = self.policy.model
            weights = {n: t for f in sorted(Path(now["folder"]).glob("*.safetensors")) for n, t in load_file(f).items()}
            assert {t.dtype for t in weights.values() if t.dim() > 1} == {getattr(torch, dtype)}
            model.load_state_dict(weights, strict=False)
            if "adapter" in now:
                self.policy.model = PeftModel.from_pretrained(model, now["adapter"]).eval()
        return self.policy

    def score(self, name, tokens, start, top, probe=False):
        drawn = Sample(list(tokens[:start]), list(tokens[start:]), torch.zeros(len(tokens) - start), False)
        found = token_logprobs(plain_logits(self.model().model, drawn, dtype), torch.tensor(drawn.completion_ids))
        return [{token: float(value)} for token, value in zip(drawn.completion_ids, found)]

    def complete(self, name, prompt, count, sampling, seed, ends):
        with LOCK:
            (group,) = sample(self.model(), [prompt], count, sampling, seed % 2**31)
        return [Completion(s.completion_ids, s.logprobs_N.tolist(), False) for s in group]

    def close(self):
        pass


remote_sampler.VllmServer = Server
gathered, inner = [], sharding.gathered


def counted(module):
    gathered.append(1)
    return inner(module)


sharding.gathered = counted
domains = {"upper": load_domain("upper", "strings", {"task": "uppercase", "partial": True})}
config = RLConfig(
    max_steps=4, examples=50, optimizer=OptimizerConfig(learning_rate=1e-3), prompts_per_step=4, group_size=4,
    max_new_tokens=8, lora=lora, dtype=dtype, sharding=sharding_of, sampler=SamplerConfig(backend="vllm_server"),
)
space = Workspace(store, key, key, 0, {"start": start}, domains, {"stage": "test"}, {"rollout": ["http://127.0.0.1:1"]})
made = stages.rl.train(config, space)
if torch.distributed.get_rank() == 0:
    # A step without any signal has no update.
    steps = [r["values"] for r in read(space.folder / "journal.jsonl") if r["kind"] == "metrics"]
    told = {name: [s[f"rl/{name}"] for s in steps if f"rl/{name}" in s] for name in ("mismatch", "reward", "grad_norm")}
    assert made.key == key
    print(json.dumps({"gathered": len(gathered), "loads": json.loads(facts.read_text())["loads"], **told}))
torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from base.store.checkpoint import Store
    from stages.learner.workspace import Workspace
    from stages.rows.trained_on import TrainedOn
    from tests.numerics.conftest import tiny_policy

    folder = tmp_path_factory.mktemp("home")
    store = Store(folder)
    staged = store.staging("base")
    tiny_policy(0).save(staged)
    Workspace(store, "base", "base", 0, {}, {}, {"stage": "test"}).commit(staged, trained_on=TrainedOn(), metrics={})
    (folder / "stage.py").write_text(STAGE)
    return folder


def run(home: Path, sharding: str, lora: bool, dtype: str) -> dict:
    """What a stage of two processes reports."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(home / "stage.py"), str(home)]
    command = [sys.executable, *launch, sharding, str(int(lora)), dtype]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("lora", [False, True])
def test_servers_follow_a_sharded_student_that_is_never_whole_during_a_step(home, lora):
    shards, copies = (run(home, sharding, lora, "float32") for sharding in ("fsdp", "none"))
    # The preflight, and its repetition after the first update.
    assert shards["gathered"] == 2
    # Before the first step, and in each of four; an adapter's base once.
    assert shards["loads"] == copies["loads"] == (1 if lora else 5)
    assert len(shards["mismatch"]) > 1
    assert max(shards["mismatch"]) < 1e-4
    assert shards["reward"] == pytest.approx(copies["reward"], abs=1e-3)
    assert shards["grad_norm"] == pytest.approx(copies["grad_norm"], rel=1e-2)


def test_a_sharded_student_of_bfloat16_is_handed_over_in_it(home):
    found = run(home, "fsdp", False, "bfloat16")
    assert (found["gathered"], found["loads"]) == (2, 5)
    assert len(found["mismatch"]) > 1
    assert max(found["mismatch"]) < 0.05
