"""What may join a run, for real: a second round, an expert from elsewhere, a reasoning domain. No servers are started.

Tests share a home, in which the first of them to ask trains the run; the later ones reuse it, which is their point.
"""

import copy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from base.store.checkpoint import Artifact, Store
from flows.engines.launch import Launcher
from flows.plan.nodes import StageGraph
from flows.run_file.resources import ResourcesConfig
from stages.rows.trained_on import TrainedOn
from tests.integration.engines.test_launch import silent
from tests.integration.run.test_pipeline import RUN
from tests.support.homes import clean_environment
from tests.support.scored_home import graph_of

EXPERTS = ("experts/sort@0", "experts/reverse@0")


class Lab:
    """A home, and what trains in it."""

    def __init__(self, folder: Path, launcher: Launcher) -> None:
        self.folder, self.home, self.launcher = folder, folder / "home", launcher
        self.store = Store(self.home)
        # The run everything is compared with.
        self.whole = self.graph(RUN)
        self.make(self.whole)

    def graph(self, run: dict[str, Any], *overrides: str) -> StageGraph:
        return graph_of(self.file(run), self.home, *overrides)

    def file(self, run: dict[str, Any]) -> Path:
        path = self.folder / "run.yaml"
        path.write_text(yaml.safe_dump(run, sort_keys=False))
        return path

    def make(self, graph: StageGraph) -> set[str]:
        """Train what is missing, parents first; the ids of what was."""
        missing = [node for node in graph.checkpoints if self.store.find(node.key) is None]
        for node in missing:
            self.launcher.run(graph, [node], silent)
        return {node.id for node in missing}

    def of(self, graph: StageGraph, node_id: str) -> Artifact:
        return self.store.get(graph.node(node_id).key)

    def mopd(self, *words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "flows.cli.entry", *words, "--home", str(self.home)],
            env=clean_environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("lab")
    with Launcher(folder / "home", ResourcesConfig()) as launcher:
        yield Lab(folder, launcher)


def test_a_second_round_reuses_the_first_and_trains_on_from_its_student(lab: Lab) -> None:
    two = lab.graph(RUN, "merge.rounds=2")
    assert lab.make(two) == {*EXPERTS, "student@0"}
    first = lab.of(two, "round1/student@0")
    assert first.digest == lab.of(lab.whole, "student@0").digest
    for name in EXPERTS:
        again, before = lab.of(two, name), lab.of(two, f"round1/{name}")
        assert before.digest == lab.of(lab.whole, name).digest
        assert again.manifest["parents"]["start"]["digest"] == first.digest
        # Trained on, from other weights to other weights.
        assert len({again.digest, before.digest, first.digest}) == 3
    student = lab.of(two, "student@0")
    assert student.manifest["parents"]["start"]["digest"] == first.digest != student.digest
    taught = {role: parent["digest"] for role, parent in student.manifest["parents"].items()}
    assert taught["teacher/sort"] == lab.of(two, "experts/sort@0").digest
    assert taught["teacher/general"] == lab.of(two, "cold_start@0").digest


def test_an_exported_expert_teaches_as_the_one_that_was_trained_here(lab: Lab) -> None:
    trained, folder = lab.of(lab.whole, "experts/sort@0"), lab.folder / "elsewhere"
    lab.mopd("export", trained.key, str(folder))
    run = copy.deepcopy(RUN)
    run["experts"]["sort"] = {"domain": "sort", "checkpoint": str(folder)}
    graph = lab.graph(run)
    # One for all seeds, so its id has none.
    assert lab.make(graph) == {"experts/sort", "student@0"}
    given = lab.of(graph, "experts/sort")
    assert given.manifest["stage"] == "load" and given.key != trained.key
    weights = "model.safetensors"
    assert given.manifest["files"][weights] == trained.manifest["files"][weights]
    student, before = lab.of(graph, "student@0"), lab.of(lab.whole, "student@0")
    assert student.manifest["parents"]["teacher/sort"]["key"] == given.key
    # The same teacher, wherever it came from, makes the same student.
    assert student.manifest["files"][weights] == before.manifest["files"][weights]
    assert student.digest != lab.of(graph, "cold_start@0").digest


def test_a_reasoning_domain_added_by_the_command_is_trained_merged_and_scored(lab: Lab) -> None:
    file = lab.file(RUN)
    lab.mopd(*f"add-expert {file} spell --domain reasoning --task spell_backward --like sort".split())
    graph = graph_of(file, lab.home)
    assert graph.config.domains["spell"].kind == "reasoning"
    assert lab.make(graph) == {"experts/spell@0", "student@0"}
    expert, student = lab.of(graph, "experts/spell@0"), lab.of(graph, "student@0")
    assert expert.manifest["stage"] == "rl" and "spell" in TrainedOn.read(expert).domains.values()
    assert all("Spell this word backward" in shown["prompt"] for shown in expert.manifest["examples"]["spell"])
    assert student.manifest["parents"]["teacher/spell"]["digest"] == expert.digest
    assert any(entry["domain"] == "spell" and entry["prompt_share"] > 0 for entry in student.manifest["teachers"])
    sheets = [node for node in graph.evaluations("student@0") if node.config["domain"] == "spell"]
    lab.launcher.run(graph, sheets, silent)
    for sheet in sheets:
        assert 0 <= lab.store.get(sheet.key).manifest["metrics"]["greedy"] <= 1
