"""The report is whole, self-contained and escapes what models say."""

import dataclasses
import re

import pytest

from evals.comparison.results import Cost
from evals.promotion.criterion import Criterion
from evals.promotion.gate import GateVerdict, judge
from evals.report.page import Background, write_report
from evals.tables.templates import code_spans
from tests.support.scored import results, sheet

pytestmark = pytest.mark.slow

CURVES = {"experts/a": [{"step": step, "values": {"rl/reward/a": step / 9}} for step in range(10)]}


def _written(tmp_path, whole):
    background = Background(CURVES, "<svg></svg>", [{"node": "student"}], {"student": Cost(1200, 30.0, 2**30)})
    return write_report(tmp_path / "r" / "report.html", whole, judge(whole, 0.08, 0.05), background).read_text()


def test_report_holds_verdict_tables_figures_and_samples(tmp_path):
    text = _written(tmp_path, results())
    assert "Not promoted" in text and "non-inferior to experts/a on a" in text and "75.0 [" in text
    # A picture of each domain and the mean, two figures, a curve and the lineage.
    assert text.count("<svg") == 3 + 1 + 4 and "rl/reward/a" in text and "currentColor" in text
    assert "&lt;c0&gt;" in text and "<c0>" not in text and "contaminated" in text


def test_report_holds_what_a_stage_noted(tmp_path):
    curves = {"student@0": [{"step": 12, "text": "alarm: <sort> repeats itself"}]}
    text = write_report(tmp_path / "report.html", results(), None, Background(curves)).read_text()
    assert "<summary>student</summary><ul>\n<li>seed 0, step 12: alarm: &lt;sort&gt; repeats itself</li>\n</ul>" in text


def test_a_reason_with_a_colon_stays_in_the_status(tmp_path):
    met, reason = Criterion("one", True, "It is met."), "a person chose another: it reads better"
    verdict = GateVerdict("student", "the only one", (met,), withheld=reason)
    text = write_report(tmp_path / "report.html", results(), verdict, Background()).read_text()
    assert '<p class="status bad">Not promoted, a person chose another: it reads better</p>' in text
    assert '<p class="goodness">Student has ' in text


def test_code_in_a_suggestion_is_code_and_the_rest_is_text():
    assert code_spans("`mopd run <x>` & so on") == "<code>mopd run &lt;x&gt;</code> &amp; so on"


def test_report_asks_nothing_of_the_network(tmp_path):
    text = _written(tmp_path, results())
    assert not re.search(r"<(link|img|iframe)\b|<script [^>]|@import|(src|href)=[\"']?(https?:)?//|url\((?!#)", text)


def test_partial_results_are_reported(tmp_path):
    partial = dataclasses.replace(results(), cells={("base", "a", "held_out"): {0: sheet("a", 0.2)}})
    text = _written(tmp_path, partial)
    assert "Not promoted" in text and "not scored" in text and "20.0<br><small>[" in text
