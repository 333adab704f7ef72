"""Imported checkpoints that no stage can use end in one sentence of the check, before anything is loaded."""

from pathlib import Path

import pytest

from base.errors import UserError
from base.store.checkpoint import Store
from flows.check.check import deep_check
from flows.plan.graph import build_graph
from tests.support.families import REFUSED, write_model, write_refused
from tests.unit.flows.plan.test_check import FEW, SORT_ALONE
from tests.unit.flows.run_file.test_config import load

WITHOUT_PRETRAINING = [*FEW[1:], SORT_ALONE]


def said(tmp_path: Path, published: Path) -> str:
    """The check's message for a run on this checkpoint; empty if it passes."""
    config = load(tmp_path, WITHOUT_PRETRAINING, base={"checkpoint": str(published)})
    try:
        graph = build_graph(config, tmp_path / "home")
        deep_check(graph, Store(tmp_path / "home"))
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("family", REFUSED)
def test_an_architecture_that_packed_rows_would_change_is_refused(tmp_path: Path, family: str) -> None:
    published = tmp_path / "published"
    write_refused(family, published)
    (message,) = said(tmp_path, published).splitlines()
    assert message.startswith(f"base.checkpoint: {published}: ")
    assert REFUSED[family][2] in message


def test_one_that_is_supported_passes(tmp_path: Path) -> None:
    write_model("mistral", tmp_path / "published")
    assert said(tmp_path, tmp_path / "published") == ""


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"model_type": "no_such_model"}', '{"model_type": "t5"}', "{"])
def test_a_config_that_is_none_names_the_key_and_the_folder(tmp_path: Path, text: str) -> None:
    published = tmp_path / "published"
    write_model("llama", published)
    (published / "config.json").write_text(text)
    message = said(tmp_path, published)
    assert message.startswith(f"base.checkpoint: {published}: ")
    assert "Traceback" not in message
