"""What decides how templates render: in the keys of what renders an imported template, and pinned by the lock."""

import json
from pathlib import Path

import pytest

from base.store.checkpoint import Store
from flows.engines.process_spec import ProcessSpec
from flows.plan.lock import lock_path, status, write_lock
from flows.plan.nodes import StageGraph
from tests.support.checkpoints import pretend_checkpoint
from tests.unit.flows.plan.test_plan import changed, graph_of
from tests.unit.flows.run_file.test_config import message

DATED = "{{ strftime_now('%d %b %Y') }}{{ messages[0]['content'] }}"
UNDATED = "{{ messages[0]['content'] }}"
KWARGS = "chat_template_kwargs={enable_thinking: false}"


@pytest.fixture(autouse=True)
def _first_day(monkeypatch) -> None:
    monkeypatch.setattr("flows.plan.templates.today", lambda: "2026-11-28")


def imported(tmp_path: Path, template: str, overrides: list[str] | None = None, place: str = "jinja") -> StageGraph:
    """The graph of a run whose base is a checkpoint with a template."""
    folder = pretend_checkpoint(tmp_path / "model")
    if place == "jinja":
        (folder / "chat_template.jinja").write_text(template)
    else:
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return graph_of(tmp_path, overrides, base={"checkpoint": str(folder)})


def of_prompts(graph: StageGraph) -> set[str]:
    return {node.id for node in graph.nodes if node.stage != "load"}


@pytest.mark.parametrize("place", ["jinja", "config"])
def test_the_date_of_a_template_is_pinned_by_the_lock(tmp_path: Path, monkeypatch, place: str) -> None:
    first = imported(tmp_path, DATED, place=place)
    assert first.pins == {"date": "2026-11-28"}
    assert first.rendering.date == "2026-11-28"
    write_lock(first, tmp_path / "home")
    monkeypatch.setattr("flows.plan.templates.today", lambda: "2026-11-29")
    later = imported(tmp_path, DATED, place=place)
    assert later.pins == first.pins
    assert changed(first, later) == set()
    home = tmp_path / "home"
    lock_path(home, "tiny").write_text(lock_path(home, "tiny").read_text().replace("2026-11-28", "2026-11-20"))
    before = imported(tmp_path, DATED, place=place)
    lock_path(home, "tiny").unlink()
    unpinned = imported(tmp_path, DATED, place=place)
    assert changed(before, unpinned) == of_prompts(before)
    write_lock(before, home)
    why = {entry.node.id: entry.why for entry in status(unpinned, Store(home))}
    assert why["cold_start@0"] == "changed: date 2026-11-20 → 2026-11-29"


def test_a_template_without_a_date_has_none_in_its_keys(tmp_path: Path, monkeypatch) -> None:
    first = imported(tmp_path, UNDATED)
    monkeypatch.setattr("flows.plan.templates.today", lambda: "2026-11-29")
    assert changed(first, imported(tmp_path, UNDATED)) == set()
    assert first.pins == {}
    assert not any("date" in node.ingredients for node in first.nodes)


def test_what_a_template_is_given_is_in_the_keys_of_what_renders_it(tmp_path: Path) -> None:
    first = imported(tmp_path, UNDATED)
    given = imported(tmp_path, UNDATED, [KWARGS])
    assert changed(first, given) == of_prompts(first)
    assert given.rendering.arguments == {"enable_thinking": False}
    spec = ProcessSpec.of(given, [given.node("cold_start@0")], tmp_path, 1).contents
    assert spec["rendering"] == {"arguments": {"enable_thinking": False}, "date": None}
    assert "rendering" not in ProcessSpec.of(first, [first.node("cold_start@0")], tmp_path, 1).contents


def test_a_model_made_here_takes_nothing(tmp_path: Path) -> None:
    assert changed(graph_of(tmp_path), graph_of(tmp_path, [KWARGS])) == set()


@pytest.mark.parametrize("name", ["messages", "add_generation_prompt", "strftime_now"])
def test_what_stages_give_themselves_is_refused(tmp_path: Path, name: str) -> None:
    said = message(tmp_path, [f"chat_template_kwargs={{{name}: 1}}"])
    assert said.endswith(f"{name} is set by the stages; only variables of the template itself are allowed here")
    assert "chat_template_kwargs" in said
