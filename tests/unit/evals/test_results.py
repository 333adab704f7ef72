"""The summary of a run and the reading of sheets."""

import dataclasses
import json

import pytest

from base.errors import UserError
from base.store.checkpoint import Store
from evals.comparison.results import Results, metrics
from evals.comparison.scores import Scores, read_scores
from evals.measure.evaluate import summary
from evals.promotion.gate import judge
from evals.report.table import sampled_grid
from flows.champion.results import collect
from flows.plan.nodes import Node, StageGraph
from flows.run_file.schema import RunConfig
from tests.support.scored import results, row, sheet


def test_metrics_hold_the_table():
    found = metrics(results())
    assert found["eval/a/teacher"] == pytest.approx(0.9)
    assert found["eval/b/cold_start"] == pytest.approx(0.5)
    assert found["eval/recovery"] == pytest.approx(0.75)
    assert found["eval/a/recovery_low"] < 0.75 < found["eval/a/recovery_high"]
    assert found["eval/mean/student"] == pytest.approx(0.8)
    assert found["eval/forgetting/g"] == 0
    assert "eval/g/teacher" not in found


def test_what_is_missing_has_no_key():
    found = metrics(results({("student", "b"): -1}))
    assert "eval/b/student" not in found and "eval/mean/student" not in found and "eval/recovery" not in found
    assert found["eval/a/student"] == pytest.approx(0.8)


def test_other_examples_are_refused():
    whole = results()
    cells = dict(whole.cells) | {("base", "a", "held_out"): {0: sheet("a", 0.5, 7)}}
    with pytest.raises(UserError, match="other examples of a/held_out"):
        dataclasses.replace(whole, cells=cells)


def test_a_seed_that_only_one_side_has_is_left_out():
    whole = results()
    cells = dict(whole.cells) | {("student", "a", "held_out"): {1: sheet("a", 0.6)}}
    partial = dataclasses.replace(whole, cells=cells)
    pair = partial.aligned(["cold_start", "student"], "a")
    assert pair is not None and pair[0].shape == (1, 100)


def test_sheet_is_read_and_checked(tmp_path):
    path = tmp_path / "scores.jsonl"
    path.write_text("".join(json.dumps(row(i, 1.0, (1.0, 0.0))) + "\n" for i in range(4)))
    scores = read_scores(tmp_path, "a", "held_out")
    assert list(scores.sampled_N) == [0.5] * 4 and scores.contaminated == 0.25
    path.write_text(json.dumps({"id": "x"}) + "\n")
    with pytest.raises(UserError, match=r"scores\.jsonl:1: a row lacks"):
        read_scores(tmp_path, "a", "held_out")


def test_contamination_is_told_in_words():
    def told(*rows):
        return Scores("a", "held_out", [{**row(n, 1.0), **changes} for n, changes in enumerate(rows)]).contamination

    clean, unknown = {"contaminated": False, "copy": ""}, {"contaminated": None, "copy": ""}
    near, same = {"contaminated": True, "copy": "near"}, {"contaminated": True, "copy": "prompt"}
    assert told(clean, clean) == "none" and told(unknown, unknown) == "unknown"
    assert told(near, same, clean, clean) == "50.0 %, 25.0 % near copies"
    assert told(same, unknown) == "at least 50.0 %"


def test_an_unknown_share_is_no_metric_of_0():
    def found(*rows):
        metrics = summary([{**row(n, 1.0), **changes} for n, changes in enumerate(rows)])
        return {name: value for name, value in metrics.items() if name != "greedy"}

    clean, unknown = {"contaminated": False, "copy": ""}, {"contaminated": None, "copy": ""}
    near = {"contaminated": True, "copy": "near"}
    assert found(clean, clean) == {"contaminated": 0.0}
    assert found(unknown, unknown) == {}
    assert found(near, clean) == {"contaminated": 0.5, "near_copies": 0.5}
    assert found(near, unknown) == {"contaminated_at_least": 0.5, "near_copies": 0.5}


def _node(node_id: str, parents: dict[str, str]) -> Node:
    name = node_id.partition("@")[0]
    stage = "evaluate" if parents else "load"
    config = {"domain": "a", "split": "held_out"} if parents else {}
    return Node(node_id, name, stage, 0, config, parents, {}, {}, node_id.replace("/", "-"))


def test_collect_reads_what_is_finished(tmp_path):
    """The shared base counts for both seeds; of the student only seed 1 is finished."""
    checkpoints = ["base", "student@0", "student@1"]
    nodes = [_node(name, {}) for name in checkpoints]
    for name in checkpoints:
        bare, _, seed = name.partition("@")
        nodes.append(_node(f"eval/{bare}/a/held_out" + (f"@{seed}" if seed else ""), {"checkpoint": name}))
    config = RunConfig.model_validate(
        {
            "name": "toy",
            "seeds": [0, 1],
            "base": {"checkpoint": "x"},
            "domains": {"a": {"kind": "strings"}},
            "experts": {"e": {"domain": "a", "checkpoint": "y"}},
        }
    )
    store = Store(tmp_path)
    for key, share in (("eval-base-a-held_out", 0.2), ("eval-student-a-held_out@1", 0.7)):
        folder = store.staging(key)
        rows = sheet("a", share).rows
        (folder / "scores.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
        store.commit(folder, key, {"name": key})
    found = collect(StageGraph(config, tuple(nodes), {}), store)
    assert sorted(found.cells[("base", "a", "held_out")]) == [0, 1]
    assert sorted(found.cells[("student", "a", "held_out")]) == [1]
    assert found.experts["experts/e"].method == "given" and found.start == "base"
    gain = found.difference("student", "base", "a")
    assert gain is not None and gain.mean == pytest.approx(0.5)
    assert set(found.provenance) == {"eval/base/a/held_out", "eval/student/a/held_out@1"}


def test_a_domain_with_several_teachers_is_measured_by_the_heaviest(tmp_path):
    def teachers(weights: dict[str, float]) -> Results:
        entry = {
            "name": "toy",
            "base": {"checkpoint": "x"},
            "domains": {"a": {"kind": "strings"}},
            "experts": {name: {"domain": "a", "checkpoint": name} for name in ("e", "f")},
            "merge": {"teachers": {"a": weights}},
        }
        return collect(StageGraph(RunConfig.model_validate(entry), (), {}), Store(tmp_path))

    found = teachers({"e": 1, "f": 3})
    assert found.teachers == {"a": {"experts/e": 0.25, "experts/f": 0.75}}
    assert found.checkpoint("teacher", "a") == "experts/f"
    assert teachers({"f": 1, "e": 1}).teacher("a") == "experts/f"
    assert found.teacher("b") is None
    assert judge(found, 0.1, 0.1).criteria[0].name == "non-inferior to experts/f on a"


def test_sampled_scores_and_pass_at_k():
    drawn = Scores("a", "held_out", [row(0, 1.0, (1.0, 0.0)), row(1, 0.0, (0.0, 0.0)), row(2, 0.0, (1.0, 1.0))])
    whole = dataclasses.replace(results(), cells={("student", "a", "held_out"): {0: drawn}})
    mean, reached, tries = whole.sampled("student", "a")
    assert (mean.mean, tries) == (0.5, 2)
    assert reached.mean == pytest.approx(2 / 3)
    # Agresti & Coull's for two of three.
    assert (reached.low, reached.high) == pytest.approx((0.2024, 0.9443), abs=1e-3)
    found = metrics(whole)
    assert (found["eval/a/student_sampled"], found["eval/a/student_sampled_low"]) == (0.5, mean.low)
    assert found["eval/a/student_pass_at_2"] == pytest.approx(2 / 3)
    assert whole.sampled("base", "a") is None
    assert sampled_grid(results()) is None
    assert [(*cells[:2], cells[-1]) for cells in sampled_grid(whole).rows] == [
        ("a", "mean score", "50.0 [12.5, 87.5]"),
        ("a", "pass@2", "66.7 [20.2, 94.4]"),
    ]
