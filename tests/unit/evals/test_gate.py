"""The better merge is judged; each criterion fails alone; what cannot be compared is said."""

import dataclasses
from collections.abc import Mapping

import pytest

from evals.comparison.results import Results
from evals.comparison.scores import Scores
from evals.promotion.candidates import rivals
from evals.promotion.gate import GateVerdict, judge
from evals.statistics.intervals import paired_difference
from evals.statistics.tests_of_scores import mean_superiority, non_inferiority
from tests.support.scored import results, sheet

GOOD = {("student", "a"): 0.9, ("student", "b"): 0.9}


def _failed(scores, **options):
    verdict = judge(results(GOOD | scores), 0.08, 0.05, **options)
    assert verdict.promoted == (not [c for c in verdict.criteria if c.passed is False])
    return [criterion.name for criterion in verdict.criteria if criterion.passed is False]


@pytest.mark.parametrize(
    ("scores", "name"),
    [
        ({("student", "a"): 0.75}, "non-inferior to experts/a on a"),
        ({("student", "b"): 0.75}, "non-inferior to experts/b on b"),
        ({("student", "g"): 0.4}, "forgetting"),
    ],
)
def test_one_criterion_fails_alone(scores, name):
    assert _failed(scores) == [name]


def test_a_student_that_is_not_scored_everywhere_is_shown_nothing():
    assert _failed({("student", "b"): -1}) == ["non-inferior to experts/b on b", "student above cold_start"]


def of_shares(**shares: float) -> Results:
    """Base, start, teachers and student at one score each, everywhere."""
    names = {"base": ["base"], "start": ["cold_start"], "teachers": ["experts/a", "experts/b"], "student": ["student"]}
    return results({(n, d): shares[who] for who, each in names.items() for n in each for d in ("a", "b", "g")})


def test_teachers_and_a_student_that_learnt_nothing_promote_nobody():
    """The student is equal to its teachers, forgets nothing, and scores 0 % everywhere."""
    verdict = judge(of_shares(base=0.0, start=0.0, teachers=0.0, student=0.0), 0.08, 0.05)
    assert verdict.failed == ["teachers above cold_start", "student above cold_start"] and not verdict.promoted
    assert verdict.conclusion == "student: not promoted, nothing was learnt, 2 of 6 criteria failed"
    assert verdict.criteria[3].brief == (
        "the teachers at 0.0 %, cold_start at 0.0 %: +0.0 [-2.0, +2.0] points, not shown above cold_start: nothing was "
        "learnt"
    )


def test_a_gain_within_chance_is_no_gain():
    # Four more of a hundred in each domain: p < 0.025 one-sided of 200; one more is not.
    assert judge(of_shares(base=0.5, start=0.5, teachers=0.54, student=0.54), 0.08, 0.05).promoted
    verdict = judge(of_shares(base=0.5, start=0.5, teachers=0.51, student=0.51), 0.08, 0.05)
    assert verdict.failed == ["teachers above cold_start", "student above cold_start"]


def test_teachers_alone_above_the_start_do_not_promote_and_one_skill_at_its_ceiling_does_no_harm():
    lazy = judge(of_shares(base=0.5, start=0.5, teachers=0.55, student=0.5), 0.15, 0.05)
    assert lazy.failed == ["student above cold_start"] and "nothing was learnt" in lazy.conclusion
    ceiling = {(name, "b"): 1.0 for name in ("cold_start", "experts/b", "student")}
    assert judge(results(GOOD | ceiling), 0.08, 0.05).promoted


def test_the_gain_is_welchs_t_over_the_experts_domains_of_the_seed_that_is_promoted():
    whole = results(GOOD)
    line = judge(whole, 0.08, 0.05).criteria[4]
    pairs = {d: (whole.aligned(["student"], d)[0][:1], whole.aligned(["cold_start"], d)[0][:1]) for d in ("a", "b")}
    assert f"p = {mean_superiority(pairs):.2g}, so above cold_start. Over all 2 seeds: +40.0 [" in line.text


def test_without_experts_the_domains_taught_by_another_than_the_start_are_asked():
    taught = dataclasses.replace(results(GOOD), experts={})
    assert judge(taught, 0.08, 0.05).criteria[-2].name == "student above cold_start"
    anchored = dataclasses.replace(taught, teachers={"g": {"cold_start": 1.0}})
    verdict = judge(anchored, 0.08, 0.05)
    assert verdict.failed == ["above cold_start"] and "there is nothing to learn" in verdict.criteria[-2].text


def test_the_champion_is_not_compared_with_itself():
    champion = {domain: sheet(domain, 0.9) for domain in ("a", "b")}
    line = judge(results(GOOD), 0.08, 0.05, champion, "student").criteria[-1]
    assert line.passed is None and line.text == "student is the champion itself: not compared"


def with_rivals(shares: Mapping[str, float], forgotten: tuple[str, ...] = ()) -> Results:
    """MOPD at 0.9, as its teachers, and other merges at theirs on both experts' domains; `g` kept or lost."""
    whole = results(GOOD)
    cells = dict(whole.cells)
    for name, share in shares.items():
        for domain in ("a", "b"):
            cells[name, domain, "held_out"] = {seed: sheet(domain, share) for seed in whole.seeds}
        cells[name, "g", "held_out"] = {seed: sheet("g", 0.3 if name in forgotten else 0.5) for seed in whole.seeds}
    return dataclasses.replace(whole, checkpoints=(*whole.checkpoints, *shares), cells=cells)


def verdict_of(shares: Mapping[str, float], **options) -> GateVerdict:
    return judge(with_rivals(shares, **options), 0.08, 0.05)


def test_another_merge_is_the_candidate_where_it_is_shown_better():
    verdict = verdict_of({"baselines/ties": 0.98, "baselines/seqkd": 0.5})
    assert (verdict.candidate, verdict.promoted) == ("baselines/ties", True)
    assert verdict.why.startswith(
        "1 of 2 other merges shown better than student on the mean of the experts' domains: baselines/ties +8.0 points"
    )
    assert verdict.criteria[0].text.startswith(
        "a: 98.0 % against its teacher's 90.0 % (seed 0, the one to be promoted): difference +8.0 ["
    )
    assert verdict.conclusion == "baselines/ties: promoted to champion"


def test_of_several_shown_better_the_highest_mean_is_the_candidate():
    assert verdict_of({"baselines/ties": 0.96, "variants/sharp": 0.99}).candidate == "variants/sharp"


def test_mopd_stays_where_none_is_shown_better():
    verdict = verdict_of({"baselines/ties": 0.91, "baselines/seqkd": 0.5})
    assert verdict.candidate == "student"
    assert (
        "of 2 other merges none is shown better" in verdict.why and "nearest baselines/ties +1.0 points" in verdict.why
    )
    assert judge(results(GOOD), 0.08, 0.05).why == "no other merge to compare with"


def test_the_next_best_is_the_candidate_where_a_better_merge_fails_the_gate():
    shares = {"baselines/ties": 0.99, "baselines/mix_sft": 0.97}
    one = verdict_of(shares, forgotten=("baselines/ties",))
    assert one.candidate == "baselines/mix_sft" and one.promoted
    assert one.why.count("fails the gate (forgetting)") == 1
    assert "baselines/ties +9.0 points (p = " in one.why and one.why.index("fails") < one.why.index("baselines/mix_sft")
    both = verdict_of(shares, forgotten=tuple(shares))
    assert both.candidate == "student" and both.promoted and both.why.count("fails the gate (forgetting)") == 2


def test_where_none_passes_the_best_is_the_candidate_and_not_promoted():
    whole = with_rivals({"baselines/ties": 0.99}, forgotten=("baselines/ties",))
    cells = dict(whole.cells) | {("student", "g", "held_out"): {seed: sheet("g", 0.2) for seed in whole.seeds}}
    verdict = judge(dataclasses.replace(whole, cells=cells), 0.08, 0.05)
    assert (verdict.candidate, verdict.promoted, verdict.failed) == ("baselines/ties", False, ["forgetting"])
    assert verdict.conclusion == "baselines/ties: not promoted, 1 of 6 criteria failed"


def test_holm_asks_more_of_one_among_many():
    # 4 of 100 examples better on each of two domains: p = 0.010, below 0.025 alone and above it times 5.
    (alone,) = rivals(with_rivals({"baselines/ties": 0.94}))
    assert alone.shown and alone.p_value == pytest.approx(0.0101, abs=5e-4)
    among = rivals(with_rivals({"baselines/ties": 0.94} | {f"variants/{i}": 0.5 for i in range(4)}))
    assert among[0].name == "baselines/ties" and among[0].p_value == pytest.approx(5 * alone.p_value)
    assert not any(rival.shown for rival in among)


def test_a_merge_that_was_not_scored_everywhere_is_no_rival():
    whole = with_rivals({"baselines/ties": 0.99})
    cells = {key: cell for key, cell in whole.cells.items() if key[:2] != ("baselines/ties", "b")}
    partial = dataclasses.replace(whole, cells=cells)
    assert rivals(partial) == [] and judge(partial, 0.08, 0.05).candidate == "student"


def test_a_sentence_a_domain_says_why():
    fine, bad = (judge(results(GOOD | {("student", "a"): share}), 0.08, 0.05).criteria[0].text for share in (0.9, 0.8))
    assert fine.startswith(
        "a: 90.0 % against its teacher's 90.0 % (seed 0, the one to be promoted): difference +0.0 [-4.0, +4.0] points, "
        "p = 6.1e-05, the interval lies above -8.0: non-inferior"
    )
    assert bad.startswith(
        "a: 80.0 % against its teacher's 90.0 % (seed 0, the one to be promoted): difference -10.0 [-17.1, "
    )
    assert "the interval does not lie above -8.0: not shown non-inferior" in bad


def test_the_decision_is_the_interval_and_its_p_stands_beside_it():
    whole = dataclasses.replace(results(GOOD | {("student", "a"): 0.89}), seeds=(0,))
    pair = [whole.aligned([name], "a")[0] for name in ("student", "experts/a")]
    expected, found = non_inferiority(*pair, 0.08), paired_difference(*pair)
    first, other = judge(whole, 0.08, 0.05).criteria[:2]
    assert first.passed and expected < 0.025 and found.low > -0.08
    bounds = f"[{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
    assert f"difference -1.0 {bounds} points, p = {expected:.2g}, the interval lies above -8.0" in first.text
    # Of all teachers together the largest p, on every line.
    assert f"largest p = {expected:.2g})" in other.text and "p = 6.1e-05, the interval lies" in other.text
    assert found.low < -0.05 and not judge(whole, 0.05, 0.05).criteria[0].passed


def of_seeds(shares: Mapping[tuple[str, str], tuple[float, float]]) -> Results:
    """MOPD as good as its teachers, with other shares in some cells, one a seed."""
    whole = results(GOOD)
    cells = {key: dict(cell) for key, cell in whole.cells.items()}
    for (name, domain), each in shares.items():
        cells[name, domain, "held_out"] = {seed: sheet(domain, share) for seed, share in enumerate(each)}
    return dataclasses.replace(whole, cells=cells)


def test_the_checkpoint_that_is_promoted_is_judged_and_not_the_mean_over_seeds():
    """A mean of 90 % over seeds, as its teacher has, hides a first seed at 80 %, and the other way round."""
    bad = judge(of_seeds({("student", "a"): (0.8, 1.0)}), 0.08, 0.05)
    assert bad.failed == ["non-inferior to experts/a on a"]
    assert " Over all 2 seeds: +0.0 [-5." in bad.criteria[0].text
    assert judge(of_seeds({("student", "a"): (0.9, 0.5)}), 0.08, 0.05).promoted
    # Its own seed's teacher: the other seed's is worse and says nothing of it.
    assert not judge(of_seeds({("student", "a"): (0.8, 0.8), ("experts/a", "a"): (1.0, 0.6)}), 0.08, 0.05).promoted


def test_forgetting_of_the_checkpoint_that_is_promoted_decides():
    assert judge(of_seeds({("student", "g"): (0.4, 0.6)}), 0.08, 0.05).failed == ["forgetting"]
    fine = judge(of_seeds({("student", "g"): (0.5, 0.1)}), 0.08, 0.05)
    assert fine.promoted and "Over all 2 seeds: +20.0 [" in fine.criteria[2].text


def test_the_estimate_of_forgetting_decides_and_its_interval_is_told():
    lines = {
        share: judge(of_seeds({("student", "g"): (share, share)}), 0.08, 0.05).criteria[2] for share in (0.5, 0.46)
    }
    assert lines[0.46].passed and "at most 5.0, beyond which the interval extends." in lines[0.46].text
    assert lines[0.5].passed and "reaches" not in lines[0.5].text


def test_a_first_seed_that_was_not_scored_and_a_single_example_show_nothing():
    whole = results(GOOD)
    cells = {key: dict(cell) for key, cell in whole.cells.items()}
    del cells["student", "a", "held_out"][0]
    line = judge(dataclasses.replace(whole, cells=cells), 0.08, 0.05).criteria[0]
    assert not line.passed and line.text == "a: not scored, so not shown non-inferior."
    few = {key: {seed: sheet(key[1], 1.0, 1) for seed in cell} for key, cell in whole.cells.items()}
    line = judge(dataclasses.replace(whole, cells=few), 0.08, 0.05).criteria[0]
    assert not line.passed and line.text == "a: a single example, so not shown non-inferior."


def test_a_better_champion_stays():
    champion = {"a": sheet("a", 1.0), "b": sheet("b", 1.0)}
    assert _failed({}, champion=champion) == ["not worse than the previous champion"]


def test_the_champion_is_compared_with_the_first_seeds_student():
    whole = results(GOOD)
    cells = {key: dict(cell) for key, cell in whole.cells.items()}
    for domain in ("a", "b"):
        cells["student", domain, "held_out"][1] = sheet(domain, 0.5)
    champion = {domain: cells["student", domain, "held_out"][0] for domain in ("a", "b")}
    line = judge(dataclasses.replace(whole, cells=cells), 0.5, 0.05, champion).criteria[-1]
    assert line.passed
    assert "difference +0.0 [-2.0, +2.0]" in line.text


def test_all_met_promotes_and_a_missing_champion_is_said():
    verdict = judge(results(GOOD), 0.08, 0.05)
    assert verdict.promoted
    assert verdict.criteria[-1].passed is None and "no scores of a previous champion" in verdict.criteria[-1].text
    assert "+0.0" in verdict.criteria[0].text


def test_a_champion_is_compared_on_the_examples_both_have():
    # The champion has 30 of the 100 and is right on all; of the other 70 nothing is known of it.
    line = judge(results(GOOD | {("student", "a"): 0.0}), 0.99, 0.05, {"a": sheet("a", 1.0, 30)}).criteria[-1]
    assert line.passed is False and "over 1 of 2 expert domains on the 30 of 100 examples that both have" in line.text


def test_a_champion_on_none_of_the_examples_leaves_it_to_a_person():
    others = dataclasses.replace(
        sheet("a", 1.0), rows=[row | {"id": f"other {row['id']}"} for row in sheet("a", 1.0).rows]
    )
    verdict = judge(results(GOOD), 0.08, 0.05, {"a": others})
    assert not verdict.promoted and verdict.failed == ["not worse than the previous champion"]
    assert (
        "scored on none of these examples: not compared, so a person decides by `mopd promote`"
        in verdict.criteria[-1].text
    )


def champions(*shares: float) -> list[dict[str, Scores]]:
    return [{domain: sheet(domain, share) for domain in ("a", "b")} for share in shares]


def test_a_line_of_champions_that_sinks_point_by_point_is_stopped():
    first, second, last = champions(0.99, 0.95, 0.93)
    former = {"student@0 of Monday": first, "student@0 of Tuesday": second}
    # Three points below the last one are not shown; nine below the first are.
    verdict = judge(results(GOOD), 0.08, 0.05, last, former=former)
    assert verdict.failed == ["not worse than the best champion before it"]
    assert verdict.criteria[-1].text.startswith("student@0 of Monday: difference -9.0 [")
    level = judge(results(GOOD), 0.08, 0.05, last, former={"student@0 of Tuesday": champions(0.92)[0]})
    assert level.promoted and level.criteria[-1].passed


def test_former_champions_that_share_no_examples_are_no_line():
    assert len(judge(results(GOOD), 0.08, 0.05, champions(0.9)[0], former={"x": {}}).criteria) == 6


def test_the_text_says_that_every_teacher_must_pass():
    lines = judge(results(GOOD), 0.08, 0.05).criteria[:2]
    assert all("all teachers must pass, so p is not corrected" in line.text for line in lines)
