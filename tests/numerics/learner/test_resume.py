"""A stage that was cut off and resumed makes the same checkpoint as one that was not, bit for bit."""

import itertools
import json
import pickle
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import stages.distill
import stages.learner.supervised
import stages.on_policy.loop
import stages.pretrain
import stages.rl
import stages.sft
from base.store.checkpoint import Artifact
from base.store.journal import read
from experts.domain import Domain
from stages.config.distill import DistillConfig
from stages.config.on_policy import RLConfig
from stages.config.training import LoraConfig, OptimizerConfig, PretrainConfig, SFTConfig, TinyModelConfig
from stages.learner.workspace import SPENT_FILE, Workspace

DAY_SECONDS = 86400.0
SMALL = {"max_steps": 6, "examples": 60, "save_every": 2}
COSINE = OptimizerConfig(learning_rate=1e-2, schedule="cosine", warmup_steps=2)
ON_POLICY = {**SMALL, "prompts_per_step": 6, "max_new_tokens": 8, "optimizer": COSINE}
STAGES = {
    "pretrain": (
        stages.pretrain.train,
        PretrainConfig(**SMALL, batch_tokens=200, optimizer=COSINE, model=TinyModelConfig(hidden_size=32, layers=2)),
    ),
    # Matrices wide enough for moments in 8 bits.
    "pretrain-8bit": (
        stages.pretrain.train,
        PretrainConfig(
            **SMALL,
            batch_tokens=200,
            optimizer=COSINE.model_copy(update={"states": "8bit"}),
            model=TinyModelConfig(hidden_size=64, layers=2),
        ),
    ),
    "sft": (stages.sft.train, SFTConfig(**SMALL, batch_size=16, optimizer=COSINE)),
    "sft-lora": (stages.sft.train, SFTConfig(**SMALL, batch_size=16, lora=LoraConfig(rank=4, dropout=0.2))),
    "rl": (stages.rl.train, RLConfig(**ON_POLICY, group_size=8, updates_per_batch=2)),
    "distill": (stages.distill.train, DistillConfig(**ON_POLICY)),
    "distill-bfloat16": (stages.distill.train, DistillConfig(**ON_POLICY, dtype="bfloat16")),
    "distill-lora": (stages.distill.train, DistillConfig(**ON_POLICY, lora=LoraConfig(rank=4))),
    "distill-sampled-reward": (
        stages.distill.train,
        DistillConfig(**ON_POLICY, group_size=4, objective={"type": "sampled_reverse_kl", "outcome_weight": 0.5}),
    ),
}


class CutOffError(Exception):
    """Stands for the kill."""


class Scattered(Domain):
    """Rewards every completion of even length, so that untrained policies get mixed rewards."""

    def __init__(self, inner: Domain) -> None:
        super().__init__(inner.name)
        self.inner = inner

    def draw(self, split, count, seed):
        return self.inner.draw(split, count, seed)

    def score(self, example, completion):
        return float(len(completion) % 2 == 0)

    def fingerprint(self):
        return self.inner.fingerprint()


EXTRAS = {"pretrain-8bit": pytest.mark.bitsandbytes}


@pytest.mark.parametrize("name", [pytest.param(name, marks=EXTRAS.get(name, ())) for name in STAGES])
def test_resumed_equals_uninterrupted(
    name: str,
    workspace: Callable[..., Workspace],
    checkpoint: Callable[[str, int], Artifact],
    domains: dict[str, Domain],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train, config = STAGES[name]
    domains = {key: Scattered(domain) for key, domain in domains.items()}
    parents = {} if name.startswith("pretrain") else {"start": checkpoint("start", 0)}
    if name.startswith("distill"):
        parents |= {f"teacher/{domain}": checkpoint(f"teacher-{domain}", i + 1) for i, domain in enumerate(domains)}
    whole = train(config, workspace("whole", parents, domains))
    with monkeypatch.context() as patch, pytest.raises(CutOffError):
        for module in (stages.learner.supervised, stages.on_policy.loop):
            patch.setattr(module, "end_step", cut_after(module.end_step, 5))
        train(config, workspace("cut", parents, domains))
    place = workspace("cut", parents, domains)
    spent = json.loads((place.folder / SPENT_FILE).read_text())["seconds"]
    assert [path.name for path in place.progress.glob("step-*")] == ["step-4"]
    resumed = train(config, place)
    assert resumed.manifest["files"]["model.safetensors" if "lora" not in name else "adapter_model.safetensors"]
    assert resumed.digest == whole.digest
    # Five steps before the cut and two after it.
    assert resumed.manifest["seconds"] > spent > 0
    assert resumed.manifest["tokens"] == whole.manifest["tokens"]
    assert metrics_of(place) == metrics_of(workspace("whole", parents, domains))
    # The stage must have learned something, or equality shows nothing.
    assert parents == {} or whole.digest != parents["start"].digest
    assert any(
        values.get(f"{name.split('-', maxsplit=1)[0]}/grad_norm", 0) > 0 for values in metrics_of(place).values()
    )


class Bomb:
    """Runs a command when it is read as a pickle."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_resuming_reads_no_pickle(
    workspace: Callable[..., Workspace],
    checkpoint: Callable[[str, int], Artifact],
    domains: dict[str, Domain],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """A home may be shared: what somebody else put into a saved state is not run."""
    train, config = STAGES["sft"]
    parents = {"start": checkpoint("start", 0)}
    whole = train(config, workspace("whole", parents, domains))
    with monkeypatch.context() as patch, pytest.raises(CutOffError):
        patch.setattr(stages.learner.supervised, "end_step", cut_after(stages.learner.supervised.end_step, 5))
        train(config, workspace("cut", parents, domains))
    place = workspace("cut", parents, domains)
    (folder,) = place.progress.glob("step-*")
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} == {".safetensors", ".json"}
    mark = tmp_path / "mark"
    pickles = ("custom_checkpoint_0.pkl", "random_states_0.pkl", "optimizer.bin", "scheduler.bin", "shards/.metadata")
    for name in pickles:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(pickle.dumps(Bomb(mark)))
    assert train(config, place).digest == whole.digest
    assert not mark.exists()


def test_a_state_of_an_earlier_version_is_not_read_and_the_stage_begins_anew(
    workspace: Callable[..., Workspace], checkpoint: Callable[[str, int], Artifact], domains: dict[str, Domain]
) -> None:
    train, config = STAGES["sft"]
    parents = {"start": checkpoint("start", 0)}
    whole, place = train(config, workspace("whole", parents, domains)), workspace("old", parents, domains)
    old = place.progress / "step-4"
    old.mkdir(parents=True)
    (old / "stage.json").write_text('{"tokens": 1, "memory": {}}')
    (old / "custom_checkpoint_0.pkl").write_bytes(b"no state")
    assert train(config, place).digest == whole.digest


def test_a_clock_that_jumps_changes_nothing(
    workspace: Callable[..., Workspace],
    checkpoint: Callable[[str, int], Artifact],
    domains: dict[str, Domain],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train, config = STAGES["distill"]
    parents = {"start": checkpoint("start", 0)}
    parents |= {f"teacher/{domain}": checkpoint(f"teacher-{domain}", i + 1) for i, domain in enumerate(domains)}
    whole = train(config, workspace("whole", parents, domains))
    real, jumps = time.time, itertools.cycle((0.0, -DAY_SECONDS, 30 * DAY_SECONDS))
    monkeypatch.setattr(time, "time", lambda: real() + next(jumps))
    with monkeypatch.context() as patch, pytest.raises(CutOffError):
        patch.setattr(stages.on_policy.loop, "end_step", cut_after(stages.on_policy.loop.end_step, 5))
        train(config, workspace("jumping", parents, domains))
    place = workspace("jumping", parents, domains)
    resumed = train(config, place)
    moments = [record["time"] for record in read(place.folder / "journal.jsonl")]
    assert moments != sorted(moments), "the clock did not jump"
    assert resumed.digest == whole.digest
    assert metrics_of(place) == metrics_of(workspace("whole", parents, domains))
    assert 0 < resumed.manifest["seconds"] < DAY_SECONDS


def cut_after(end_step: Callable[..., None], last: int) -> Callable[..., None]:
    def cut(learner, journal, step, total, metrics):
        end_step(learner, journal, step, total, metrics)
        if step == last:
            raise CutOffError

    return cut


def metrics_of(place: Workspace) -> dict[int, dict[str, float]]:
    """Every metric but the clock's."""
    return {
        r["step"]: {name: value for name, value in r["values"].items() if "seconds" not in name}
        for r in read(place.folder / "journal.jsonl")
        if r["kind"] == "metrics"
    }
