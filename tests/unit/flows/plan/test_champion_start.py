"""`champion` as a start and as a teacher: pinned when first planned with, moved only by `mopd repin`."""

from pathlib import Path

import pytest

from base.errors import UserError
from base.store.checkpoint import Store
from evals.promotion.criterion import Criterion
from evals.promotion.gate import GateVerdict
from flows.champion.champion import promote_by_gate
from flows.champion.repin import repin
from flows.lineage.rows import resolve, rows
from flows.plan.champion_start import pin_note, savings
from flows.plan.lock import status
from flows.plan.nodes import StageGraph
from flows.run_file.load import load_run_file
from tests.support.scored_home import SHARES, finish, graph_of

FROM_CHAMPION = "merge.start_from=champion"


def crown(graph: StageGraph, store: Store, name: str) -> str:
    """Make a merge the champion, as the gate does; its key."""
    assert promote_by_gate(graph, store, GateVerdict(name, "best", (Criterion("all", True, ""),)))
    return graph.node(f"{name}@0").key


@pytest.fixture
def first(file: Path, home: Path) -> str:
    """Key of the champion of a finished run."""
    graph = graph_of(file, home)
    return crown(graph, finish(graph, home), "student")


def test_a_run_without_a_champion_says_how_to_get_one(file: Path, home: Path) -> None:
    with pytest.raises(UserError, match=r"merge\.start_from: run 'tiny' has no champion in .* yet; first run it"):
        graph_of(file, home, FROM_CHAMPION)
    with pytest.raises(UserError, match=r"merge\.teachers\.sort: run 'tiny' has no champion"):
        graph_of(file, home, "merge.teachers={sort: champion, reverse: reverse}")
    with pytest.raises(UserError, match=r"experts\.sort\.start_from: run 'tiny' has no champion"):
        graph_of(file, home, "experts.sort.start_from=champion")


def test_an_incremental_merge_trains_the_merge_alone(file: Path, home: Path, first: str) -> None:
    graph = graph_of(file, home, FROM_CHAMPION)
    assert graph.node("champion").key == first
    assert graph.node("student@0").parents["start"] == "champion"
    assert graph.node("student@0").parents["teacher/general"] == "champion"
    waiting = {entry.node.id for entry in status(graph, Store(home)) if not entry.cached}
    assert {node for node in waiting if not node.startswith("eval/")} == {"student@0", "baselines/mix_sft@0"}
    # Task vectors are taken from where the experts started, not from a champion that holds them already.
    assert graph.node("baselines/ties@0").parents["start"] == "cold_start@0"


def test_the_champion_itself_teaches_a_domain(file: Path, home: Path, first: str) -> None:
    graph = graph_of(file, home, FROM_CHAMPION, "merge.teachers={sort: champion, reverse: reverse}")
    assert graph.node("student@0").parents["teacher/sort"] == "champion"
    assert graph.node("student@0").ingredients["parents"]["teacher/sort"] == first


def test_the_pin_stays_when_another_is_promoted_until_it_is_moved(
    file: Path, home: Path, first: str, capsys: pytest.CaptureFixture[str]
) -> None:
    graph = graph_of(file, home, FROM_CHAMPION)
    store = finish(graph, home, SHARES | {"champion": 0.8})
    second = crown(graph, store, "student")
    again = graph_of(file, home, FROM_CHAMPION)
    assert again.node("student@0").key == second and all(entry.cached for entry in status(again, store))
    assert pin_note(graph, store)[0].startswith(f"champion: pinned to {first}; today's is student@0 (key {second})")

    config = load_run_file(file, [FROM_CHAMPION])
    repin(config, home)
    assert f"champion: {first} → {second}" in capsys.readouterr().out
    moved = graph_of(file, home, FROM_CHAMPION)
    assert moved.node("champion").key == second
    assert pin_note(moved, store) == []
    repin(config, home)
    assert f"champion: {second} as before" in capsys.readouterr().out


def test_repin_changes_nothing_where_it_fails(file: Path, home: Path) -> None:
    with pytest.raises(UserError, match="no champion"):
        repin(load_run_file(file, [FROM_CHAMPION]), home)
    assert not (home / "runs" / "tiny" / "lock.json").exists()


def test_what_the_incremental_merge_saved_is_said(file: Path, home: Path, first: str) -> None:
    graph = graph_of(file, home, FROM_CHAMPION)
    store = finish(graph, home, SHARES | {"champion": 0.8})
    (line,) = savings(graph, store)
    assert "merged from the champion: 1 s and 100 tokens; the last full merge, of 3 teachers, took 1 s" in line
    assert "2 experts made before that champion were reused" in line
    # A full merge that was made since is the one to compare with.
    with_one = graph_of(file, home, "merge.anchor=null")
    finish(with_one, home)
    assert "the last full merge, of 2 teachers, took" in savings(graph, store)[0]
    assert savings(graph_of(file, home), store) == []


def test_a_champion_goes_on_being_found_after_its_expert_left_the_run_file(file: Path, home: Path, first: str) -> None:
    without = ["experts={reverse: {domain: reverse, train: {sft: {max_steps: 5}}}}", FROM_CHAMPION]
    graph = graph_of(file, home, *without, "merge.anchor.domains=[general, sort]")
    store = finish(graph, home, SHARES | {"champion": 0.8})
    assert "experts/sort@0" not in {node.id for node in graph.nodes}
    found = {row.name: row for row in rows(store, resolve(store, "tiny"))}
    assert found["experts/sort"].made and set(found["experts/sort"].data) == {"sort"}
