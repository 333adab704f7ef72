"""Tiny checkpoints in a temporary store, and what stages are handed."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from base.store.checkpoint import Artifact, Store
from experts.domain import Domain
from experts.loading import load_domain
from stages.config.training import TinyModelConfig
from stages.learner.workspace import Workspace
from stages.model.policy import Policy
from stages.model.tiny import character_tokenizer, tiny_model
from stages.rows.trained_on import TrainedOn

TINY = TinyModelConfig(hidden_size=32, layers=2, heads=2, intermediate_size=64, max_length=128)


@pytest.fixture(autouse=True)
def _as_in_a_process_of_its_own() -> None:
    """A stage has a process to itself: one thread, and accelerate's settings made by it alone."""
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "home")


@pytest.fixture
def domains() -> dict[str, Domain]:
    return {name: load_domain(name, "strings", {"task": name}) for name in ("sort", "reverse", "uppercase")}


@pytest.fixture
def workspace(store: Store) -> Callable[..., Workspace]:
    """Make a workspace: `workspace(key, parents, domains, seed=0)`."""

    def make(key: str, parents: Mapping[str, Artifact], domains: Mapping[str, Domain], seed: int = 0) -> Workspace:
        return Workspace(store, key, key, seed, parents, domains, {"stage": "test"})

    return make


def tiny_policy(seed: int, scale: float = 4.0) -> Policy:
    """A random tiny model; `scale` sharpens its distributions, which random weights leave almost flat."""
    tokenizer = character_tokenizer()
    model = tiny_model(TINY, tokenizer, seed).eval()
    with torch.no_grad():
        model.model.norm.weight.mul_(scale)
    return Policy(model, tokenizer)


@pytest.fixture
def checkpoint(workspace: Callable[..., Workspace]) -> Callable[[str, int], Artifact]:
    """Commit a random tiny checkpoint: `checkpoint(key, seed)`."""

    def make(key: str, seed: int) -> Artifact:
        place = workspace(key, {}, {})
        folder = place.store.staging(key)
        tiny_policy(seed).save(folder)
        return place.commit(folder, trained_on=TrainedOn(), metrics={})

    return make
