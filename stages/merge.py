"""Weight merges: one student by arithmetic on the experts' weights; what MOPD is compared with. Nothing is trained.

With `start` the weights all experts began from, an expert's task vector is `expert - start`. The methods:
    weight_average   the weighted mean of the experts (Wortsman et al. 2022)
    task_arithmetic  start + scale * sum of the task vectors (Ilharco et al. 2023)
    ties             start + scale * disjoint mean: the largest entries of each task vector stay, the sign of their sum
                     is elected, those of that sign are averaged (Yadav et al. 2023)
    dare_linear, dare_ties   task_arithmetic, or election and disjoint mean, of task vectors of which a random share
                     is kept and divided by that share (Yu et al. 2024)
peft does the arithmetic, tensor by tensor: TIES trims each tensor by itself, where the paper ranks the whole vector at
once. Adapters are merged as the full weights they stand for. Left out: a scale searched on validation data.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from peft.utils import merge_utils
from torch import Tensor
from transformers import AutoTokenizer

from base.errors import UserError, nearest
from base.hashing import stable_hash
from base.store.checkpoint import Artifact
from stages.config.merge import WeightMergeConfig
from stages.learner.workspace import Workspace
from stages.model.policy import Policy, load_policy, tokenizer_difference
from stages.model.remote_code import options
from stages.model.weights import StoredWeights
from stages.rows.trained_on import TrainedOn

ROLE = "teacher/"
# Entries worked on at a time.
_SLICE = 2**20
# Where they differ, tensors of equal shape mean different things.
_ARCHITECTURE = ("model_type", "num_attention_heads", "num_key_value_heads", "tie_word_embeddings")


@dataclass(frozen=True)
class Expert:
    """One of the merged.

    Attributes:
        name: What follows `teacher/` in its role.
        weight: Its weight; the experts' mean is 1.
    """

    name: str
    checkpoint: Artifact
    weight: float


@torch.no_grad()
def run(config: WeightMergeConfig, workspace: Workspace) -> Artifact:
    """Merge the parents `teacher/<name>` into one full checkpoint laid out as `start` (or its adapter's base).

    Beside the start only one tensor of each expert is in memory at a time.

    Raises:
        UserError: no expert, a weight for one that is not there, or an expert with another architecture or tokenizer
            than the start.
    """
    policy = load_policy(workspace.parents["start"], workspace.store, trainable=True)
    experts = choose_experts(workspace.name, config.weights, workspace.parents)
    tensors = distinct_tensors(policy)
    journal = workspace.journal()
    stored = [StoredWeights(expert.checkpoint, workspace.store) for expert in experts]
    for expert, weights in zip(experts, stored, strict=True):
        _check(expert, weights, policy, tensors)
    geometry = Geometry(experts)
    for step, (names, tensor) in enumerate(tensors.items(), 1):
        theirs = [weights.read(_name_in(weights, names)) for weights in stored]
        merged = merge(config, tensor, theirs, [expert.weight for expert in experts], [workspace.seed, names[0]])
        geometry.add(tensor, theirs, merged)
        tensor.copy_(merged)
        journal.progress(step, len(tensors))
    metrics = geometry.metrics()
    journal.metrics(len(tensors), metrics)
    folder = workspace.store.staging(workspace.key)
    policy.save(folder)
    return workspace.commit(
        folder,
        trained_on=TrainedOn(),
        metrics=metrics,
        adapter_base=None,
        parameters=policy.size,
        experts={expert.name: expert.weight for expert in experts},
    )


def merge(
    config: WeightMergeConfig,
    start: Tensor,
    experts: Sequence[Tensor],
    weights: Sequence[float],
    seed: Sequence[object],
) -> Tensor:
    """Merge one tensor of all experts.

    Args:
        config: The method.
        start: The tensor they began from, float32 like theirs.
        experts: Each expert's.
        weights: Their weights, of mean 1.
        seed: What decides which entries DARE drops: one stream a tensor, whatever the order of tensors.
    """
    if config.method == "weight_average":
        return _mean(experts, weights)
    assert config.scale is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(stable_hash(list(seed))[:15], 16))
        task_vectors = [_sparse(config, expert - start).flatten() for expert in experts]
    factors = torch.tensor([config.scale * weight for weight in weights])
    combine = _disjoint_mean if config.method in ("ties", "dare_ties") else merge_utils.task_arithmetic
    parts = zip(*(vector.split(_SLICE) for vector in task_vectors), strict=True)
    return start + torch.cat([combine(list(part), factors) for part in parts]).view_as(start)


def _sparse(config: WeightMergeConfig, task_vector: Tensor) -> Tensor:
    """The task vector with what the method drops at zero."""
    if config.density is None or config.density == 1.0:
        return task_vector
    if config.method == "ties":
        pruned: Tensor = merge_utils.prune(task_vector, config.density, "magnitude")
    else:
        pruned = merge_utils.prune(task_vector, config.density, "random", rescale=True)
    return pruned


def _disjoint_mean(task_vectors: list[Tensor], factors: Tensor) -> Tensor:
    """The mean of those entries that have the sign of their sum over experts."""
    stacked = torch.stack(task_vectors)
    agreeing = merge_utils.calculate_majority_sign_mask(stacked)
    mean: Tensor = merge_utils.disjoint_merge(stacked * factors[:, None], agreeing)
    return mean


def _mean(experts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted mean, step by step, so that the mean of equal tensors is exactly they."""
    mean, total = experts[0], weights[0]
    for expert, weight in zip(experts[1:], weights[1:], strict=True):
        total += weight
        mean = mean + (expert - mean) * (weight / total)
    return mean


def choose_experts(node: str, weights: Mapping[str, float], parents: Mapping[str, Artifact]) -> list[Expert]:
    """The experts by name.

    A checkpoint under several roles is one expert, with the sum of what `weights` gives to its roles.

    Raises:
        UserError: there is none, or `weights` names one that is not there.
    """
    named = {role.removeprefix(ROLE): parent for role, parent in sorted(parents.items()) if role.startswith(ROLE)}
    if not named:
        raise UserError(f"{node}: a weight merge needs experts, and there is none")
    for name in weights:
        if name not in named:
            raise UserError(f"{node}: weights.{name}: no such expert{nearest(name, named)}")
    roles: dict[str, list[str]] = {}
    for name, parent in named.items():
        roles.setdefault(parent.digest, []).append(name)
    own = {names[0]: sum(weights.get(name, 0.0) for name in names) or 1.0 for names in roles.values()}
    mean = sum(own.values()) / len(own)
    return [Expert(name, named[name], weight / mean) for name, weight in own.items()]


def distinct_tensors(policy: Policy) -> dict[tuple[str, ...], Tensor]:
    """The model's floating-point tensors with all names each goes by: a tied head is the embedding's other name.

    Tensors of integers are the start's own: there is nothing between two of them.
    """
    names: dict[int, list[str]] = {}
    state = policy.model.state_dict()
    for name, tensor in state.items():
        if tensor.is_floating_point():
            names.setdefault(tensor.data_ptr(), []).append(name)
    return {tuple(sorted(aliases)): state[aliases[0]] for aliases in names.values()}


class Geometry:
    """Norms of and cosines between task vectors, added up tensor by tensor."""

    def __init__(self, experts: Sequence[Expert]) -> None:
        self.names = [expert.name for expert in experts]
        self.products = torch.zeros(len(experts), len(experts), dtype=torch.float64)
        self.merged = 0.0

    def add(self, start: Tensor, experts: Sequence[Tensor], merged: Tensor) -> None:
        """Count in one tensor of the start, of every expert and of what they became, slice by slice."""
        for origin, result, *theirs in zip(
            *(tensor.flatten().split(_SLICE) for tensor in (start, merged, *experts)), strict=True
        ):
            vectors = torch.stack(theirs) - origin
            self.products += (vectors @ vectors.T).double()
            self.merged += float((result - origin).square().sum())

    def metrics(self) -> dict[str, float]:
        """`merge/norm` of the merged task vector, `merge/norm/EXPERT`, and `merge/cosine/ONE/OTHER` of each pair; a
        task vector of zero has no direction, and no cosine."""
        norms = self.products.diagonal().sqrt()
        values = {"merge/norm": math.sqrt(self.merged)}
        values |= {f"merge/norm/{name}": float(norm) for name, norm in zip(self.names, norms, strict=True)}
        for one, other in self._pairs():
            if (cosine := self.cosine(one, other)) is not None:
                values[f"merge/cosine/{self.names[one]}/{self.names[other]}"] = cosine
        return values

    def cosine(self, one: int, other: int) -> float | None:
        """Of two experts' task vectors, by position; None where one is zero, for it has no direction."""
        scale = float((self.products[one, one] * self.products[other, other]).sqrt())
        return float(self.products[one, other]) / scale if scale > 0 else None

    def _pairs(self) -> Iterator[tuple[int, int]]:
        return ((one, other) for one in range(len(self.names)) for other in range(one + 1, len(self.names)))


def _check(expert: Expert, weights: StoredWeights, policy: Policy, tensors: Mapping[tuple[str, ...], Tensor]) -> None:
    """See that an expert's weights can be added to the start's."""
    who = f"expert {expert.name} ({expert.checkpoint.name})"
    ours = policy.model.config.to_dict()
    for field in _ARCHITECTURE:
        if weights.config.get(field) != ours.get(field):
            raise UserError(f"{who}: {field} {weights.config.get(field)} differs from the start's {ours.get(field)}")
    for names, tensor in tensors.items():
        shapes = [weights.shapes[name] for name in names if name in weights.shapes]
        if not shapes:
            raise UserError(f"{who}: it has no {names[0]}, which the start has; weights of one shape can be merged")
        if shapes[0] != tuple(tensor.shape):
            raise UserError(f"{who}: its {names[0]} is {shapes[0]}, the start's {tuple(tensor.shape)}")
    if strange := sorted(weights.shapes.keys() - policy.model.state_dict().keys()):
        raise UserError(f"{who}: it has {strange[0]}, which the start does not have")
    tokenizer = AutoTokenizer.from_pretrained(expert.checkpoint.uri, **options())
    if difference := tokenizer_difference(policy.tokenizer, tokenizer):
        raise UserError(f"{who}: its tokenizer differs from the start's: {difference}")


def _name_in(weights: StoredWeights, names: Sequence[str]) -> str:
    return next(name for name in names if name in weights.shapes)
