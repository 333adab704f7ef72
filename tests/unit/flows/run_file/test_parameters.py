"""The form of a deployment: few fields, no defaults, and the command line's own messages."""

import json
from typing import Any

import jsonschema
import pytest

from base.errors import UserError
from flows.run_file.load import load_run_file
from flows.run_file.parameters import as_lines, form_overrides, form_schema
from flows.run_file.schema import RunConfig
from tests.support.scored_home import run_file


@pytest.fixture
def config(tmp_path) -> RunConfig:
    return load_run_file(run_file(tmp_path), ["seeds=[0,4]"])


def test_the_form_is_short_shows_what_is_in_force_and_switches_nothing(config):
    schema = form_schema(config)
    assert list(schema["properties"]) == ["seeds", "merge_max_steps", "expert_max_steps", "max_steps", "overrides"]
    text = json.dumps(schema)
    assert '"default"' not in text and "remote_code" not in text and schema["required"] == []
    assert "(0, 4 when deployed)" in schema["properties"]["seeds"]["description"]
    assert f"({config.merge.max_steps} when deployed)" in schema["properties"]["merge_max_steps"]["description"]
    assert set(schema["properties"]["expert_max_steps"]["properties"]) == {"sort", "reverse"}
    jsonschema.validate({"run_file": "run.yaml", "plain": True}, schema)


def test_what_is_left_alone_is_no_override(config):
    for nothing in (None, "", []):
        assert form_overrides(config, nothing, None, None) == []
    assert form_overrides(config, None, None, {}) == form_overrides(config, None, None, {"sort": None}) == []
    assert as_lines(["a.b={x: 1,\n y: 2}"]) == ["a.b={x: 1,\n y: 2}"]
    assert as_lines(None) == as_lines("") == as_lines([]) == as_lines(["", " \n"]) == []


def test_entries_are_overrides_as_on_the_command_line(config, tmp_path):
    found = form_overrides(config, "0, 2", 3, {"sort": 5, "reverse": 6})
    assert found[:2] == ["seeds=[0, 2]", "merge.max_steps=3"]
    changed = load_run_file(tmp_path / "run.yaml", [*as_lines(["merge.teachers={sort: sort}\nname=other"]), *found])
    assert changed.seeds == [0, 2] and changed.merge.max_steps == 3 and changed.name == "other"
    assert changed.merge.teachers == {"sort": {"sort": 1.0}}
    assert [expert.train.chosen[1].max_steps for expert in changed.experts.values()] == [5, 6]
    for seeds in ("[0, 2]", [0, 2]):
        assert form_overrides(config, seeds, None, None) == ["seeds=[0, 2]"]


@pytest.mark.parametrize(
    "entries, said",
    [
        (("x", None, None), "seeds.0: Input should be a valid integer"),
        ((None, -3, None), "merge.max_steps: Input should be greater than 0 (given: -3)"),
        ((None, None, {"srt": 3}), "expert_max_steps: 'srt' is no expert that the run trains — did you mean 'sort'?"),
        ((None, None, ["sort"]), "expert_max_steps: name each expert with its steps"),
        ((None, None, {"sort": "many"}), "max_steps: Input should be a valid integer"),
    ],
)
def test_a_wrong_entry_is_refused_by_name(config, tmp_path, entries: Any, said):
    with pytest.raises(UserError) as caught:
        load_run_file(tmp_path / "run.yaml", form_overrides(config, *entries))
    assert said in str(caught.value)


def test_a_run_without_a_merge_has_no_such_field(config):
    alone = config.model_copy(update={"merge": None})
    assert "merge_max_steps" not in form_schema(alone)["properties"]
    with pytest.raises(UserError, match="merge_max_steps: the run has no merge"):
        form_overrides(alone, None, 3, None)
