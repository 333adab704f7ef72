"""An objective in a Python file of one's own: found from the run file's folder, its content part of the key."""

from pathlib import Path

import pytest

from base.errors import UserError
from flows.plan.nodes import StageGraph
from tests.unit.flows.plan.test_plan import changed, graph_of, with_evaluations

SOURCE = """import torch


def skewed(student_CV, target_CV, tokens_C, *, alpha=0.1):
    return (student_CV - target_CV).square().mean(-1) * alpha
"""


def planned(folder: Path, objective: str = "{type: python, path: mine.py:skewed}", text: str = SOURCE) -> StageGraph:
    (folder / "mine.py").write_text(text)
    return graph_of(folder, [f"merge.objective={objective}"])


def test_the_file_and_the_options_are_in_the_key_and_the_folder_is_not(tmp_path: Path) -> None:
    before = planned(tmp_path)
    student = with_evaluations(before, {"student@0"})
    assert before.node("student@0").config["objective"]["path"] == f"{tmp_path}/mine.py:skewed"
    assert changed(before, planned(tmp_path, text=SOURCE + "# An edit.\n")) == student
    assert changed(before, planned(tmp_path, "{type: python, path: mine.py:skewed, options: {alpha: 0.2}}")) == student
    (moved := tmp_path / "moved").mkdir()
    assert changed(before, planned(moved)) == set()


def test_a_variants_own_objective_is_found_from_the_same_folder(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(SOURCE)
    graph = graph_of(tmp_path, ["merge.variants={own: {objective: {type: python, path: mine.py:skewed}}}"])
    assert graph.node("variants/own@0").config["objective"]["path"] == f"{tmp_path}/mine.py:skewed"
    assert "objective" in graph.node("variants/own@0").ingredients
    assert "objective" not in graph.node("student@0").ingredients


@pytest.mark.parametrize(
    ("objective", "text", "said"),
    [
        ("{type: python, path: mime.py:skewed}", SOURCE, r"mime\.py: no such file — did you mean '.*mine\.py'"),
        ("{type: python, path: mine.py:skewd}", SOURCE, r"mine\.py: no function 'skewd' — did you mean 'skewed'"),
        ("{type: python, path: mine.py:skewed}", "def skewed(:\n", r"mine\.py: line 1: not Python"),
        ("{type: python, path: mine.py:f}", "def f(student, target): ...\n", "takes 2 positional arguments"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_by_the_plan(
    tmp_path: Path, objective: str, text: str, said: str
) -> None:
    with pytest.raises(UserError, match=rf"^merge\.objective\.path: .*{said}"):
        planned(tmp_path, objective, text)


def test_an_unknown_option_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"^merge\.objective\.options\.alfa: no keyword of skewed — did you mean 'alpha'"
    ):
        planned(tmp_path, "{type: python, path: mine.py:skewed, options: {alfa: 1}}")
