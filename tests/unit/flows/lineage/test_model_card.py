"""A model card names the base, shows a prompt to try, has intervals, and says what the gate decided."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from base.store.checkpoint import Store
from flows.champion.champion import promote
from flows.lineage import rows as lineage
from flows.lineage.card_facts import base_of, facts_of
from flows.lineage.export import model_card
from flows.lineage.rows import Row
from flows.plan.nodes import StageGraph
from flows.run.finish import finish_run
from tests.support.scored_home import finish, graph_of, run_file


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> StageGraph:
    folder = tmp_path_factory.mktemp("card")
    return graph_of(run_file(folder), folder / "home")


@pytest.fixture
def store(graph: StageGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr("flows.champion.champion.update_aliases", lambda store, run, candidate=None: None)
    return finish(graph, tmp_path)


def card_of(store: Store, graph: StageGraph, name: str, **manifest: object) -> str:
    artifact = store.get(graph.node(f"{name}@0").key)
    artifact = replace(artifact, manifest={**artifact.manifest, **manifest})
    rows = lineage.rows(store, [artifact.key])
    return model_card(artifact, rows, "tiny", facts_of(store, artifact, rows))


def test_it_has_base_intervals_and_the_verdict_of_the_gate_on_the_candidate(store: Store, graph: StageGraph) -> None:
    assert finish_run(graph, store, promote=True).changed
    card = card_of(store, graph, "baselines/ties")
    assert "Base: pretrained from scratch by this pipeline (100 tokens)." in card
    row = next(line for line in card.splitlines() if line.startswith("| sort | held out |"))
    # Columns: base, cold start, two teachers, the candidate.
    assert row.count("[") == 5 and "95.0 [88.5, 98.1]" in row
    assert "## Verdict\n\n- Champion of run `tiny` since " in card and "UTC, by the gate." in card
    assert "- Gate of run `tiny`: baselines/ties: promoted to champion." in card
    assert "  - met: teachers above cold_start: mean of sort, reverse" in card
    assert "## Verdict" not in card_of(store, graph, "student"), "the gate judged another merge"


def test_it_says_which_scores_are_of_copies_of_training_data(store: Store, graph: StageGraph) -> None:
    card = card_of(store, graph, "student")
    assert "Examples with a copy in what the checkpoint or an ancestor was trained on:\n\n- " in card
    assert "- sort, held out: 1.0 %" in card


def test_a_former_champion_is_said_to_be_one(store: Store, graph: StageGraph) -> None:
    finish_run(graph, store, promote=True)
    promote(graph, store, "student", "it reads better")
    assert "- Was champion of run `tiny` since " in card_of(store, graph, "baselines/ties")
    now = card_of(store, graph, "student")
    assert "- Champion of run `tiny` since " in now and "UTC, by a person: it reads better." in now


def test_it_shows_a_prompt_to_try_that_cannot_end_its_block(store: Store, graph: StageGraph) -> None:
    shown = {"sort": [{"prompt": 'sort "cab"\n```sh\nrm', "answer": "`abc`"}]}
    card = card_of(store, graph, "student", examples=shown)
    line = next(line for line in card.splitlines() if line.startswith("prompt = "))
    literal, _, answer = line.removeprefix("prompt = ").partition("  # trained to answer ")
    assert json.loads(literal) == shown["sort"][0]["prompt"] and json.loads(answer) == "`abc`" and "`" not in line
    assert 'prompt = "…"' in card_of(store, graph, "student")


@pytest.mark.parametrize(
    ("stage", "config", "said"),
    [
        (
            "load",
            {"kind": "hub", "location": "Qwen/Qwen3-0.6B", "revision": "abc"},
            "`Qwen/Qwen3-0.6B` at revision `abc`",
        ),
        ("load", {"kind": "directory", "location": "/home/me/models/base"}, "`base`, imported (directory)"),
        ("sft", {}, ""),
    ],
)
def test_the_base_is_named_without_a_place_on_this_machine(stage: str, config: dict, said: str) -> None:
    assert base_of([Row("k", "base", stage, 0, {}, config=config)]) == said
