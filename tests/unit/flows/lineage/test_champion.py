"""The champion's file, what the gate may write into it, and what a person may."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from base.errors import UserError
from base.store.checkpoint import Store
from evals.promotion.criterion import Criterion
from evals.promotion.gate import GateVerdict
from flows.champion import champion
from flows.champion.champion import former_scores, judge_run, promote, promote_by_gate, rejected, rollback
from flows.champion.results import collect
from flows.plan.champion_history import ChampionRecord, champion_path, read_history
from flows.plan.nodes import Node, StageGraph
from flows.run.finish import finish_run
from tests.support.scored_home import finish, graph_of, run_file


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[StageGraph, Path]:
    """A finished run and its home."""
    folder = tmp_path_factory.mktemp("made")
    graph = graph_of(run_file(folder), folder / "home")
    finish(graph, folder / "home")
    return graph, folder / "home"


@pytest.fixture
def graph(made: tuple[StageGraph, Path]) -> StageGraph:
    return made[0]


@pytest.fixture
def store(made: tuple[StageGraph, Path], tmp_path: Path) -> Store:
    return Store(shutil.copytree(made[1], tmp_path / "home"))


@pytest.fixture(autouse=True)
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the runs whose champion was told to MLflow."""
    heard: list[str] = []
    monkeypatch.setattr(champion, "update_aliases", lambda store, run, candidate=None: heard.append(run))
    return heard


def passed(candidate: str) -> GateVerdict:
    return GateVerdict(candidate, "because", (Criterion("all", True, ""),))


def now(graph: StageGraph, store: Store) -> ChampionRecord:
    return read_history(store, graph.config.name)[-1]


def node(graph: StageGraph, name: str) -> Node:
    return graph.node(f"{name}@0")


def test_the_gate_remembers_who_when_and_why_once(graph, store):
    assert promote_by_gate(graph, store, passed("baselines/ties"))
    assert not promote_by_gate(graph, store, passed("baselines/ties"))
    (reign,) = read_history(store, "tiny")
    ties = node(graph, "baselines/ties")
    assert (reign.student, reign.node, reign.by) == (ties.key, "baselines/ties@0", "gate")
    assert reign.reason == "passed the gate; because" and reign.when.endswith("+00:00")
    sheets = {sheet.config["domain"]: sheet.key for sheet in graph.evaluations(ties.id)}
    assert reign.scores == sheets and set(sheets) == {"sort", "reverse", "general"}


def test_the_line_is_of_champions_that_nobody_decided_against(graph, store):
    for name in ("student", "baselines/mix_sft", "baselines/ties"):
        assert promote_by_gate(graph, store, passed(name))
    history = read_history(store, "tiny")
    line = former_scores(store, history, [node(graph, "student").key])
    assert [name.partition(" of ")[0] for name in line] == ["baselines/mix_sft@0"]
    assert all(set(sheets) == {"sort", "reverse", "general"} for sheets in line.values())
    rollback(graph, store)
    # The person went back to mix_sft from ties: one is the champion again, the other is no part of the line.
    assert [name.partition(" of ")[0] for name in former_scores(store, read_history(store, "tiny"), [])] == [
        "student@0"
    ]


def test_who_fails_the_gate_does_not_become_champion(graph, store):
    failed = dataclasses.replace(passed("student"), criteria=(Criterion("all", False, ""),))
    assert not promote_by_gate(graph, store, failed)
    assert read_history(store, "tiny") == []


def test_a_file_without_a_history_is_refused_by_name(graph, store):
    champion_path(store, "tiny").write_text(json.dumps({"student": node(graph, "student").key, "scores": {}}))
    with pytest.raises(UserError, match=r"champion\.json: history: Field required; move it away"):
        read_history(store, "tiny")


def test_a_person_overrules_the_gate_and_once_more_changes_nothing(graph, store, told, capsys):
    promote_by_gate(graph, store, passed("baselines/ties"))
    promote(graph, store, "baselines/mix_sft", "shorter answers")
    before = champion_path(store, "tiny").read_text()
    promote(graph, store, "baselines/mix_sft@0", "shorter answers")
    assert champion_path(store, "tiny").read_text() == before
    reign = now(graph, store)
    assert (reign.node, reign.by, reign.reason) == ("baselines/mix_sft@0", "person", "shorter answers")
    assert reign.against == (node(graph, "baselines/ties").key,)
    assert told == ["tiny", "tiny"]
    first, second = capsys.readouterr().out.splitlines()
    assert "baselines/mix_sft@0" in first and "before: baselines/ties@0" in first and second.endswith("already")


def test_by_default_the_runs_candidate_is_promoted(graph, store):
    promote(graph, store, None, "a look at its answers")
    assert now(graph, store).node == "baselines/ties@0"
    assert judge_run(graph, store, collect(graph, store)).candidate == "baselines/ties"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("baselines/tie", "tiny: 'baselines/tie' is not a merge of this run — did you mean 'baselines/ties'?"),
        (
            "experts/sort",
            "'experts/sort' is not a merge of this run — valid: baselines/mix_sft, baselines/ties, student",
        ),
        ("studnet@0", "did you mean 'student@0'?"),
    ],
)
def test_only_a_merge_of_the_run_can_be_promoted(graph, store, name, said):
    with pytest.raises(UserError, match="is not a merge of this run") as caught:
        promote(graph, store, name, "why not")
    assert said in str(caught.value) and read_history(store, "tiny") == []


def test_what_is_not_finished_or_has_no_reason_is_refused(graph, store):
    sheet = graph.evaluations("baselines/ties@0")[0]
    shutil.rmtree(store.root / sheet.key)
    with pytest.raises(UserError, match=f"{sheet.id}: not finished; `mopd run` makes the missing parts"):
        promote(graph, store, "baselines/ties", "better")
    with pytest.raises(UserError, match="--reason: give a reason"):
        promote(graph, store, "student", " ")
    assert read_history(store, "tiny") == []


def test_rollback_brings_the_former_champion_back_once(graph, store, told, capsys):
    for name in ("baselines/mix_sft", "student", "baselines/ties"):
        promote_by_gate(graph, store, passed(name))
    rollback(graph, store)
    rollback(graph, store)
    history = read_history(store, "tiny")
    assert [reign.node for reign in history[3:]] == ["student@0"] and told == ["tiny", "tiny"]
    assert (history[-1].action, history[-1].scores) == ("rollback", history[1].scores)
    said = capsys.readouterr().out
    assert "rolled back to student@0" in said and history[0].student in said
    promote(graph, store, history[0].student, "further back")
    assert now(graph, store).node == "baselines/mix_sft@0"
    rollback(graph, store)
    assert now(graph, store).node == "student@0"


def test_without_a_former_champion_or_its_checkpoint_there_is_no_rollback(graph, store):
    with pytest.raises(UserError, match="tiny: it has no champion yet; there is no earlier champion to roll back to"):
        rollback(graph, store)
    promote_by_gate(graph, store, passed("student"))
    with pytest.raises(UserError, match=r"student@0 \(key .*\) is its first champion"):
        rollback(graph, store)
    promote_by_gate(graph, store, passed("baselines/ties"))
    shutil.rmtree(store.root / node(graph, "student").key)
    with pytest.raises(UserError, match="this former champion is no longer in"):
        rollback(graph, store)
    assert now(graph, store).node == "baselines/ties@0"


def test_the_gate_does_not_bring_back_what_a_person_rolled_back(graph, store):
    promote_by_gate(graph, store, passed("student"))
    assert finish_run(graph, store, promote=True).changed
    assert now(graph, store).node == "baselines/ties@0"
    rollback(graph, store)

    again = finish_run(graph, store, promote=True)
    assert not again.changed and not again.verdict.promoted and again.champion.node == "student@0"
    lines = again.verdict_lines()
    assert "a person chose student@0 instead" in lines[-2] and lines[-1].startswith("champion: student@0")
    assert "a person chose student@0 instead" in again.report.read_text()
    assert not promote_by_gate(graph, store, passed("baselines/ties"))
    promote(graph, store, "baselines/ties", "on second thought")
    assert rejected(read_history(store, "tiny")).keys() == {node(graph, "student").key}
    assert finish_run(graph, store, promote=True).verdict.reigns.endswith("UTC, by a person: on second thought")


def test_a_decision_stands_only_until_there_is_a_new_candidate(graph, store, tmp_path):
    # Never champion, but the candidate at the time of the decision.
    promote(graph, store, "student", "it reads better")
    assert now(graph, store).against == (node(graph, "baselines/ties").key,)
    assert not finish_run(graph, store, promote=True).changed
    newer = graph_of(run_file(tmp_path), store.home, "merge.baselines={ties: {density: 0.5}, mix_sft: {}}")
    finish(newer, store.home)
    outcome = finish_run(newer, store, promote=True)
    assert outcome.changed and outcome.champion.student == node(newer, "baselines/ties").key
    assert outcome.champion.student != node(graph, "baselines/ties").key


def test_the_champion_is_no_candidate_for_its_own_place(graph, store):
    first = finish_run(graph, store, promote=True)
    assert first.changed and first.verdict.conclusion == "baselines/ties: promoted to champion"
    before = champion_path(store, "tiny").read_text()
    for promote_it in (True, False):
        again = finish_run(graph, store, promote=promote_it)
        assert not again.changed and again.crowned and not again.verdict.promoted
        since = again.champion.when[:16].replace("T", " ")
        assert again.verdict.conclusion == f"baselines/ties: already champion, since {since} UTC, by the gate"
        assert again.verdict.criteria[-1].text == "baselines/ties is the champion itself: not compared"
        assert again.verdict.conclusion in again.report.read_text()
    assert champion_path(store, "tiny").read_text() == before


def test_a_champion_that_todays_gate_would_not_promote_is_said_to_be_one(graph, store):
    promote(graph, store, "baselines/ties", "it reads better")
    results = collect(graph, store)
    whole = dataclasses.replace(results, cells={k: c for k, c in results.cells.items() if k[1] != "general"})
    said = judge_run(graph, store, whole).conclusion
    assert said.startswith("baselines/ties: already champion, since ") and said.endswith(
        "by a person: it reads better (by today's gate 2 of 7 criteria failed)"
    )


def test_a_report_promotes_nobody_and_says_so(graph, store):
    outcome = finish_run(graph, store, promote=False)
    assert read_history(store, "tiny") == [] and outcome.champion is None
    assert outcome.verdict_lines()[-2:] == [
        "gate: baselines/ties: not promoted, `mopd run` has yet to make it champion",
        "champion: none",
    ]
