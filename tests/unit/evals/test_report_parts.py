"""What stands in a report: samples, costs, curves and the data beside the page."""

import csv
import dataclasses
import json
import math
import re
from html import unescape

import pytest

from base.store.checkpoint import Artifact, Store
from evals.comparison.results import Cost
from evals.comparison.scores import Scores
from evals.promotion.gate import judge
from evals.report.costs import spendings, totals
from evals.report.curves import BUCKETS, curves_cards, thinned
from evals.report.page import Background, write_report
from evals.report.samples import best_other, columns_of, outcomes, samples_section, standing
from flows.champion.costs import busy_seconds, scoring_costs
from tests.support.scored import results, row, sheet
from tests.support.scored_home import EXAMPLES, finish, graph_of, run_file


def test_outcomes_compare_student_and_teacher_and_all():
    assert [standing(score) for score in (0, 0.3, 1)] == ["wrong", "partly", "right"]
    assert outcomes({"base": "right", "teacher": "right", "student": "partly"}) == ["lost"]
    assert outcomes({"base": "wrong", "teacher": "wrong", "student": "right"}) == ["gained"]
    assert outcomes({"base": "right", "student": "right"}) == ["all-right"]
    assert outcomes({"base": "partly", "teacher": "wrong", "student": "wrong"}) == ["all-wrong"]
    assert outcomes({"base": "wrong", "teacher": "right", "student": "right"}) == []


def test_the_best_other_merge_stands_beside_the_student():
    whole = results({("baselines/ties", d): 0.6 for d in "abg"} | {("baselines/dare", d): 0.7 for d in "ab"})
    whole = dataclasses.replace(whole, checkpoints=(*whole.checkpoints, "baselines/ties", "baselines/dare"))
    assert best_other(whole) == "baselines/dare" and best_other(results()) is None
    titles = [column.title for column in columns_of(whole, "b", 0, "baselines/dare")]
    assert titles == ["base", "cold start", "teacher: b", "student: MOPD", "dare"]
    assert [column.role for column in columns_of(whole, "g", 0, None)] == ["base", "cold_start", "student"]


def test_a_page_of_long_completions_stays_small(tmp_path):
    rows = []
    for number in range(60):
        one = row(number, 0.4)
        rows.append(one | {"greedy": one["greedy"] | {"completion": "<&" * 20_000}})
    plain = results(seeds=(0,))
    domains = tuple(f"d{number}" for number in range(12))
    cells = {(n, d, "held_out"): {0: Scores(d, "held_out", rows)} for n in plain.checkpoints for d in domains}
    whole = dataclasses.replace(plain, domains=domains, cells=cells)
    text = samples_section(whole)
    assert "more characters)" in text and "◐ partly, 0.40" in text and '<details class="fold">' in text
    path = write_report(tmp_path / "report.html", whole, None, Background())
    assert path.stat().st_size < 5_000_000


def test_totals_are_sums_by_group_of_stages():
    whole = dataclasses.replace(
        results(),
        checkpoints=(*results().checkpoints, "baselines/ties"),
        costs={
            "base": Cost(100, 10, 5),
            "experts/a": Cost(20, 2, 7),
            "experts/b": Cost(30, 3, 6),
            "student": Cost(1, 4, 0),
        },
    )
    scoring = {"base": Cost(6, 0.5, 9), "baselines/ties": Cost(7, 0.25, 1)}
    found = spendings(whole, scoring)
    assert [one.name for one in found] == ["base", "experts/a", "experts/b", "student", "baselines/ties"]
    assert totals(found) == {
        "base and cold start": Cost(100, 10, 5),
        "experts": Cost(50, 5, 7),
        "merge: MOPD": Cost(1, 4, 0),
        "evaluation": Cost(13, 0.75, 9),
        "all": Cost(164, 19.75, 9),
    }


def test_evaluations_of_one_process_are_counted_once(tmp_path):
    """Two started at second 100 and one later, on its own."""
    facts = [(104.0, 4.0), (110.0, 10.0), (203.0, 3.0)]
    made = [Artifact("k", tmp_path, "d", {"created": end, "seconds": seconds}) for end, seconds in facts]
    assert busy_seconds(made) == pytest.approx(13.0)


def test_scoring_costs_are_read_from_sheets_and_manifests(tmp_path):
    from flows.champion.results import collect

    graph = graph_of(run_file(tmp_path), tmp_path)
    store: Store = finish(graph, tmp_path)
    found = scoring_costs(graph, store, collect(graph, store))
    domains = len(graph.evaluations(graph.checkpoints[0].id))
    assert set(found) == {node.name for node in graph.checkpoints}
    assert found["base"].tokens == 3 * EXAMPLES * domains and 1.0 <= found["base"].seconds <= domains


def test_a_students_mean_is_the_same_in_tables_drawing_data_and_metrics(tmp_path):
    """0.8 on both experts' domains; the general domain, at 0.5, is in no mean."""
    from evals.comparison.results import metrics
    from flows.champion.results import collect
    from flows.lineage import rows as lineage
    from flows.lineage.drawing import draw_html
    from flows.run.finish import finish_run

    graph = graph_of(run_file(tmp_path), tmp_path)
    store = finish(graph, tmp_path)
    results = collect(graph, store)
    rows = lineage.rows(store, [node.key for node in graph.checkpoints])
    assert lineage.expert_domains(rows) == results.expert_domains == ("sort", "reverse")
    student = next(row for row in rows if row.name == "student")
    mean = lineage.mean_score(student, results.expert_domains)
    assert mean == pytest.approx(0.8) == results.mean_score("student").mean == metrics(results)["eval/mean/student"]
    assert "mean of experts' domains 80.0 %" in unescape(draw_html(store, [student.key], "tiny"))
    outcome = finish_run(graph, store, promote=False)
    data = json.loads(outcome.report.with_name("report.json").read_text())
    assert data["metrics"]["eval/mean/student"] == pytest.approx(0.8)
    # Of the candidate, which is TIES here.
    assert data["summary"]["mean"]["student"] == pytest.approx(0.95)
    assert {"mean of experts' domains 80.0 %", "mean of experts' domains 95.0 %"} <= set(
        re.findall(r"mean of experts' domains [\d.]+ %", unescape(outcome.report.read_text()))
    )


def test_a_thinned_curve_keeps_its_spikes():
    points = [(step, 0.0) for step in range(10_000)]
    points[5_123] = (5_123, 9.0)
    kept = thinned(points)
    assert len(kept) <= 2 * BUCKETS and (5_123, 9.0) in kept and kept == sorted(kept)
    assert thinned(points[:50]) == points[:50]


def test_seeds_share_a_panel_and_what_tells_nothing_is_left_out():
    """NaN, a metric that never changes, and a domain that is all there is."""
    losses = [math.nan if step == 3 else 1.0 * step for step in range(9)]
    records = [
        {"step": step, "values": {"sft/seconds": 2.0, "sft/loss": loss, "sft/loss/a": loss}}
        for step, loss in enumerate(losses)
    ]
    text = curves_cards({"student@0": records, "student@1": records, "base": [{"step": 0, "text": "<said>"}]})
    assert text.count("<svg") == 1 and text.count("<polyline") == 2 and "nan" not in text
    assert text.count("<details") == 2 and "seed 1" in text and "step 0: &lt;said&gt;" in text


def test_data_stands_beside_the_page(tmp_path):
    drawn = Scores("a", "held_out", [row(0, 0.5, (1.0, 0.0)), row(1, 0.0, (0.0, 0.0))])
    plain = results()
    cells = {("student", "a", "held_out"): {1: drawn}, ("base", "a", "held_out"): {0: sheet("a", 0.5, 2)}}
    whole = dataclasses.replace(plain, cells=cells, provenance={"eval/x": ("key", "digest")})
    background = Background(lineage=[{"checkpoint": "base@0"}], scoring={"student": Cost(9, 1.5, 4)})
    page = write_report(tmp_path / "report.html", whole, judge(whole, 0.1, 0.1), background).read_text()
    assert 'href="scores.csv"' in page and 'href="report.json"' in page
    with (tmp_path / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    assert rows[0] == {
        "checkpoint": "student",
        "domain": "a",
        "split": "held_out",
        "seed": "1",
        "example": "id0",
        "greedy_score": "0.5",
        "sampled_score": "0.5",
        "tokens": "3",
        "truncated": "0",
        "contaminated": "1",
        "copy": "prompt",
    }
    assert (rows[2]["checkpoint"], rows[2]["sampled_score"]) == ("base", "")
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["metrics"]["eval/a/student"] == pytest.approx(0.25) and data["seeds"] == [0, 1]
    assert data["tables"][0]["head"][0] == "domain" and data["verdict"]["promoted"] is False
    assert data["verdict"]["criteria"][0]["passed"] is False and data["lineage"] == [{"checkpoint": "base@0"}]
    assert data["costs"]["totals"]["all"] == {"tokens": 9, "seconds": 1.5, "memory": 4}
    assert data["provenance"] == {"eval/x": {"key": "key", "digest": "digest"}}
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "scores.csv", "report.json"}
