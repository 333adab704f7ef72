"""The lineage as text and as a page, from a store of manifests."""

import io
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from base.errors import UserError
from base.store.checkpoint import Store
from flows.cli.app import app
from flows.lineage import rows as lineage
from flows.lineage.drawing import draw_html
from flows.plan.lock import write_lock
from flows.plan.nodes import StageGraph
from tests.support.lineage_home import commit, lab_graph, lessons, shared_graph


@pytest.fixture
def graph() -> StageGraph:
    return lab_graph()


@pytest.fixture
def store(tmp_path: Path, graph: StageGraph) -> Store:
    write_lock(graph, tmp_path)
    store = Store(tmp_path)
    for node in graph.nodes:
        commit(store, graph, node)
    return store


def text(store: Store, reference: str) -> str:
    output = io.StringIO()
    Console(file=output, width=200).print(lineage.tree(store, reference))
    return output.getvalue()


def test_the_tree_walks_from_the_student_to_each_teacher_and_the_base(store, graph):
    printed = text(store, "lab")
    digest = store.find(graph.node("student@0").key).digest
    assert f"student (distill, seed 0) digest {digest[:12]}" in printed
    assert "teacher/sort ← experts/sort (rl, seed 0)" in printed
    assert "teacher/caesar ← experts/caesar (sft, seed 0)" in printed
    assert "start ← base (pretrain, seed 0)" in printed
    assert "max_steps 5, learning_rate 0.001, 120,000 tokens, 61 s" in printed
    assert "data: sort " in printed
    assert "greedy: caesar/held_out 0.75, sort/held_out 0.75" in printed
    assert "last step: loss 0.25" in printed


@pytest.fixture
def shared(tmp_path: Path) -> Store:
    """A store in which two experts taught one domain."""
    graph = shared_graph()
    write_lock(graph, tmp_path)
    store = Store(tmp_path)
    for node in graph.nodes:
        commit(store, graph, node, **({"teachers": lessons(store, graph)} if node.stage == "distill" else {}))
    return store


def test_every_teacher_is_shown_with_its_weight_digest_and_objective(shared, graph):
    printed = text(shared, "lab")
    digest = shared.find(graph.node("experts/sort@0").key).digest[:12]
    assert "teacher/sort × 0.75 ← experts/sort (rl, seed 0)" in printed
    assert "teacher/sort × 0.25 ← experts/caesar " in printed
    assert "teacher/caesar ← experts/caesar (sft, seed 0)" in printed
    lesson = f"experts/sort, digest {digest}, objective reverse_kl, weight 0.75, 50.0% of the prompts"
    assert f"taught sort: {lesson}" in printed
    page = draw_html(shared, [graph.node("student@0").key], "lab")
    assert f"<div>taught sort: {lesson}</div>" in page
    assert "<div>teacher/sort × 0.25 ← experts/caesar</div>" in page
    assert ">teacher/sort × 0.75<title>" in page


def test_the_weights_of_a_planned_student_are_known(tmp_path):
    graph = shared_graph()
    write_lock(graph, tmp_path)
    assert "teacher/sort × 0.75 ← experts/sort (rl, seed 0)" in text(Store(tmp_path), "lab")


def test_the_command_writes_json_and_a_page(shared, tmp_path):
    home = ["--home", str(tmp_path)]
    printed = CliRunner().invoke(app, ["lineage", "lab", "--json", *home])
    student = json.loads(printed.stdout)[-1]
    assert (student["name"], student["weights"]["teacher/sort/sort"]) == ("student", 0.75)
    assert {entry["domain"] for entry in student["teachers"]} == {"sort", "caesar"}
    page = tmp_path / "page.html"
    assert CliRunner().invoke(app, ["lineage", "lab", "--html", str(page), *home]).exit_code == 0
    assert page.read_text().startswith("<!doctype html>")


def test_code_cost_and_a_sample_of_the_data_are_told_in_text_page_and_json(tmp_path, graph):
    write_lock(graph, tmp_path)
    store, shown = Store(tmp_path), {"sort": [{"prompt": "ba", "answer": "ab"}]}
    for node in graph.nodes:
        more = {"device_seconds": 332.0, "joules": 5120.0, "code": "0123456789abcdef", "examples": shown}
        commit(store, graph, node, **(more if node.stage == "distill" else {}))
    key = graph.node("student@0").key
    printed, page = text(store, "lab"), draw_html(store, [key], "lab")
    for said in (
        "120,000 tokens, 83 s, 332 device-seconds, 5,120 J, code 0123456789ab",
        f"some of the data: {key}/manifest.json: examples",
    ):
        assert said in printed and said in page
    assert printed.count("device-seconds") == printed.count("some of the data") == 1
    told = json.loads(CliRunner().invoke(app, ["lineage", "lab", "--json", "--home", str(tmp_path)]).stdout)
    student, base = told[-1], told[0]
    assert (student["code"], student["device_seconds"], student["joules"]) == ("0123456789abcdef", 332.0, 5120.0)
    file, _, field = student["sample"].partition(": ")
    assert json.loads((store.root / file).read_text())[field] == shown
    assert (base["code"], base["device_seconds"], base["sample"]) == ("c0de", 0.0, "")


def test_a_shared_ancestor_is_printed_once(store):
    printed = text(store, "lab")
    assert printed.count("cold_start (sft, seed 0)") == 1
    assert len(re.findall("cold_start .*see above", printed)) == 2


def test_a_node_and_the_start_of_a_key_lead_to_the_same_tree(store, graph):
    key = graph.node("experts/sort@0").key
    by_node, by_key = text(store, "lab:experts/sort@0"), text(store, key[:8])
    assert by_node.splitlines()[1:] == by_key.splitlines()[1:]
    assert "student" not in by_node


def test_what_was_planned_but_not_made_is_shown_as_such(tmp_path, graph):
    write_lock(graph, tmp_path)
    store = Store(tmp_path)
    commit(store, graph, graph.node("base@0"))
    printed = text(store, "lab")
    assert printed.count("not made yet") == 4
    assert "base (pretrain, seed 0) digest" in printed


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("lob", "did you mean 'lab'"),
        ("lab:experts/sart@0", "did you mean 'experts/sort@0'"),
        ("0", "there is no run in"),
    ],
)
def test_an_unknown_name_says_what_is_nearest(store, reference, message):
    with pytest.raises(UserError, match=re.escape(message)):
        lineage.tree(store, reference)


def test_the_start_of_several_keys_is_refused(store, graph, monkeypatch):
    monkeypatch.setattr(lineage, "SHORTEST_KEY", 0)
    with pytest.raises(UserError, match="15 content keys begin with this"):
        lineage.resolve(store, "")


def test_rows_come_parents_first_with_scores(store, graph):
    rows = lineage.rows(store, [graph.node("student@0").key])
    assert [row.name for row in rows] == ["base", "cold_start", "experts/caesar", "experts/sort", "student"]
    assert rows[-1].scores == {"sort/held_out": 0.75, "caesar/held_out": 0.75}


def test_the_page_is_whole_by_itself_and_draws_every_box_and_edge(store, graph):
    page = draw_html(store, [graph.node("student@0").key], "lab <&>")
    assert "lab &lt;&amp;&gt;" in page
    assert not re.findall(r"(?:src|href)=|url\((?!#)|@import|<script", page)
    svg = ET.fromstring(re.search(r"<svg.*</svg>", page, re.S).group())
    space = {"s": "http://www.w3.org/2000/svg"}
    boxes = {
        g.find("s:text", space).text: (float(g.find("s:rect", space).get("x")), float(g.find("s:rect", space).get("y")))
        for g in svg.findall("s:g", space)
    }
    columns = [sorted({x for x, _ in boxes.values()}).index(x) for x, _ in boxes.values()]
    assert dict(zip(boxes, columns, strict=True)) == {
        "base": 0,
        "cold_start": 1,
        "experts/sort": 2,
        "experts/caesar": 2,
        "student": 3,
    }
    assert len(set(boxes.values())) == 5
    assert len(svg.findall("s:path[@class='edge']", space)) == 6
    roles = [node.text for node in svg.findall("s:text[@class='role']", space)]
    assert sorted(roles) == ["start", "start", "start", "start", "teacher/caesar", "teacher/sort"]
