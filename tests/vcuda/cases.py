"""The product's stages on a pretended CUDA device, one case each.

    python -m tests.vcuda.cases [--counts] [NAME ...]

prints a JSON object: case -> what was mixed, the number of operations on the device, and the error if it failed.
With `--counts` synchronisations and products by number type are in it too. A process of its own: torch is patched.
"""

import argparse
import functools
import json
import logging
import os
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState

import evals.measure.evaluate
import evals.measure.monitor
import evals.measure.shift
import evals.measure.task_vectors
import stages.distill
import stages.load
import stages.merge
import stages.on_policy.signals
import stages.pretrain
import stages.rft
import stages.rl
import stages.sft
from base.store.checkpoint import Artifact, Store
from base.store.source import Source
from experts.loading import load_domain
from stages.config.distill import DistillConfig
from stages.config.evaluation import EvaluationConfig
from stages.config.kinds import NoConfig
from stages.config.merge import WeightMergeConfig
from stages.config.on_policy import MonitorConfig, RFTConfig, RLConfig
from stages.config.training import LoraConfig, OptimizerConfig, PretrainConfig, SFTConfig, TinyModelConfig
from stages.learner.workspace import Workspace
from tests.vcuda.device import pretend, record, watching
from tests.vcuda.families import FAMILIES, random_model
from tests.vcuda.faults import FAULTS, HARMLESS
from tests.vcuda.labels import label
from tests.vcuda.special import last_bits, remote_scores, resumed

NAMES = ("sort", "reverse", "uppercase")
BASE: Mapping[str, Any] = {
    "max_steps": 1,
    "examples": 24,
    "save_every": 1,
    "optimizer": OptimizerConfig(learning_rate=1e-3),
}
ON_POLICY: Mapping[str, Any] = BASE | {"prompts_per_step": 6, "max_new_tokens": 5}
MODEL = TinyModelConfig(hidden_size=32, layers=2, heads=2, intermediate_size=32, max_length=64)
PRETRAIN = PretrainConfig(**BASE, batch_tokens=200, model=MODEL)
LORA = LoraConfig(rank=2)
# Work that needs no device: it reads weights, computes tensor by tensor and writes.
ON_THE_HOST = ("load", "merge-", "cosines")

TWO_STEPS = {"max_steps": 2}
# Wide enough for moments in 8 bits: tensors of fewer than 4096 values keep float32.
WIDE = MODEL.model_copy(update={"hidden_size": 64, "intermediate_size": 64})
EIGHT_BITS = OptimizerConfig(learning_rate=1e-3, states="8bit")
NARROW = PRETRAIN.model_copy(update=TWO_STEPS | {"model": WIDE, "optimizer": EIGHT_BITS})


class Bench:
    """A store with checkpoints for the cases."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.store = Store(home)
        options = {"min_length": 3, "max_length": 3}
        self.domains = {name: load_domain(name, "strings", {"task": name} | options) for name in NAMES}
        # Rows of several lengths, so that some share a line.
        self.domains["mixed"] = load_domain("mixed", "strings", {"task": "sort", "min_length": 2, "max_length": 12})

    def place(self, key: str, parents: Mapping[str, Artifact], names: Sequence[str] = NAMES) -> Workspace:
        """The workspace of a case or of one of its stages."""
        AcceleratorState._reset_state(reset_partial_state=True)
        return Workspace(self.store, key, key, 0, parents, {name: self.domains[name] for name in names}, {"stage": "t"})

    @functools.cached_property
    def start(self) -> Artifact:
        return stages.pretrain.train(PRETRAIN, self.place("start", {}))

    @functools.cached_property
    def other(self) -> Artifact:
        return self.sft("other", self.start, "reverse")

    @functools.cached_property
    def adapters(self) -> tuple[Artifact, Artifact]:
        return tuple(self.sft(f"adapter-{name}", self.start, name, lora=LORA) for name in ("sort", "reverse"))

    def sft(self, key: str, start: Artifact, *names: str, **over: Any) -> Artifact:
        config = SFTConfig(**{**BASE, "batch_size": 8, **over})
        return stages.sft.train(config, self.place(key, {"start": start}, names or NAMES))

    def rl(self, key: str, start: Artifact, *names: str, **over: Any) -> Artifact:
        config = RLConfig(**{**ON_POLICY, "group_size": 3, "updates_per_batch": 2, **over})
        return stages.rl.train(config, self.place(key, {"start": start}, names or ("reverse",)))

    def rft(self, key: str, **over: Any) -> Artifact:
        config = RFTConfig(**{**ON_POLICY, "group_size": 3, "pass_score": 0.01, **over})
        return stages.rft.train(config, self.place(key, {"start": self.start}, ["sort"]))

    def distill(self, key: str, parents: Mapping[str, Artifact] | None = None, monitor: bool = False, **over: Any):
        """A merge; by default of two teachers with a domain each."""
        start, other = self.start, self.other
        mine = parents or {"teacher/sort": start, "teacher/reverse": other}
        names = dict.fromkeys(role.split("/")[1] for role in mine if role != "start")
        space = self.place(key, {"start": start, **mine}, list(names))
        watch = evals.measure.monitor.Monitor(space.domains, MonitorConfig(every=1, examples=2), 5) if monitor else None
        return stages.distill.train(DistillConfig(**{**ON_POLICY, **over}), space, monitor=watch)

    def merged(self, key: str, method: str) -> Artifact:
        parents = {"start": self.start, "teacher/a": self.other, "teacher/b": self.adapters[0]}
        return stages.merge.run(WeightMergeConfig(method=method), self.place(key, parents, []))

    def evaluate(self, key: str, checkpoint: Artifact, **over: Any) -> None:
        config = EvaluationConfig(**{"examples": 4, "samples": 2, "max_new_tokens": 5, **over})
        space = self.place(key, {"checkpoint": checkpoint}, ["sort"])
        request = evals.measure.evaluate.EvaluationRequest(space, config, "sort", "held_out")
        evals.measure.evaluate.evaluate([request], checkpoint, self.store)

    def shift(self, key: str, checkpoint: Artifact, **over: Any) -> None:
        space = self.place(key, {"start": self.start, "checkpoint": checkpoint}, ["sort"])
        config = evals.measure.shift.ShiftRequest(examples=4, max_new_tokens=5, batch_size=4, **over)
        evals.measure.shift.run(config, space)

    def imported(self, key: str, family: str) -> Artifact:
        folder = self.home / f"{key}-source"
        random_model(family, folder)
        return stages.load.run(Source("directory", str(folder)), self.place(key, {}, []))

    def family(self, key: str, family: str) -> None:
        """An imported architecture through SFT, RL and a merge."""
        start = self.imported(f"{key}-base", family)
        teacher = self.sft(f"{key}-sft", start, "sort")
        self.rl(f"{key}-rl", start, "reverse", reference_kl=0.1)
        config = DistillConfig(**ON_POLICY)
        parents = {"start": start, "teacher/sort": teacher, "teacher/reverse": start}
        stages.distill.train(config, self.place(f"{key}-merge", parents, ["sort", "reverse"]))

    def harness(self, key: str) -> None:
        """A task of lm-evaluation-harness."""
        import datasets

        from evals.measure.harness import HarnessRequest, evaluate_tasks
        from stages.config.harness import HarnessConfig, HarnessTaskConfig
        from tests.support.harness_home import write_tasks

        datasets.config.HF_DATASETS_CACHE = self.home / "datasets"
        folder = write_tasks(self.home / "tasks")
        for task in ("choice", "text"):
            whole = HarnessConfig(tasks=[task], include_path=str(folder))
            for dtype in ("float32", "bfloat16"):
                config = HarnessTaskConfig.of(whole, task, str(folder / f"{task}.yaml"), EvaluationConfig(dtype=dtype))
                space = self.place(f"{key}-{task}-{dtype}", {"checkpoint": self.start}, [])
                evaluate_tasks([HarnessRequest(space, config)], self.start, self.store)


def cases() -> dict[str, Callable[[Bench, str], Any]]:
    """Every case by name; each is called with the bench and a key of its own."""
    found: dict[str, Callable[[Bench, str], Any]] = {
        "pretrain": lambda b, key: stages.pretrain.train(PRETRAIN, b.place(key, {})),
        "sft": lambda b, key: b.sft(key, b.start, **TWO_STEPS),
        "sft-mask": lambda b, key: b.sft(key, b.start, mask_conflicts={}),
        "sft-packed": lambda b, key: b.sft(key, b.start, "mixed"),
        "sft-packed-bf16": lambda b, key: b.sft(key, b.start, "mixed", dtype="bfloat16"),
        "sft-tf32": rounded_products,
        "sft-bf16": lambda b, key: b.sft(key, b.start, dtype="bfloat16"),
        "sft-bf16-lora": lambda b, key: b.sft(key, b.start, dtype="bfloat16", lora=LORA, gradient_checkpointing=True),
        "pretrain-bf16": lambda b, key: stages.pretrain.train(
            PRETRAIN.model_copy(update={"dtype": "bfloat16"}), b.place(key, {})
        ),
        "sft-checkpointing": lambda b, key: b.sft(key, b.start, gradient_checkpointing=True),
        "sft-lora-dropout-checkpointing": lambda b, key: b.sft(
            key, b.start, lora=LoraConfig(rank=2, dropout=0.1), gradient_checkpointing=True
        ),
        "sft-of-an-adapter-in-full": lambda b, key: b.sft(key, b.adapters[0]),
        "sft-of-an-adapter": lambda b, key: b.sft(key, b.adapters[0], lora=LORA),
        "rft": lambda b, key: b.rft(key),
        "rft-lora": lambda b, key: b.rft(key, lora=LORA),
        "evaluate": lambda b, key: b.evaluate(key, b.start),
        "evaluate-bf16": lambda b, key: b.evaluate(key, b.start, dtype="bfloat16"),
        "evaluate-bf16-adapter": lambda b, key: b.evaluate(key, b.adapters[0], dtype="bfloat16"),
        "evaluate-greedy-adapter": lambda b, key: b.evaluate(key, b.adapters[0], samples=0),
        "evaluate-top_p": lambda b, key: b.evaluate(key, b.start, top_p=0.8, temperature=0.7),
        "shift": lambda b, key: b.shift(key, b.other),
        "shift-bf16": lambda b, key: b.shift(key, b.other, dtype="bfloat16"),
        "shift-adapter": lambda b, key: b.shift(key, b.adapters[0]),
        "harness": lambda b, key: b.harness(key),
        "load": lambda b, key: b.imported(key, "llama"),
        "cosines": lambda b, key: evals.measure.task_vectors.run(
            NoConfig(), b.place(key, {"start": b.start, "expert/a": b.other, "expert/b": b.adapters[0]}, [])
        ),
        "remote-scores": lambda b, _: remote_scores(),
        "resume-pretrain": lambda b, key: resumed(
            lambda: stages.pretrain.train(PRETRAIN.model_copy(update=TWO_STEPS), b.place(key, {}))
        ),
        "resume-pretrain-8bit": lambda b, key: resumed(lambda: stages.pretrain.train(NARROW, b.place(key, {}))),
        "resume-sft-lora": lambda b, key: resumed(lambda: b.sft(key, b.start, lora=LORA, **TWO_STEPS)),
        "resume-rl-kl": lambda b, key: resumed(lambda: b.rl(key, b.start, reference_kl=0.1, **TWO_STEPS)),
        "resume-distill": lambda b, key: resumed(lambda: b.distill(key, **TWO_STEPS)),
    }
    for method in ("weight_average", "task_arithmetic", "ties", "dare_linear", "dare_ties"):
        found[f"merge-{method}"] = functools.partial(Bench.merged, method=method)
    found |= {f"family-{name}": functools.partial(Bench.family, family=name) for name in FAMILIES}
    return found | _rl_cases() | _distill_cases()


def _rl_cases() -> dict[str, Callable[[Bench, str], Any]]:
    settings: dict[str, dict[str, Any]] = {
        "": {},
        "-bf16": {"dtype": "bfloat16"},
        "-kl": {"reference_kl": 0.1},
        "-bf16-kl-lora": {"dtype": "bfloat16", "reference_kl": 0.1, "lora": LORA},
        "-lora": {"lora": LORA},
        "-lora-kl": {"reference_kl": 0.1, "lora": LORA},
        "-top_p": {"top_p": 0.9, "temperature": 0.7},
        "-sequences": {"loss_normalisation": "sequence"},
    }
    found = {f"rl{name}": lambda b, key, over=over: b.rl(key, b.start, **over) for name, over in settings.items()}
    found["rl-mix"] = lambda b, key: b.rl(key, b.start, *NAMES, loss_normalisation="domain", max_domain_share=0.5)
    return found


def _distill_cases() -> dict[str, Callable[[Bench, str], Any]]:
    ratio = {"type": "sampled_reverse_kl"}
    settings: dict[str, dict[str, Any]] = {
        "": {},
        "-bf16": {"dtype": "bfloat16"},
        "-cache-on-the-host": {"teacher_cache": "cpu", "max_resident": 1, "updates_per_batch": 2},
        "-lora": {"lora": LORA},
        "-monitor": {"monitor": True},
        "-chunks": {"objective": {"type": "reverse_kl", "chunk_tokens": 3}},
        "-teachers-write": {"on_policy_fraction": 0.5},
        "-dataset-writes": {"on_policy_fraction": 0.5, "off_policy": "dataset"},
        "-seqkd": {"objective": "imitation", "on_policy_fraction": 0.0},
        "-outcome": {"group_size": 2, "objective": {"type": "reverse_kl", "outcome_weight": 0.5}},
        "-golden": {"objective": {"type": "reverse_kl", "golden_share": 0.2}},
        "-domain-loss": {"loss_normalisation": "domain"},
        "-extrapolation-kl": {"objective": {"type": "reverse_kl", "extrapolation": 1.2, "reference_kl": 0.1}},
    }
    settings |= {f"-{name}": {"objective": name} for name in ("forward_kl", "jsd", "entropy_aware")}
    for importance in ("drop", "truncate", "mask"):
        for level in ("token", "sequence"):
            objective = ratio | {"importance": importance, "importance_level": level, "outcome_weight": 0.5}
            settings[f"-{importance}-{level}"] = {"group_size": 2, "updates_per_batch": 2, "objective": objective}
    for support in ("student", "teacher", "union", "intersection"):
        settings[f"-top_k-{support}"] = {"objective": {"type": "reverse_kl", "top_k": {"k": 4, "support": support}}}
    for remainder in ("renormalise", "correct"):
        settings[f"-top_k-{remainder}"] = {
            "objective": {"type": "reverse_kl", "top_k": {"k": 4, "remainder": remainder}}
        }
    found = {f"distill{name}": lambda b, key, over=over: b.distill(key, **over) for name, over in settings.items()}
    weights = {"teacher_weights": {"sort": {"a": 0.7, "b": 0.3}}}
    several: dict[str, Callable[[Bench], dict[str, Artifact]]] = {
        "several": lambda b: {"teacher/sort/a": b.start, "teacher/sort/b": b.other},
        "adapters": lambda b: {f"teacher/{n}": a for n, a in zip(("sort", "reverse"), b.adapters, strict=True)},
        "read-ahead": lambda b: {"teacher/sort": b.start, "teacher/reverse": b.other, "teacher/uppercase": third(b)},
    }
    found["distill-several"] = lambda b, key: b.distill(key, several["several"](b), **weights)
    found["distill-adapters"] = lambda b, key: b.distill(key, several["adapters"](b))
    found["distill-adapters-lent"] = lambda b, key: b.distill(key, several["adapters"](b), lora=LORA)
    # Three bases, two of which may be in memory: a thread reads the third.
    found["distill-read-ahead"] = lambda b, key: b.distill(key, several["read-ahead"](b), max_resident=2)
    return found


def rounded_products(bench: Bench, key: str) -> None:
    """A stage sets the precision of its process's products, and the next one sets its own."""
    for setting in ("high", "highest"):
        bench.sft(f"{key}-{setting}", bench.start, float32_matmul=setting)
        assert torch.get_float32_matmul_precision() == setting


def third(bench: Bench) -> Artifact:
    """A third full checkpoint."""
    return bench.sft("third", bench.start, "uppercase")


def examine(run: Callable[[], Any]) -> dict[str, Any]:
    """Run something on the device and report it."""
    record.clear()
    error = None
    try:
        with watching():
            run()
    except Exception:  # noqa: BLE001 - reported as the case's result
        error = traceback.format_exc()
    names = ("synchronisations", "products", "moved", "masks") if record.detailed else ()
    counts = {name: getattr(record, name) for name in names}
    mixed = [f"{count} x {operation}, {what}: {line}" for (operation, what, line), count in record.mixed.items()]
    told = {name: _as_lists(counter) for name, counter in counts.items()}
    if record.detailed:
        told["largest"] = [[*key, *value] for key, value in record.largest.items()]
    return {"error": error, "mixed": mixed, "operations": record.operations, **told}


def _as_lists(counter: Counter) -> list[list[Any]]:
    return [[*([key] if isinstance(key, str) else key), count] for key, count in counter.most_common()]


def main() -> int:
    """Run the named cases, or all of them."""
    every = cases()
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--counts", action="store_true", help="also synchronisations and products by number type")
    asked = parser.parse_args()
    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    pretend()
    # As in a stage that leased a device.
    os.environ["CUDA_VISIBLE_DEVICES"] = "0"
    record.detailed = asked.counts
    if asked.counts:
        label()
    # An untrained policy never answers right, and rewards that are all equal teach nothing.
    stages.on_policy.signals.verifiable_rewards = last_bits
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        # Made before the first case, so that none counts another stage's work.
        with watching():
            _ = bench.start, bench.other, bench.adapters
        told = {"faults": {name: examine(fault) for name, fault in FAULTS.items()}}
        told["harmless"] = {name: examine(harmless) for name, harmless in HARMLESS.items()}
        chosen = asked.names or list(every)
        told["cases"] = {name: examine(lambda name=name: every[name](bench, f"case-{name}")) for name in chosen}
    json.dump(told, sys.stdout, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
