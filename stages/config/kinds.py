"""The table of stages: one row each, with all that other modules use. To add one, add its row, its file, its test."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from base.store.source import Source
from stages.config.command import CommandConfig, MergeCommandConfig
from stages.config.distill import DistillConfig
from stages.config.evaluation import EvaluationConfig
from stages.config.harness import HarnessTaskConfig
from stages.config.merge import WeightMergeConfig
from stages.config.on_policy import RFTConfig, RLConfig
from stages.config.shift import ShiftRequest
from stages.config.training import PretrainConfig, SFTConfig, StrictModel


class NoConfig(StrictModel):
    """The config of a stage that has no settings."""


@dataclass(frozen=True)
class StageKind:
    """One kind of stage.

    Attributes:
        name: Its name in nodes, manifests and keys.
        version: Part of the content key: raise it when the algorithm changes, so that old artifacts are not reused.
        config: Makes a config of settings.
        run: `module:function`, called with a config and a workspace; `samples` adds `monitor=`. With `together` it is
            called with a list of nodes' settings and a list of workspaces.
        trains: Has an optimizer, saved states, several devices.
        launches: Runs a program in one process, with all devices of a training stage.
        on_device: Its process uses a device where the run has some; others leave it to stages that do.
        samples: Draws completions from the student while it trains.
        expert: Description of this key of `experts.NAME.train`. Empty if the stage does not train experts.
        renders: Puts examples into the chat template, which is part of the content key.
        measures: Measures checkpoints instead of making one.
        scores: Measures one checkpoint example by example.
        together: Several nodes of one checkpoint run in one process.
        preload: Its module is imported once, by the server that node processes are forked from.
        metric: The metric after `NAME/` that shows the progress of training.
        colour: Box colour in lineage drawings.
    """

    name: str
    version: int
    config: Any
    run: str
    trains: bool = False
    launches: bool = False
    on_device: bool = True
    samples: bool = False
    expert: str = ""
    renders: bool = False
    measures: bool = False
    scores: bool = False
    together: bool = False
    preload: bool = True
    metric: str = ""
    colour: str = "grey"

    def function(self) -> Callable[..., Any]:
        """The function in `run`; imports its module and torch."""
        module, name = self.run.split(":")
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
        return function


_ROWS = (
    StageKind("load", 1, Source, "stages.load:run", on_device=False),
    StageKind("pretrain", 2, PretrainConfig, "stages.pretrain:train", trains=True, metric="loss"),
    StageKind(
        "sft", 2, SFTConfig, "stages.sft:train",
        expert="Supervised fine-tuning on gold answers.", trains=True, renders=True, metric="loss", colour="blue",
    ),
    StageKind(
        "rl", 2, RLConfig, "stages.rl:train",
        expert="Reinforcement learning from the domain's verifiable reward.",
        trains=True, samples=True, renders=True, metric="reward", colour="amber",
    ),
    StageKind(
        "rft", 2, RFTConfig, "stages.rft:train",
        expert="Rejection-sampled fine-tuning on its own successes.",
        trains=True, samples=True, renders=True, metric="reward", colour="amber",
    ),
    StageKind(
        "distill", 2, DistillConfig, "stages.distill:train",
        trains=True, samples=True, renders=True, metric="reverse_kl", colour="green",
    ),
    StageKind(
        "command", 1, CommandConfig, "stages.command:run",
        expert="A program of your own that reads the start's checkpoint and writes the expert's.",
        launches=True, preload=False, metric="loss", colour="purple",
    ),
    StageKind(
        "merge_command", 1, MergeCommandConfig, "stages.command:run",
        launches=True, preload=False, metric="loss", colour="green",
    ),
    StageKind("merge_weights", 1, WeightMergeConfig, "stages.merge:run", on_device=False, colour="green"),
    StageKind(
        "evaluate", 2, EvaluationConfig, "evals.measure.evaluate:run",
        renders=True, measures=True, scores=True, together=True,
    ),
    StageKind(
        "harness", 2, HarnessTaskConfig, "evals.measure.harness:run",
        renders=True, measures=True, scores=True, together=True, preload=False,
    ),
    StageKind("shift", 2, ShiftRequest, "evals.measure.shift:run", renders=True, measures=True, preload=False),
    StageKind(
        "cosines", 1, NoConfig, "evals.measure.task_vectors:run", on_device=False, measures=True, preload=False,
    ),
)  # fmt: skip
STAGES: Mapping[str, StageKind] = {kind.name: kind for kind in _ROWS}
EXPERT_METHODS = tuple(kind.name for kind in _ROWS if kind.expert)
SCORINGS = tuple(kind.name for kind in _ROWS if kind.scores)
EVALUATIONS = tuple(kind.name for kind in _ROWS if kind.measures)
# The measurements that compare a checkpoint with others instead of scoring it.
DISTANCES = tuple(kind.name for kind in _ROWS if kind.measures and not kind.scores)


def colour_of(stage: str) -> str:
    """The colour of a stage's box; grey for an unknown stage, such as that of a checkpoint not made yet."""
    return STAGES[stage].colour if stage in STAGES else "grey"
