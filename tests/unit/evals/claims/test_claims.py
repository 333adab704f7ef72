"""Hypotheses fixed in a run file: contrasts, verdicts, and the names they may hold."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError
from scipy import stats

from evals.claims.data import findings_again, findings_data
from evals.claims.figures import fits_figure, intervals_figure
from evals.claims.findings import findings
from evals.claims.page import Judged, claims_page, hypotheses_grid
from evals.comparison.results import Cost, Expert, Results
from evals.comparison.scores import Scores
from evals.config.claims import ComparisonConfig, HypothesisConfig
from evals.statistics.crossed_effects import over_both, over_examples
from tests.support.scored import row, sheet
from tests.unit.flows.run_file.test_config import load, message

SEEDS = (0, 1, 2, 3)
GREEDY = {"cold_start": 0.5, "experts/rl": 0.8, "experts/sft": 0.6, "student": 0.79, "variants/half": 0.7}
OLD = {"cold_start": 0.9, "experts/rl": 0.88, "experts/sft": 0.3, "student": 0.88, "variants/half": 0.6}


def run(**tests: dict) -> Results:
    """Four seeds of two domains, `new` with an expert and `old` without, with exact means and no noise in seeds."""
    cells = {}
    for name, share in GREEDY.items():
        cells[name, "new", "held_out"] = {seed: sheet("new", share) for seed in SEEDS}
        cells[name, "old", "held_out"] = {seed: sheet("old", OLD[name]) for seed in SEEDS}
    return Results(
        run="toy",
        seeds=SEEDS,
        checkpoints=tuple(GREEDY),
        domains=("new", "old"),
        cells=cells,
        teachers={"new": {"experts/rl": 1.0}},
        experts={},
        anchored=(),
        start="cold_start",
        confidence=0.95,
        provenance={},
        spent={
            "experts/rl": {seed: Cost(100, 60 + seed, 0) for seed in SEEDS},
            "student": {seed: Cost(100, 20 + 2 * seed, 0) for seed in SEEDS},
        },
        shift={
            ("experts/rl", "rounded_away", ""): {seed: 0.5 + 0.01 * seed for seed in SEEDS},
            ("experts/sft", "rounded_away", ""): dict.fromkeys(SEEDS, 0.1),
            **{(name, "kl_start", "new"): dict.fromkeys(SEEDS, 1 - share) for name, share in OLD.items()},
        },
        hypotheses={"C1": HypothesisConfig.model_validate({"claim": "It holds.", "tests": tests})},
    )


def found(**tests: dict) -> dict:
    results = run(**{name: {"domains": ["new"]} | test for name, test in tests.items()})
    return {one.test: one for one in findings(results, results.hypotheses)}


def test_a_comparison_is_the_paired_difference():
    one = found(a={"compare": ["experts/rl", "experts/sft"], "expect": "above"})["a"]
    assert one.interval.mean == pytest.approx(0.2)
    assert 0 < one.interval.low < 0.2 < one.interval.high
    assert (one.verdict, one.seeds, one.examples) == ("shown", 4, 100)
    assert one.values == {"experts/rl": pytest.approx(0.8), "experts/sft": pytest.approx(0.6)}
    assert found(a={"compare": ["experts/sft", "experts/rl"], "expect": "above"})["a"].verdict == "contradicted"
    assert found(a={"compare": ["experts/sft", "experts/rl"], "expect": "below"})["a"].verdict == "shown"


def test_a_drop_is_measured_from_the_start_on_domains_without_expert():
    results = run(a={"compare": ["student", "experts/sft"], "measure": "drop", "expect": "below", "domains": ["old"]})
    (one,) = findings(results, results.hypotheses)
    assert one.values == {"student": pytest.approx(0.02), "experts/sft": pytest.approx(0.6)}
    assert one.interval.mean == pytest.approx(-0.58)
    assert (one.verdict, one.start) == ("shown", pytest.approx(0.9))


def test_without_domains_a_drop_is_of_those_no_expert_trains():
    results = run(a={"compare": ["student", "experts/sft"], "measure": "drop", "expect": "below"})
    (one,) = findings(dataclasses.replace(results, experts={"experts/rl": Expert("new", "rl")}), results.hypotheses)
    assert one.values == {"student": pytest.approx(0.02), "experts/sft": pytest.approx(0.6)}
    assert one.start == pytest.approx(0.9)


def test_sampled_scores_are_compared_where_both_were_sampled():
    results = run(a={"compare": ["experts/rl", "student"], "measure": "sampled", "expect": "above", "domains": ["new"]})
    assert findings(results, results.hypotheses)[0].verdict == "not measured"

    def drawn(share: float) -> Scores:
        rows = [row(i, 0.0, (float(i < 100 * share), 1.0)) for i in range(100)]
        return Scores("new", "held_out", rows)

    names = {"experts/rl": 0.6, "student": 0.2}
    cells = {(name, "new", "held_out"): dict.fromkeys(SEEDS, drawn(share)) for name, share in names.items()}
    (one,) = findings(dataclasses.replace(results, cells={**results.cells, **cells}), results.hypotheses)
    assert one.values == {"experts/rl": pytest.approx(0.8), "student": pytest.approx(0.6)}
    assert (one.interval.mean, one.verdict) == (pytest.approx(0.2), "shown")


def test_equivalence_and_non_inferiority_need_their_margin():
    tests = {
        "wide": {"compare": ["student", "experts/rl"], "expect": "within", "margin": 0.1},
        "narrow": {"compare": ["student", "experts/rl"], "expect": "within", "margin": 0.005},
        "apart": {"compare": ["student", "experts/sft"], "expect": "within", "margin": 0.05},
        "not_worse": {"compare": ["student", "experts/rl"], "expect": "not_below", "margin": 0.1},
        "much_worse": {"compare": ["experts/sft", "experts/rl"], "expect": "not_below", "margin": 0.05},
        "not_more": {"compare": ["student", "experts/rl"], "expect": "not_above", "margin": 0.1},
    }
    verdicts = {name: one.verdict for name, one in found(**tests).items()}
    assert verdicts == {
        "wide": "shown",
        "narrow": "not shown",
        "apart": "contradicted",
        "not_worse": "shown",
        "much_worse": "contradicted",
        "not_more": "shown",
    }


def test_a_slope_is_numpys_least_squares_and_a_contrast_the_weighted_sum():
    settings = {"cold_start": 0.0, "experts/sft": 1.0, "experts/rl": 3.0}
    one = found(a={"slope": settings, "expect": "above"})["a"]
    expected = np.polyfit(list(settings.values()), [GREEDY[name] for name in settings], 1)[0]
    assert one.interval.mean == pytest.approx(expected)
    weights = {"experts/rl": 1, "experts/sft": -1, "student": -1, "variants/half": 1}
    contrast = found(a={"contrast": weights, "expect": "above"})["a"]
    assert contrast.interval.mean == pytest.approx(0.8 - 0.6 - 0.79 + 0.7)
    # Made-up examples are as large as an example that decides: 2 of a contrast of two pairs.
    assert contrast.estimate.variance >= 4 * 4 / 100**2


def test_costs_have_scipys_t_interval_over_seeds():
    one = found(a={"compare": ["student", "experts/rl"], "measure": "seconds", "expect": "below"})["a"]
    difference = [(20 + 2 * seed) - (60 + seed) for seed in SEEDS]
    expected = stats.t.interval(0.95, 3, np.mean(difference), stats.sem(difference))
    assert (one.interval.low, one.interval.high) == pytest.approx(expected)
    assert one.p == pytest.approx(stats.ttest_1samp(difference, 0).pvalue)
    assert (one.verdict, one.examples) == ("shown", 0)
    missing = found(a={"compare": ["variants/half", "experts/rl"], "measure": "seconds", "expect": "below"})["a"]
    assert (missing.verdict, missing.interval) == ("not measured", None)


def test_what_is_rounded_away_at_bfloat16_is_compared_by_seed():
    one = found(a={"compare": ["experts/rl", "experts/sft"], "measure": "rounded_away", "expect": "above"})["a"]
    assert (one.interval.mean, one.verdict) == (pytest.approx(0.415), "shown")
    assert one.by_seed["experts/rl"] == pytest.approx({0: 0.5, 1: 0.51, 2: 0.52, 3: 0.53})
    assert one.contrast == pytest.approx({0: 0.4, 1: 0.41, 2: 0.42, 3: 0.43}) and one.start is None


def scattered(*shares: float) -> Results:
    """The usual run where the student's share on the new domain is another in each seed."""
    results = run(a={"compare": ["student", "cold_start"], "domains": ["new"], "expect": "above"})
    cell = {seed: sheet("new", share) for seed, share in enumerate(shares)}
    return dataclasses.replace(
        results, seeds=tuple(cell), cells={**results.cells, ("student", "new", "held_out"): cell}
    )


def test_seeds_that_scatter_widen_the_interval_and_stand_in_the_finding():
    results = scattered(0.9, 0.45, 0.85, 0.6)
    (one,) = findings(results, results.hypotheses)
    student_SN, start_SN = results.aligned(["student", "cold_start"], "new")
    expected = over_both({"new": student_SN - start_SN}, 1.0)
    assert one.interval == expected.interval(0.95) and one.estimate == expected and expected.seeds.freedom == 3
    assert (one.raw_p, one.p, one.verdict) == (pytest.approx(expected.p), one.raw_p, "not shown")
    assert one.contrast == pytest.approx({0: 0.4, 1: -0.05, 2: 0.35, 3: 0.1})
    assert one.by_seed["student"] == pytest.approx({0: 0.9, 1: 0.45, 2: 0.85, 3: 0.6})
    assert one.start == pytest.approx(0.5)


def test_with_two_seeds_the_interval_is_of_new_examples_alone():
    results = scattered(0.9, 0.6)
    (one,) = findings(results, results.hypotheses)
    student_SN, start_SN = results.aligned(["student", "cold_start"], "new")
    expected = over_examples({"new": student_SN - start_SN})
    assert one.interval == expected.interval(0.95)
    assert (one.raw_p, one.seeds, one.estimate) == (pytest.approx(expected.p), 2, expected)
    assert (one.verdict, one.label) == ("shown", "shown of these seeds")
    three = scattered(0.9, 0.89, 0.91)
    assert findings(three, three.hypotheses)[0].label == "shown"


def test_only_seeds_that_all_domains_have_count():
    results = scattered(0.9, 0.45, 0.85, 0.6)
    cells = {
        key: {seed: one for seed, one in cell.items() if (key[1], seed) != ("old", 3)}
        for key, cell in results.cells.items()
    }
    both = {
        "claim": "x",
        "tests": {"a": {"compare": ["student", "cold_start"], "expect": "above", "domains": ["new", "old"]}},
    }
    partial = dataclasses.replace(results, cells=cells)
    (one,) = findings(partial, {"C1": HypothesisConfig.model_validate(both)})
    assert one.seeds == 3 and list(one.contrast) == [0, 1, 2]
    assert one.contrast[0] == pytest.approx((0.4 - 0.02) / 2)


def test_a_fit_tells_its_points_and_its_curve():
    names = ["cold_start", "experts/rl", "experts/sft", "student", "variants/half"]
    fit = {"x": "kl_start", "x_domains": ["new"], "checkpoints": names}
    test = {"fit": fit, "measure": "drop", "domains": ["old"], "expect": "above", "margin": 0.5}
    results = run(a=test)
    shifted = {("student", "kl_start", "new"): dict.fromkeys(SEEDS, 0.15)}
    (one,) = findings(dataclasses.replace(results, shift={**results.shift, **shifted}), results.hypotheses)
    # The drop is KL less the start's 0.1, but for the student.
    x, y = [0.1, 0.12, 0.7, 0.15, 0.4], [0.0, 0.02, 0.6, 0.02, 0.3]
    assert list(one.points) == names
    assert list(one.points.values()) == [pytest.approx(point) for point in zip(x, y, strict=True)]
    assert one.coefficients == pytest.approx(tuple(np.polyfit(x, y, 2)))
    assert (one.start, one.seeds) == (pytest.approx(0.9), 4)
    # R² is near 1, and five points show nothing.
    assert one.interval.mean > 0.99 and (one.interval.low, one.interval.high) == (0, 1)
    assert (one.verdict, one.p) == ("cannot be judged", None)
    figure = fits_figure({"C4": [one, dataclasses.replace(one, test="again")]})
    assert intervals_figure({"C4": [one]}) is None
    assert "a: R² " in figure and "again: R² " in figure and "half" in figure


def test_holm_counts_every_test():
    sure = {"compare": ["experts/rl", "experts/sft"], "expect": "above"}
    alone = found(a=sure)["a"].p
    together = found(a=sure, b=sure, c={**sure, "expect": "not_below", "margin": 0.01})
    assert together["c"].raw_p < alone
    assert together["a"].p == pytest.approx(2 * alone) and together["a"].raw_p == alone
    assert together["c"].p == pytest.approx(3 * together["c"].raw_p)


def test_a_contradiction_needs_holms_correction_too():
    """A variant 9 points below the student is shown to be so alone, and not among sixty tests."""
    test = {"compare": ["variants/half", "student"], "expect": "above"}
    alone = found(a=test)["a"]
    assert (alone.verdict, alone.p) == ("contradicted", 1) and alone.opposite_p < 0.025
    others = {f"t{number}": {"compare": ["student", "cold_start"], "expect": "above"} for number in range(60)}
    crowd = found(a=test, **others)["a"]
    assert crowd.verdict == "not shown" and crowd.interval.high < 0
    assert crowd.opposite_p == pytest.approx(61 * alone.opposite_p)


def test_a_margin_the_start_keeps_is_not_informative():
    """The start scores 50 % on the new domain and 90 on the old; the student 79 and 88, the expert 80 and 88."""
    level = {"compare": ["student", "experts/rl"], "expect": "not_below"}
    kept = {"compare": ["student", "experts/rl"], "expect": "within", "measure": "drop", "domains": ["old"]}
    verdicts = found(
        gained=level | {"margin": 0.1},
        wide=level | {"margin": 0.4},
        same=kept | {"margin": 0.05},
        forgot=kept | {"compare": ["variants/half", "experts/sft"], "margin": 0.5},
    )
    assert [one.verdict for one in verdicts.values()] == ["shown", "not informative", "not informative", "shown"]
    assert all(one.p < 0.05 for one in verdicts.values())


def test_what_has_one_value_in_one_seed_cannot_be_judged():
    results = run(a={"compare": ["student", "experts/rl"], "measure": "seconds", "expect": "below"})
    (one,) = findings(dataclasses.replace(results, seeds=(0,)), results.hypotheses)
    assert (one.verdict, one.interval, one.values["student"]) == ("cannot be judged", None, 20)


def test_measurements_are_judged_again_from_their_data():
    """Verdicts, intervals and corrections are the same; a test that compares something else is refused."""
    names = ["cold_start", "experts/rl", "experts/sft", "student", "variants/half"]
    results = run(
        a={"compare": ["student", "experts/sft"], "expect": "above", "domains": ["new"]},
        b={"compare": ["student", "experts/rl"], "measure": "seconds", "expect": "below"},
        c={
            "fit": {"x_domains": ["new"], "checkpoints": names},
            "measure": "drop",
            "domains": ["old"],
            "expect": "above",
        },
    )
    own = findings(results, results.hypotheses)
    rows = json.loads(json.dumps(findings_data(own)))
    assert findings_again(rows, results.hypotheses, 0.95) == own
    other = run(a={"compare": ["student", "experts/rl"], "expect": "above", "domains": ["new"]}).hypotheses
    with pytest.raises(ValueError, match=r"hypotheses\.C1\.tests\.a: compare changed since the measurement"):
        findings_again(rows, other, 0.95)


def test_grid_page_and_figures_tell_the_same():
    results = run(
        plain={"compare": ["experts/rl", "experts/sft"], "expect": "above", "domains": ["new"]},
        lost={"compare": ["cold_start", "base"], "expect": "above", "domains": ["new"]},
        trend={"slope": {"cold_start": 0, "experts/sft": 1, "experts/rl": 2}, "expect": "above", "domains": ["new"]},
    )
    grid = hypotheses_grid(results)
    assert [row[-1] for row in grid.rows] == ["shown", "not measured", "shown"]
    assert grid.rows[0][1] == "expert rl − expert sft: greedy score on new"
    assert grid.rows[0][3].startswith("+20.0 [")
    own = findings(results, results.hypotheses)
    figure = intervals_figure({"C1": own})
    assert figure.count("<svg") == 1 and ">trend<" in figure and ">plain<" in figure and ">lost<" not in figure
    assert intervals_figure({"C1": own[1:2]}) is None and fits_figure({"C1": own}) is None
    page = claims_page([Judged(Path("code.yaml"), results, own)], "Made so.", {"Tests": Path("claims/all.svg")})
    assert "## C1: It holds." in page
    assert "**shown** (code: plain)<br>not measured (code: lost)" in page
    assert "![Tests](claims/all.svg)" in page
    assert "- plain: expert rl 80.0, expert sft 60.0 (%; greedy score); the start scores 50.0 %" in page
    assert hypotheses_grid(dataclasses.replace(results, hypotheses={})) is None


def test_each_unit_has_a_panel_with_its_own_axis():
    asked = {"compare": ["experts/rl", "experts/sft"], "measure": "rounded_away", "expect": "above"}
    costs = {"compare": ["student", "experts/rl"], "measure": "seconds", "expect": "below"}
    results = run(away=asked, cost=costs, score={**asked, "measure": "score", "domains": ["new"]})
    figure = intervals_figure({"C1": findings(results, results.hypotheses)})
    assert figure.count(">C1<") == 3 and all(f">{unit}<" in figure for unit in ("%", "s", "points"))


@pytest.mark.parametrize(
    ("test", "said"),
    [
        ({"expect": "above"}, "exactly one of"),
        ({"compare": ["a", "a"], "expect": "above"}, "two different"),
        ({"compare": ["a", "b"], "expect": "within"}, "needs a margin"),
        ({"compare": ["a", "b"], "expect": "above", "margin": 0.1}, "against 0"),
        ({"slope": {"a": 0, "b": 1}, "expect": "above"}, "at least three"),
        ({"contrast": {"a": 1, "b": 1}, "expect": "above"}, "sum 0"),
        ({"fit": {"x_domains": ["d"], "checkpoints": list("abcde")}, "expect": "below"}, "only be expected above"),
        ({"fit": {"x_domains": ["d"], "checkpoints": list("abcde")}, "expect": "above", "margin": 1}, "below 1"),
        ({"fit": {"x_domains": ["d"], "checkpoints": ["a"] * 5}, "expect": "above"}, "each of them once"),
        (
            {"fit": {"x_domains": ["d"], "checkpoints": ["a", ["b", "c", "b", "d"]]}, "expect": "above"},
            "each of them once",
        ),
    ],
)
def test_a_test_that_says_nothing_is_refused(test, said):
    with pytest.raises(ValidationError, match=said):
        ComparisonConfig.model_validate(test)


def test_names_are_checked_when_the_run_file_is_read(tmp_path):
    test = {"compare": ["experts/sort", "student"], "expect": "above"}
    hypotheses = {"H": {"claim": "Yes.", "tests": {"t": test}}}
    assert load(tmp_path, hypotheses=hypotheses).hypotheses["H"].tests["t"].weights == {
        "experts/sort": 1,
        "student": -1,
    }
    test |= {"compare": ["experts/sorts", "student"], "domains": ["sorted"]}
    said = message(tmp_path, hypotheses=hypotheses)
    assert "hypotheses.H.tests.t: unknown checkpoint 'experts/sorts' — did you mean 'experts/sort'?" in said
    assert "'sorted' is not a scored domain — did you mean 'sort'?" in said
