"""What differs between two checkpoints, and the lineage as a Mermaid flowchart."""

import dataclasses
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from base.errors import UserError
from base.store.checkpoint import Store
from flows.cli.app import app
from flows.lineage.differences import as_lines, differences, score_differences
from flows.lineage.mermaid import mermaid
from flows.lineage.rows import resolve, resolve_one, rows
from tests.support.lineage_home import commit, lab_graph
from tests.support.scored_home import SHARES, finish, graph_of, run_file
from tests.unit.flows.plan.test_champion_start import crown


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, and the run of today, whose cold start was trained longer."""
    folder = tmp_path_factory.mktemp("differences")
    file, home = run_file(folder), folder / "home"
    finish(graph_of(file, home), home)
    finish(graph_of(file, home, "cold_start.sft.max_steps=9"), home, SHARES | {"student": 0.5})
    return home


@pytest.fixture(scope="module")
def students(home: Path) -> tuple[str, str]:
    """Content keys of the two students."""
    file = home.parent / "run.yaml"
    return tuple(graph_of(file, home, *more).node("student@0").key for more in ((), ("cold_start.sft.max_steps=9",)))


def test_a_difference_is_followed_to_where_it_began(home: Path, students: tuple[str, str]) -> None:
    store = Store(home)
    one, other = (store.get(key) for key in students)
    found = {(each.where, each.what): (each.a, each.b) for each in differences(store, one, other)}
    assert found["start", "config.max_steps"] == (5, 9)
    assert ("", "config.max_steps") not in found
    assert {what for where, what in found if not where} >= {"parents.start", "parents.teacher/sort"}
    assert (
        found["", "parents.start"][0]
        == f"cold_start (key {store.get(one.manifest['parents']['start']['key']).key[:12]})"
    )
    # The cold starts are compared once, though every teacher leads to them.
    assert sum(what == "config.max_steps" for _, what in found) == 1
    assert not any(where.startswith("start > start") for where, _ in found)
    assert differences(store, one, one) == []
    lines = as_lines(one, other, store)
    assert lines[2] == "the checkpoints themselves:" and "  config.max_steps: 5 → 9" in lines


def test_data_that_changed_is_named_where_it_was_drawn(tmp_path: Path) -> None:
    file, home = run_file(tmp_path), tmp_path / "home"
    other = ["domains.sort.options.max_length=5"]
    finish(graph_of(file, home), home)
    store = finish(graph_of(file, home, *other), home)
    one, two = (store.get(graph_of(file, home, *more).node("experts/sort@0").key) for more in ([], other))
    found = {(each.where, each.what): (each.a, each.b) for each in differences(store, one, two)}
    drawn = found["", "data.sort"]
    assert drawn == (one.manifest["data"]["sort"], two.manifest["data"]["sort"]) and drawn[0] != drawn[1]
    # The cold start and the base saw the changed domain too; the others are what they were.
    assert ("start", "data.sort") in found and ("start > start", "data.sort") in found
    assert not any(what in ("data.reverse", "data.general") or what.startswith("config") for _, what in found)
    shown = CliRunner().invoke(app, ["diff", one.key, two.key, "--home", str(home)]).output
    assert f"data.sort: {shortened(drawn[0])} → {shortened(drawn[1])}" in shown


def test_so_is_code(tmp_path: Path) -> None:
    """The same node under two keys, made before and after the code changed, over the same cold start."""
    graph = lab_graph()
    store = Store(tmp_path)
    for node in graph.nodes:
        if node.stage != "evaluate":
            commit(store, graph, node)
    expert = graph.node("experts/sort@0")
    again = commit(store, graph, dataclasses.replace(expert, key="made again"), code="f" * 64, version=2)
    one = store.get(expert.key)
    assert [(each.where, each.what, each.a, each.b) for each in differences(store, one, again)] == [
        ("", "code", "c0de", "f" * 64),
        ("", "version", None, 2),
    ]
    lines = as_lines(one, again, store)
    assert f"  code: c0de → {'f' * 12}…" in lines and "  version: – → 2" in lines


def shortened(value: object) -> str:
    """A fingerprint as the command prints it."""
    text = str(value)
    return f"{text[:12]}…" if len(text) == 64 else text


def test_scores_are_paired_on_the_same_examples(home: Path, students: tuple[str, str]) -> None:
    store = Store(home)
    one, other = (store.get(key) for key in students)
    by_domain = {each.domain: each for each in score_differences(store, one, other)}
    assert set(by_domain) == {"sort", "reverse", "general"}
    sort = by_domain["sort"]
    assert (sort.a, sort.b) == (pytest.approx(0.8), pytest.approx(0.5))
    assert sort.difference.mean == pytest.approx(-0.3) and sort.difference.high < 0
    assert by_domain["general"].difference.mean == 0


def test_the_command_prints_both_and_json(home: Path, students: tuple[str, str]) -> None:
    ask = ["diff", *students, "--home", str(home)]
    shown = CliRunner().invoke(app, ask)
    assert shown.exit_code == 0 and "config.max_steps: 5 → 9" in shown.output and "greedy scores" in shown.output
    told = json.loads(CliRunner().invoke(app, [*ask, "--json"]).output)
    assert told["a"]["key"] == students[0] and told["b"]["key"] == students[1]
    assert {each["domain"] for each in told["scores"]} == {"sort", "reverse", "general"}
    assert any(each["what"] == "config.max_steps" for each in told["differences"])
    same = CliRunner().invoke(app, ["diff", students[0], students[0], "--home", str(home)])
    assert "are the same checkpoint" in same.output
    wrong = CliRunner().invoke(app, ["diff", "tini", students[0], "--home", str(home)])
    assert wrong.exit_code == 2 and "did you mean 'tiny'" in wrong.output


def test_a_name_stands_for_one_checkpoint_or_is_refused(tmp_path: Path) -> None:
    file, home = run_file(tmp_path), tmp_path / "home"
    graph = graph_of(file, home, "seeds=[0,1]")
    store = finish(graph, home)
    assert resolve(store, "tiny:experts/sort") == [graph.node(f"experts/sort@{seed}").key for seed in (0, 1)]
    with pytest.raises(UserError, match=r"tiny: stands for 2 checkpoints; name one of \w+ \(seed 0\), \w+ \(seed 1\)"):
        resolve_one(store, "tiny")
    with pytest.raises(UserError, match="tiny:champion: run 'tiny' has no champion yet"):
        resolve_one(store, "tiny:champion")
    assert crown(graph, store, "baselines/ties") == resolve_one(store, "tiny:champion").key
    assert resolve(store, "tiny:champion") == [graph.node("baselines/ties@0").key]
    # The run's own name is its student to every command, whoever is champion.
    assert resolve_one(store, "tiny:student@0").key in resolve(store, "tiny")


def test_the_flowchart_has_every_checkpoint_and_every_role(home: Path, students: tuple[str, str]) -> None:
    store = Store(home)
    found = rows(store, [students[0]])
    text = mermaid(found)
    assert text.startswith("flowchart LR\n")
    ids = {row.key: f"n{number}" for number, row in enumerate(found)}
    student = found[-1]
    for row in found:
        assert f'{ids[row.key]}["<b>{row.name}</b><br/>{row.stage}, seed 0<br/>digest {row.digest[:12]}' in text
    for parent in student.parents.values():
        assert any(
            line.startswith(f"  {ids[parent]} -- ") and line.endswith(ids[student.key]) for line in text.split("\n")
        )
    assert '-- "start, teacher/general" -->' in text
    printed = CliRunner().invoke(app, ["lineage", students[0], "--home", str(home), "--format", "mermaid"])
    assert printed.output == text + "\n"
    wrong = CliRunner().invoke(app, ["lineage", students[0], "--home", str(home), "--format", "mermaidd"])
    assert wrong.exit_code == 2 and "did you mean 'mermaid'" in wrong.output
