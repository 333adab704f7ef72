"""A stage that runs out of memory: half of its micro-batch once, from the last saved state."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from base.store.checkpoint import Store
from base.store.journal import JOURNAL_FILE, read
from flows.engines.launch import Launcher
from flows.engines.worker import OUT_OF_MEMORY
from flows.plan.graph import build_graph
from flows.plan.nodes import StageGraph
from flows.run_file.resources import ResourcesConfig
from flows.run_file.schema import RunConfig
from tests.integration.engines.test_launch import RUN, STEPS, Run
from tests.support.devices import short_of_memory

TOKENS, SAVED = 128, 2


@pytest.fixture
def graph(tmp_path: Path) -> StageGraph:
    run = copy.deepcopy(RUN)
    run["base"]["pretrain"] |= {"micro_batch_tokens": TOKENS, "save_every": SAVED}
    return build_graph(RunConfig.model_validate(run), tmp_path / "home")


def made(graph: StageGraph, home: Path) -> Run:
    with Launcher(home, ResourcesConfig()) as launcher:
        run = Run(launcher, graph, graph.node("base@0"))
        run.join()
    return run


def test_a_stage_continues_with_half_of_its_micro_batch(
    graph: StageGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = made(graph, tmp_path / "undisturbed")
    monkeypatch.setenv("PYTHONPATH", short_of_memory(tmp_path / "short", TOKENS // 2))
    home = tmp_path / "home"
    run = made(graph, home)
    assert (undisturbed.error, run.error) == (None, None)
    key = graph.node("base@0").key
    assert [r["step"] for r in run.records if r["kind"] == "progress"] == list(range(1, STEPS + 1))
    told = (SAVED, "out of memory with micro_batch_tokens 128; continues from the last saved state with 64")
    assert [(r["step"], r["text"]) for r in run.records if r["kind"] == "note"] == [told]
    notes = list(read(Store(home).work(key) / JOURNAL_FILE, ("note",)))
    assert [(note["step"], note["text"]) for note in notes] == [told]
    artifact, other = Store(home).get(key), Store(tmp_path / "undisturbed").get(key)
    assert artifact.manifest["config"]["micro_batch_tokens"] == TOKENS // 2
    assert artifact.manifest["ingredients"] == other.manifest["ingredients"]
    ours, theirs = (load_file(each.path / "model.safetensors") for each in (artifact, other))
    for name, tensor in theirs.items():
        # Sums in another order, and Adam divides by the root of small second moments.
        torch.testing.assert_close(ours[name], tensor, atol=1e-4, rtol=1e-4)


def test_it_fails_with_advice_when_half_is_too_much_as_well(
    graph: StageGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", short_of_memory(tmp_path / "short", 1))
    run = made(graph, tmp_path / "home")
    assert run.error is not None
    assert (run.error.exit_code, run.error.retryable, run.error.user_error) == (OUT_OF_MEMORY, False, False)
    assert run.error.message.startswith("CUDA out of memory. Tried to allocate 20.00 MiB.; lower micro_batch_tokens")
    assert "(now 64)" in run.error.message
    assert [r["step"] for r in run.records if r["kind"] == "progress"] == list(range(1, SAVED + 1))
