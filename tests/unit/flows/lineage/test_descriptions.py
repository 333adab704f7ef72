"""What a checkpoint's page in the tracking store says."""

from pathlib import Path

import pytest

from base.store.checkpoint import Artifact, Store
from flows.lineage import descriptions
from tests.support.lineage_home import commit, lab_graph, lessons, shared_graph


def student(home: Path) -> Artifact:
    """A student with two teachers of one domain."""
    graph, store = shared_graph(), Store(home)
    for node in graph.checkpoints[:-1]:
        commit(store, graph, node)
    return commit(store, graph, graph.node("student@0"), teachers=lessons(store, graph))


def test_parameters_and_note_say_who_taught_what(tmp_path: Path) -> None:
    made = student(tmp_path)
    digest = Store(tmp_path).get(lab_graph().node("experts/caesar@0").key).digest[:12]
    params, note = descriptions.model_params(made), descriptions.model_note(made, descriptions.About())
    lesson = f"experts/caesar, digest {digest}, objective reverse_kl, weight 0.25, 50.0% of the prompts"
    assert params["teachers.sort.caesar"] == lesson
    assert {name for name in params if name.startswith("teachers.")} == {
        "teachers.sort.sort",
        "teachers.sort.caesar",
        "teachers.caesar.caesar",
    }
    assert f"- sort: {lesson}" in note.splitlines()
    assert "- teacher/sort/caesar: experts/caesar" in note


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({}, "unknown: its training data are not recorded"),
        ({"trained_on": {"groups": {}, "unknown": ["base"]}}, "unknown: the training data of base are not recorded"),
        ({"trained_on": {"groups": {}, "unknown": []}}, None),
    ],
)
def test_unknown_contamination_is_among_parameters_and_in_the_note(tmp_path: Path, record, told) -> None:
    graph, store = shared_graph(), Store(tmp_path)
    made = commit(store, graph, graph.checkpoints[0], **record)
    note = descriptions.model_note(made, descriptions.About())
    assert descriptions.model_params(made).get("contamination") == told
    assert (f"Contamination is {told}." in note) if told else ("Contamination" not in note)


def test_a_checkpoint_without_teachers_has_no_lessons(tmp_path: Path) -> None:
    graph = shared_graph()
    made = commit(Store(tmp_path), graph, graph.checkpoints[0])
    assert not [name for name in descriptions.model_params(made) if name.startswith("teachers.")]
    assert "Taught" not in descriptions.model_note(made, descriptions.About())


def test_a_note_has_scores_cost_code_and_where_the_data_can_be_seen(tmp_path: Path) -> None:
    graph, store = shared_graph(), Store(tmp_path)
    node = graph.checkpoints[0]
    spent = {"seconds": 61.4, "device_seconds": 122.8, "tokens": 12345, "code": "c0de" * 16}
    shown = {"sort": [{"prompt": "sort cab:", "answer": "abc"}]}
    made = commit(store, graph, node, **spent, examples=shown, data={"sort": "f" * 64})
    lines = descriptions.model_note(
        made, descriptions.About(scores={("sort", "held_out"): 0.875, ("caesar", "held_out"): 0.0})
    ).splitlines()
    assert "| sort | held_out | 87.5 |" in lines and "| caesar | held_out | 0.0 |" in lines
    assert "Cost: 61 s, 123 device-seconds, 12,345 tokens; code `c0dec0dec0dec0de`" in lines
    assert "Some of it: `data.json` among the artifacts of its run." in lines
    assert descriptions.data_table(made) == {
        "columns": ["domain", "prompt", "answer"],
        "data": [["sort", "sort cab:", "abc"]],
    }
