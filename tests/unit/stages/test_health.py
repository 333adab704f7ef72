"""Early stop and alarms of an on-policy stage, on series made by hand."""

import json
import math
from typing import Any

import pytest

from stages.config.on_policy import HealthConfig
from stages.on_policy.health import Health, HealthVerdict, Vitals, compression


def vitals(
    signal: dict[str, float] | None = None,
    entropy: dict[str, float] | None = None,
    length: dict[str, float] | None = None,
    compression: dict[str, float] | None = None,
    mismatch: dict[str, float] | None = None,
) -> Vitals:
    return Vitals(signal or {}, entropy or {}, length or {}, compression or {}, mismatch or {})


def watch(health: Health, series: list[Vitals], first: int = 1) -> list[HealthVerdict]:
    return [health.observe(step, measured) for step, measured in enumerate(series, start=first)]


def alarms(config: HealthConfig, name: str, values: list[float]) -> dict[int, str]:
    """Step -> alarm of a series of one quantity of the domain `sort`."""
    series = [vitals(**{name: {"sort": value}}) for value in values]
    verdicts = watch(Health(config, "higher", None), series)
    return {step: "\n".join(verdict.alarms) for step, verdict in enumerate(verdicts, start=1) if verdict.alarms}


def stops_at(config: HealthConfig, better: Any, series: list[dict[str, float]]) -> tuple[int, str] | None:
    health = Health(config, better, None)
    for step, signal in enumerate(series, start=1):
        if stop := health.observe(step, vitals(signal)).stop:
            assert health.stopped
            return step, stop
    assert not health.stopped
    return None


def test_a_plateau_stops_and_names_each_domains_best() -> None:
    series = [{"sort": reward, "edit": 0.5} for reward in (0.1, 0.2, 0.3, 0.4)] + [{"sort": 0.4, "edit": 0.5}] * 10
    stopped = stops_at(HealthConfig(window=1, patience=5), "higher", series)
    assert stopped is not None
    step, text = stopped
    assert step == 9  # The last improvement was in step 4.
    assert "sort 0.4 at step 4" in text
    assert "edit 0.5 at step 1" in text
    assert "for 5 steps" in text


def test_one_domain_that_improves_keeps_the_stage_going() -> None:
    series = [{"sort": 0.5, "edit": 0.01 * step} for step in range(1, 40)]
    assert stops_at(HealthConfig(window=1, patience=3), "higher", series) is None


def test_without_patience_nothing_stops() -> None:
    assert stops_at(HealthConfig(window=1), "higher", [{"sort": 0.5}] * 200) is None


def test_lower_is_better_for_a_divergence() -> None:
    falling = [{"sort": 1.0 * 0.9**step} for step in range(20)]
    config = HealthConfig(window=1, patience=3)
    assert stops_at(config, "lower", falling) is None
    stopped = stops_at(config, "higher", falling)
    assert stopped is not None
    assert stopped[0] == 4


def test_the_signal_is_averaged_over_the_window() -> None:
    """Each peak of a saw is a new best only without the window."""
    saw = [{"sort": 0.5 + (0.02 * step if step % 2 else -0.02 * step)} for step in range(30)]
    assert stops_at(HealthConfig(window=1, patience=4), "higher", saw) is None
    stopped = stops_at(HealthConfig(window=2, patience=4, min_improvement=0.03), "higher", saw)
    assert stopped is not None
    assert stopped[0] == 6  # The first window is full at step 2.


def test_a_full_window_is_awaited_before_the_clock_runs() -> None:
    stopped = stops_at(HealthConfig(window=10, patience=3), "higher", [{"sort": 0.5}] * 30)
    assert stopped is not None
    assert stopped[0] == 13


def test_small_steps_add_up_to_an_improvement() -> None:
    """Each step is below 1 % of the best, but ten of them are not."""
    rising = [{"sort": 0.5 * 1.002**step} for step in range(60)]
    assert stops_at(HealthConfig(window=1, patience=10), "higher", rising) is None
    assert stops_at(HealthConfig(window=1, patience=4), "higher", rising) is not None


@pytest.mark.parametrize(("better", "direction"), [("higher", 1.0), ("lower", -1.0)])
def test_negative_signals_improve_in_their_direction(better: str, direction: float) -> None:
    improving = [{"sort": -1.0 + direction * 0.05 * step} for step in range(30)]
    worsening = [{"sort": -1.0 - direction * 0.05 * step} for step in range(30)]
    config = HealthConfig(window=1, patience=3)
    assert stops_at(config, better, improving) is None
    assert stops_at(config, better, worsening) is not None


def test_noise_around_zero_is_no_improvement() -> None:
    noise = [{"sort": 1e-8 * 0.5**step} for step in range(20)]
    stopped = stops_at(HealthConfig(window=1, patience=3), "lower", noise)
    assert stopped is not None
    assert stopped[0] == 4


def test_a_value_that_is_not_finite_counts_as_not_measured() -> None:
    series = [{"sort": 0.5}, {"sort": math.nan}, {"sort": math.inf}, {"sort": -math.inf}, {"sort": 0.6}]
    health = Health(HealthConfig(window=1, patience=5), "higher", None)
    assert all(verdict == HealthVerdict((), None) for verdict in watch(health, [vitals(signal) for signal in series]))
    assert health.state["best"] == {"sort": [0.6, 5]}
    assert alarms(HealthConfig(window=1), "length", [10.0, math.nan, math.inf]) == {}


def test_only_non_finite_signals_never_stop() -> None:
    assert stops_at(HealthConfig(window=1, patience=2), "higher", [{"sort": math.nan}] * 20) is None


def test_entropy_collapse_is_said_once_and_again_after_it_ended() -> None:
    config = HealthConfig(window=1)
    said = alarms(config, "entropy", [1.0, 0.5, 0.09, 0.05, 0.2, 0.09])
    assert list(said) == [3, 6]
    assert said[3] == "sort: entropy 0.09 nats a token is below 0.1 (0.1 of the first 1)"


@pytest.mark.parametrize(
    ("name", "first", "swings", "clear"),
    [
        ("entropy", [1.0], [0.09, 0.11], 0.13),
        ("length", [10.0], [21.0, 19.0], 15.0),
        ("compression", [1.0], [5.1, 4.9], 3.9),
        ("mismatch", [0.0], [0.11, 0.09], 0.07),
    ],
)
def test_a_value_that_swings_around_its_limit_is_one_alarm(
    name: str, first: list[float], swings: list[float], clear: float
) -> None:
    series = [*first, *(5 * swings), clear, swings[0]]
    assert sorted(alarms(HealthConfig(window=1), name, series)) == [2, len(series)]


def test_the_baseline_is_the_first_window() -> None:
    said = alarms(HealthConfig(window=2), "entropy", [1.0, 3.0, 0.2, 0.2, 0.18])
    assert list(said) == [5]  # The means are 2, 1.6, 0.2 and 0.19; the limit is 0.2.
    assert "0.19" in said[5]


@pytest.mark.parametrize("first", [0.0, 0.005, 0.019])
def test_a_deterministic_domain_has_no_entropy_to_lose(first: float) -> None:
    assert alarms(HealthConfig(window=1), "entropy", [first, 0.0, 0.0]) == {}


def test_length_inflation() -> None:
    said = alarms(HealthConfig(window=1), "length", [10.0, 20.0, 20.5, 30.0])
    assert said == {3: "sort: length 20.5 tokens is above 20 (2 times the first 10)"}


def test_lengths_of_nothing_do_not_alarm_at_the_first_token() -> None:
    assert list(alarms(HealthConfig(window=1), "length", [0.0, 1.0, 2.0, 2.5])) == [4]


def test_repetition() -> None:
    said = alarms(HealthConfig(window=2), "compression", [4.0, 4.0, 5.0, 9.0])
    assert said == {4: "sort: compression 7 is above 5: completions repeat themselves"}


def test_a_sampler_that_leaves_the_trainer_alarms_at_once_whatever_the_window() -> None:
    said = alarms(HealthConfig(window=10, max_mismatch=0.1), "mismatch", [0.1, 5.0, 5.0, 0.01, math.nan])
    assert list(said) == [2, 5]
    assert said[2].startswith("sort: sampler and trainer differ by 5 nats a token, above 0.1")


def test_domains_and_quantities_alarm_apart() -> None:
    health = Health(HealthConfig(window=1), "higher", None)
    first = vitals(entropy={"sort": 1.0, "edit": 1.0}, length={"sort": 5.0})
    second = vitals(entropy={"sort": 0.01, "edit": 0.01}, length={"sort": 50.0})
    assert watch(health, [first, second])[1].alarms == (
        "sort: entropy 0.01 nats a token is below 0.1 (0.1 of the first 1)",
        "edit: entropy 0.01 nats a token is below 0.1 (0.1 of the first 1)",
        "sort: length 50 tokens is above 10 (2 times the first 5)",
    )


def test_an_alarm_ends_the_stage_only_where_asked() -> None:
    series = [vitals(length={"sort": 10.0}), vitals(length={"sort": 30.0})]
    warned = watch(Health(HealthConfig(window=1, on_alarm="warn"), "higher", None), series)
    assert warned[1].alarms
    assert warned[1].stop is None
    ended = watch(Health(HealthConfig(window=1, on_alarm="stop"), "higher", None), series)
    assert ended[0].stop is None
    assert ended[1].stop == ended[1].alarms[0]


def test_a_domain_may_be_missing_from_a_step() -> None:
    series = [vitals({"sort": 0.5}), vitals({"edit": 0.5}), vitals(), vitals({"sort": 0.5, "edit": 0.6})]
    health = Health(HealthConfig(window=2, patience=50), "higher", None)
    watch(health, series)
    assert health.state["best"] == {"sort": [0.5, 4], "edit": [pytest.approx(0.55), 4]}


@pytest.mark.parametrize("cut", range(1, 24))
def test_a_resumed_stage_gives_the_same_verdicts(cut: int) -> None:
    config = HealthConfig(window=3, patience=8)
    series = [
        vitals(
            {"sort": min(0.1 * step, 0.9), "edit": 1 / 3},
            {"sort": 1.0 if step % 9 < 5 else 0.001, "edit": 0.7 / (step + 1)},
            {"sort": 10.0 + (step % 7) ** 2},
            {"edit": 3.0 + step % 5} if step % 2 else {},
        )
        for step in range(24)
    ]
    whole = Health(config, "higher", None)
    expected = watch(whole, series)
    assert any(verdict.alarms for verdict in expected)
    assert any(verdict.stop for verdict in expected)
    before = Health(config, "higher", None)
    watch(before, series[:cut])
    resumed = Health(config, "higher", json.loads(json.dumps(before.state)))
    assert resumed.stopped == before.stopped
    assert watch(resumed, series[cut:], first=cut + 1) == expected[cut:]
    assert resumed.state == whole.state


def test_a_saved_state_does_not_change_with_the_stage() -> None:
    health = Health(HealthConfig(window=2), "higher", None)
    health.observe(1, vitals({"sort": 0.5}, {"sort": 1.0}))
    saved = health.state
    text = json.dumps(saved)
    health.observe(2, vitals({"sort": 0.6}, {"sort": 0.5}))
    assert json.dumps(saved) == text


def test_compression_tells_repetition_from_prose() -> None:
    prose = (
        "The sorting expert was trained by reinforcement on digits of five to eight places, and the editor on small "
        "functions with one wrong operator; their student practises both and keeps the general skill it began with."
    )
    looped = "so the answer is " * 30
    plain, repeated = compression([prose]), compression([looped])
    assert plain is not None
    assert repeated is not None
    assert 1.0 < plain < 3.0
    assert repeated > 10.0
    assert compression([prose, looped]) == pytest.approx((plain + repeated) / 2)


def test_short_completions_have_no_compression() -> None:
    assert compression([]) is None
    assert compression(["a" * 199]) is None
    assert compression(["é" * 100]) is not None  # 200 bytes.
    assert compression(["a" * 199, "ab" * 200]) == compression(["ab" * 200])
