"""Every student that the gate judges on the same examples is a try, and later ones have less of its level."""

import json
from pathlib import Path

import numpy as np
import pytest

from base.errors import UserError
from base.store.checkpoint import Store
from evals.promotion.gate import judge, spent
from flows.champion.champion import first_of, judge_run
from flows.champion.results import collect
from flows.champion.tries import read_tries, try_number
from flows.plan.lock import lock_path
from flows.plan.nodes import StageGraph
from flows.plan.state_files import TRIES_FILE
from flows.run.finish import finish_run
from flows.run_file.schema import STUDENT
from tests.support.scored import results
from tests.support.scored_home import finish, graph_of, run_file


@pytest.fixture(autouse=True)
def _nobody_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.champion.champion.update_aliases", lambda store, run, candidate=None: None)


def made(tmp_path: Path, *overrides: str) -> tuple[StageGraph, Store]:
    graph = graph_of(run_file(tmp_path), tmp_path / "home", *overrides)
    return graph, finish(graph, tmp_path / "home")


def number(graph: StageGraph, store: Store) -> int:
    return try_number(store, collect(graph, store), first_of(graph, STUDENT).key)


def test_a_student_counts_once_and_a_look_at_the_report_not_at_all(tmp_path: Path) -> None:
    first, store = made(tmp_path)
    finish_run(first, store, promote=False)
    assert read_tries(store, "tiny") == [] and number(first, store) == 1
    for _ in range(2):
        finish_run(first, store, promote=True)
    assert len(read_tries(store, "tiny")) == 1 and number(first, store) == 1
    second, _ = made(tmp_path, "merge.max_steps=7")
    assert number(second, store) == 2
    assert (
        "; try 2 on these examples, at 0.25 of the gate's level" in judge_run(second, store, collect(second, store)).why
    )
    finish_run(second, store, promote=True)
    assert [number(graph, store) for graph in (first, second)] == [1, 2]


def test_another_seed_in_the_first_place_is_another_try(tmp_path: Path) -> None:
    graph, store = made(tmp_path, "seeds=[0,1]")
    finish_run(graph, store, promote=True)
    turned, _ = made(tmp_path, "seeds=[1,0]")
    assert number(turned, store) == 2


def test_other_examples_begin_a_count_of_their_own(tmp_path: Path) -> None:
    graph, store = made(tmp_path)
    finish_run(graph, store, promote=True)
    path = lock_path(store.home, "tiny").with_name(TRIES_FILE)
    kept = json.loads(path.read_text())
    kept["tries"][0]["examples"] = dict.fromkeys(kept["tries"][0]["examples"], "other")
    path.write_text(json.dumps(kept))
    assert number(made(tmp_path, "merge.max_steps=7")[0], store) == 1


def test_a_damaged_count_is_named_and_the_report_goes_on(tmp_path: Path) -> None:
    graph, store = made(tmp_path)
    path = lock_path(store.home, "tiny").with_name(TRIES_FILE)
    path.write_text('{"tries": [{"student": 3}]}')
    with pytest.raises(UserError, match=r"tries\.json: .*counts its tries on the held-out examples from one again"):
        finish_run(graph, store, promote=True)
    faults: list[str] = []
    assert finish_run(graph, store, promote=False, faults=faults).verdict is None and len(faults) == 1


def test_all_tries_together_have_one_and_a_half_times_the_level() -> None:
    shares = [spent(tries) for tries in range(1, 10_000)]
    assert shares[0] == 1 and shares == sorted(shares, reverse=True)
    assert 1.49 < sum(shares) < 1.5


def test_what_passes_at_first_may_not_at_the_twentieth_try() -> None:
    whole = results({("student", "a"): 0.89, ("student", "b"): 0.9})
    passed = [judge(whole, 0.08, 0.05, tries=tries).passed for tries in (1, 20)]
    assert passed == [True, False]
    assert np.isclose(spent(20), 0.5 / 380)
