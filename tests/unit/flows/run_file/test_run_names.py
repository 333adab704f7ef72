"""Which names of flow runs are a person's own, and stay."""

from types import SimpleNamespace

import pytest
from prefect.utilities.names import generate_slug

from flows.run import crashed_runs
from flows.run.crashed_runs import is_generated, name_flow_run

TITLE = "lab #3, + digits, from champion"


@pytest.mark.parametrize("name", ["gamma47-kesprytt-field", "phi283-zibalia", "chi6-foucault-adjunct"])
def test_names_of_prefects_form_are_generated(name):
    assert is_generated(name)


def test_names_of_prefects_server_are_generated():
    assert all(is_generated(generate_slug(2)) for _ in range(100))


@pytest.mark.parametrize("name", ["my own name", "digits", "alpha-test", "quick-check", "lab-2026-11-29", "sweep-3"])
def test_names_of_a_person_are_not(name):
    assert not is_generated(name)


@pytest.mark.parametrize(
    "before, after",
    [
        ("phi283-zibalia", TITLE),
        ("", TITLE),
        # Begun again by a worker.
        ("lab #2", TITLE),
        ("quick-check", "lab #3, quick-check"),
    ],
)
def test_a_title_replaces_what_nobody_chose(monkeypatch, before, after):
    monkeypatch.setattr(crashed_runs, "flow_run", SimpleNamespace(name=before, id=None))
    assert name_flow_run(TITLE, "lab") == after
