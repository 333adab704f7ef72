"""Weight merges: one student by arithmetic on the experts' weights, a baseline for MOPD. Nothing is trained.

With `start` the weights from which all experts were trained, an expert's task vector is `expert - start`. The methods:
    weight_average   the weighted mean of the experts (Wortsman et al. 2022)
    task_arithmetic  start + scale * sum of the task vectors (Ilharco et al. 2023)
    ties             start + scale * disjoint mean: the largest entries of each task vector are kept, the sign of their
                     sum is elected, and the entries of that sign are averaged (Yadav et al. 2023)
    dare_linear, dare_ties   task_arithmetic, or election and disjoint mean, of sparsified task vectors: a random share
                     of the entries is kept and divided by that share (Yu et al. 2024)
peft does the arithmetic, tensor by tensor: TIES trims each tensor by itself, while the paper ranks the whole vector at
once. Adapters are merged as full weights, with their deltas added to the base. Left out: a scale searched on validation
data.
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
from stages.config.roles import is_teacher, taught_domain
from stages.learner.stage import load_start
from stages.learner.workspace import Workspace
from stages.model.policy import Policy
from stages.model.tokenizers import tokenizer_difference
from stages.model.weights import StoredWeights
from stages.rows.trained_on import TrainedOn

# Entries processed at a time.
_SLICE = 2**20
# If one of these differs, tensors of equal shape have different meanings.
_ARCHITECTURE = ("model_type", "num_attention_heads", "num_key_value_heads", "tie_word_embeddings")


@dataclass(frozen=True)
class Expert:
    """One of the merged checkpoints.

    Attributes:
        name: Its role without the prefix `teacher/`.
        checkpoint: The stored checkpoint.
        weight: Its weight; the mean over experts is 1.
    """

    name: str
    checkpoint: Artifact
    weight: float


@torch.no_grad()
def run(config: WeightMergeConfig, workspace: Workspace) -> Artifact:
    """Merge the parents `teacher/<name>` into one full checkpoint with the layout of `start` (or its adapter's base).

    Besides the start only one tensor of each expert is in memory at a time.

    Returns:
        The committed student.

    Raises:
        UserError: there is no expert, `weights` names an unknown one, or an expert's architecture or tokenizer differs
            from the start's.
    """
    policy = load_start(workspace)
    experts = choose_experts(workspace.name, config.weights, workspace.parents)
    tensors = distinct_tensors(policy)
    journal = workspace.journal()
    stored = [StoredWeights(expert.checkpoint, workspace.store, workspace.remote_code) for expert in experts]
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
        start: The start's tensor, float32 like the experts'.
        experts: Each expert's tensor.
        weights: The experts' weights, of mean 1.
        seed: Seed of the entries that DARE drops: one random stream per tensor, independent of the order of tensors.

    Returns:
        The merged tensor.
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
    """The task vector with the entries that the method drops set to zero."""
    if config.density is None or config.density == 1.0:
        return task_vector
    if config.method == "ties":
        pruned: Tensor = merge_utils.prune(task_vector, config.density, "magnitude")
    else:
        pruned = merge_utils.prune(task_vector, config.density, "random", rescale=True)
    return pruned


def _disjoint_mean(task_vectors: list[Tensor], factors: Tensor) -> Tensor:
    """The mean over experts of the entries that have the sign of their sum."""
    stacked = torch.stack(task_vectors)
    agreeing = merge_utils.calculate_majority_sign_mask(stacked)
    mean: Tensor = merge_utils.disjoint_merge(stacked * factors[:, None], agreeing)
    return mean


def _mean(experts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted mean, computed incrementally, so that the mean of equal tensors is exactly that tensor."""
    mean, total = experts[0], weights[0]
    for expert, weight in zip(experts[1:], weights[1:], strict=True):
        total += weight
        mean = mean + (expert - mean) * (weight / total)
    return mean


def choose_experts(node: str, weights: Mapping[str, float], parents: Mapping[str, Artifact]) -> list[Expert]:
    """The experts among a node's parents.

    A checkpoint with several roles is one expert, with the sum of its roles' `weights`.

    Raises:
        UserError: there is no expert, or `weights` names an unknown one.
    """
    named = {taught_domain(role): parent for role, parent in sorted(parents.items()) if is_teacher(role)}
    if not named:
        raise UserError(f"{node}: a weight merge needs experts, and there are none")
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
    """The model's floating-point tensors, each with all its names: a tied head is another name of the embedding.

    Integer tensors are not merged; the student keeps those of the start.
    """
    names: dict[int, list[str]] = {}
    state = policy.model.state_dict()
    for name, tensor in state.items():
        if tensor.is_floating_point():
            names.setdefault(tensor.data_ptr(), []).append(name)
    return {tuple(sorted(aliases)): state[aliases[0]] for aliases in names.values()}


class Geometry:
    """Norms of task vectors and cosines between them, accumulated tensor by tensor."""

    def __init__(self, experts: Sequence[Expert]) -> None:
        self.names = [expert.name for expert in experts]
        self.products = torch.zeros(len(experts), len(experts), dtype=torch.float64)
        self.merged = 0.0

    def add(self, start: Tensor, experts: Sequence[Tensor], merged: Tensor) -> None:
        """Add one tensor of the start, of every expert and of the merged student, slice by slice."""
        for origin, result, *theirs in zip(
            *(tensor.flatten().split(_SLICE) for tensor in (start, merged, *experts)), strict=True
        ):
            vectors = torch.stack(theirs) - origin
            self.products += (vectors @ vectors.T).double()
            self.merged += float((result - origin).square().sum())

    def metrics(self) -> dict[str, float]:
        """`merge/norm` of the merged task vector, `merge/norm/EXPERT`, and `merge/cosine/ONE/OTHER` of each pair; a
        task vector of zero has no direction, so its cosines are absent."""
        norms = self.products.diagonal().sqrt()
        values = {"merge/norm": math.sqrt(self.merged)}
        values |= {f"merge/norm/{name}": float(norm) for name, norm in zip(self.names, norms, strict=True)}
        for one, other in self._pairs():
            if (cosine := self.cosine(one, other)) is not None:
                values[f"merge/cosine/{self.names[one]}/{self.names[other]}"] = cosine
        return values

    def cosine(self, one: int, other: int) -> float | None:
        """The cosine of two experts' task vectors, by position; None if one is zero and so has no direction."""
        scale = float((self.products[one, one] * self.products[other, other]).sqrt())
        return float(self.products[one, other]) / scale if scale > 0 else None

    def _pairs(self) -> Iterator[tuple[int, int]]:
        return ((one, other) for one in range(len(self.names)) for other in range(one + 1, len(self.names)))


def _check(expert: Expert, weights: StoredWeights, policy: Policy, tensors: Mapping[tuple[str, ...], Tensor]) -> None:
    """Check that an expert's weights can be added to the start's.

    Raises:
        UserError: architecture, tensors or tokenizer differ.
    """
    who = f"expert {expert.name} ({expert.checkpoint.name})"
    ours = policy.model.config.to_dict()
    for field in _ARCHITECTURE:
        if weights.config.get(field) != ours.get(field):
            raise UserError(f"{who}: {field} {weights.config.get(field)} differs from the start's {ours.get(field)}")
    for names, tensor in tensors.items():
        shapes = [weights.shapes[name] for name in names if name in weights.shapes]
        if not shapes:
            raise UserError(f"{who}: it has no {names[0]}, which the start has; a merge needs equal shapes")
        if shapes[0] != tuple(tensor.shape):
            raise UserError(f"{who}: its {names[0]} is {shapes[0]}, the start's {tuple(tensor.shape)}")
    if strange := sorted(weights.shapes.keys() - policy.model.state_dict().keys()):
        raise UserError(f"{who}: it has {strange[0]}, which the start does not have")
    tokenizer = AutoTokenizer.from_pretrained(expert.checkpoint.uri, trust_remote_code=policy.remote_code)
    if difference := tokenizer_difference(policy.tokenizer, tokenizer):
        raise UserError(f"{who}: its tokenizer differs from the start's: {difference}")


def _name_in(weights: StoredWeights, names: Sequence[str]) -> str:
    return next(name for name in names if name in weights.shapes)
