"""Names of domains, experts and runs in Markdown that browsers show: MLflow's notes, model cards, Prefect's pages."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from base.store.checkpoint import Artifact, Store
from evals.report.table import render_markdown
from evals.tables.markdown import code, plain
from flows.lineage import descriptions, export
from flows.lineage import rows as lineage
from flows.run.finish import Outcome
from tests.support.lineage_home import commit, lessons, shared_graph
from tests.support.scored import results

NASTY = "a|b <img src=x onerror=alert(1)> [x](javascript:alert(2)) `c`\n# d\n```\n<script>"
BAR = re.compile(r"(?<!\\)\|")


def harmless(text: str) -> None:
    outside = re.sub(r"```.*?```|(?<!\\)`[^`\n]*`", "", text, flags=re.DOTALL)
    assert "<img" not in outside and "<script" not in outside
    assert not re.search(r"(?<!\\)\]\(javascript", outside)
    assert "\n# d" not in text
    tables = re.findall(r"(?:^\|.*\n?)+", text, flags=re.MULTILINE)
    for table in tables:
        assert len({len(BAR.findall(line)) for line in table.splitlines()}) == 1, table


@pytest.fixture
def student(tmp_path: Path) -> Artifact:
    graph, store = shared_graph(), Store(tmp_path)
    for node in graph.checkpoints[:-1]:
        commit(store, graph, node)
    made = commit(store, graph, graph.node("student@0"), teachers=lessons(store, graph), data={"sort": "f" * 64})
    facts = dict(made.manifest)
    facts["name"] = NASTY
    facts["parents"] = {f"teacher/{NASTY}": {**parent, "name": NASTY} for parent in facts["parents"].values()}
    facts["teachers"] = [{**each, "domain": NASTY, "teacher": NASTY} for each in facts["teachers"]]
    facts["data"] = {NASTY: "`<img>`"}
    return replace(made, manifest=facts, uri=f"/{NASTY}")


def test_names_in_mlflows_notes_are_text(student):
    note = descriptions.model_note(
        student, descriptions.About(scores={(NASTY, "held_out"): 0.5, ("sort", "held_out"): 1.0})
    )
    harmless(note)
    harmless(
        descriptions.model_note(student, descriptions.About(pages=dict.fromkeys(student.manifest["parents"], "/page")))
    )
    harmless(descriptions.run_note([(student, "/page")]))
    assert "a\\|b &lt;img src=x" in note


def test_names_in_a_model_card_are_text(student, tmp_path):
    (row, *others) = reversed(lineage.rows(Store(tmp_path), [student.key]))
    own = replace(
        row,
        name=NASTY,
        scores={f"{NASTY}/held_out": 0.5, "sort/held_out": 1.0},
        teachers=student.manifest["teachers"],
        parents={f"teacher/{NASTY}": key for key in row.parents.values()},
    )
    card = export.model_card(student, [*others, own], NASTY)
    head, _, body = card.removeprefix("---\n").partition("\n---\n")
    harmless(body)
    assert body.count("```mermaid") == 1 and body.count("```") % 2 == 0
    assert NASTY not in head


def test_names_on_prefects_page_are_text(tmp_path):
    found = results()
    harmless(render_markdown(found))
    assert plain("held_out, 5 %") == "held_out, 5 %"
    assert plain("*x* & \\y") == "\\*x\\* &amp; \\\\y"
    assert code("a`b|c\nd") == "`a'b¦c d`"
    assert Outcome.markdown.__doc__
