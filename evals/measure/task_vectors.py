"""Changes of the weights by training: how many changed, by how much, and whether experts moved in the same direction.

A checkpoint's task vector is its weights less the start's (Ilharco et al. 2023). Weights count as changed where they
differ by more than 1e-5, in float32 or after both were rounded to bfloat16, as in arXiv:2505.11711 on the sparsity of
RL's updates: rounding hides a change that is small relative to its weight.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from base.store.checkpoint import Artifact
from evals.comparison.shift_sheet import COSINES_FILE, CosineSheet, WeightChange, WeightShift
from stages.config.kinds import NoConfig
from stages.learner.workspace import Workspace
from stages.merge import Expert, Geometry
from stages.model.weights import StoredWeights

TOLERANCE = 1e-5
EXPERT_ROLE = "expert/"
# Number of weights processed at a time.
_SLICE = 2**20
_LAYER = re.compile(r"\.(\d+)\.")
_EMBEDDINGS = re.compile(r"embed|\bwte\b|\bwpe\b")
_HEAD = re.compile(r"^(lm_head|embed_out)\.")


@dataclass
class Tally:
    """Counts over some tensors.

    Attributes:
        weights: Number of weights.
        bfloat16: Number changed after both were rounded to bfloat16.
        float32: Number changed in float32.
        moved: Sum of squares of the task vector.
        size: Sum of squares of the start's weights.
    """

    weights: int = 0
    bfloat16: int = 0
    float32: int = 0
    moved: float = 0.0
    size: float = 0.0

    def add(self, start: Tensor, trained: Tensor) -> None:
        """Add the counts of one tensor of the start and of the checkpoint, both float32, slice by slice."""
        self.weights += start.numel()
        for before, after in zip(start.flatten().split(_SLICE), trained.flatten().split(_SLICE), strict=True):
            difference = after - before
            rounded = after.bfloat16().float() - before.bfloat16().float()
            self.bfloat16 += int((rounded.abs() > TOLERANCE).sum())
            self.float32 += int((difference.abs() > TOLERANCE).sum())
            self.moved += float(difference.double().square().sum())
            self.size += float(before.double().square().sum())

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def change(self) -> WeightChange:
        """The counts as shares; a start of zeros counts as having norm 1."""
        return WeightChange(
            weights=self.weights,
            changed_bfloat16=self.bfloat16 / self.weights,
            changed_float32=self.float32 / self.weights,
            relative_norm=(self.moved / (self.size or 1.0)) ** 0.5,
        )


def weight_shift(start: StoredWeights, checkpoint: StoredWeights) -> WeightShift:
    """How a checkpoint's weights differ from the start's, by part of the model.

    One tensor of each checkpoint is in memory at a time, besides the counts. An adapter counts as the full weights that
    it represents.

    Args:
        start: The run's start.
        checkpoint: Trained from the start, so of the same architecture.
    """
    parts = defaultdict[str, Tally](Tally)
    for name in distinct_names(start):
        origin, trained = start.read(name), checkpoint.read(name)
        parts[part_of(name)].add(origin, trained)
    layers = sorted((part for part in parts if part.isdigit()), key=int)
    named = {part: parts[part].change() if part in parts else None for part in ("embeddings", "head", "rest")}
    changes = [parts[layer].change() for layer in layers]
    whole = sum(parts.values(), start=Tally())
    return WeightShift(**dict(whole.change()), layers=changes, **named)


def distinct_names(weights: StoredWeights) -> Iterator[str]:
    """Names of the tensors, without a head that is tied to the embeddings."""
    tied = bool(weights.config.get("tie_word_embeddings"))
    return (name for name in weights.shapes if not (tied and _HEAD.search(name)))


def part_of(name: str) -> str:
    """`embeddings`, `head`, `rest`, or the number of a decoder layer."""
    if layer := _LAYER.search(name):
        return layer[1]
    if _HEAD.search(name):
        return "head"
    return "embeddings" if _EMBEDDINGS.search(name) else "rest"


def cosines(start: StoredWeights, experts: Mapping[str, StoredWeights], geometry: Geometry) -> CosineSheet:
    """Cosine of the task vectors of every two experts.

    Args:
        start: The checkpoint that all were trained from.
        experts: By name.
        geometry: An empty geometry over the same experts.
    """
    for name in distinct_names(start):
        origin = start.read(name)
        geometry.add(origin, [expert.read(name) for expert in experts.values()], origin)
    count = range(len(experts))
    return CosineSheet(experts=list(experts), cosines=[[geometry.cosine(i, j) for j in count] for i in count])


@torch.no_grad()
def run(config: NoConfig, workspace: Workspace) -> Artifact:
    """Compare the task vectors of the parents `expert/NAME` from the parent `start`.

    Returns:
        `cosines.json`, and each pair's cosine among the metrics.
    """
    store, parents = workspace.store, workspace.parents
    named = {role.removeprefix(EXPERT_ROLE): parent for role, parent in parents.items() if role != "start"}
    journal = workspace.journal()
    geometry = Geometry([Expert(name, parent, 1.0) for name, parent in named.items()])
    code = workspace.remote_code
    stored = {name: StoredWeights(parent, store, code) for name, parent in named.items()}
    sheet = cosines(StoredWeights(parents["start"], store, code), stored, geometry)
    metrics = {f"cosine/{one}/{other}": value for (one, other), value in sheet.values().items()}
    journal.metrics(1, metrics)
    journal.progress(1, 1)
    folder = store.staging(workspace.key)
    (folder / COSINES_FILE).write_text(sheet.model_dump_json(indent=1))
    return workspace.commit(folder, trained_on=None, metrics=metrics)
