"""Progress lines: position, speed and the telling number, read from journal records."""

import io
import time
from typing import Any

import pytest
from rich.console import Console

from flows.plan.nodes import Node
from flows.run.progress import Meter, ProgressDisplay, duration, notes


def node(name: str, stage: str = "rl") -> Node:
    return Node(f"{name}@0", name, stage, 0, {}, {}, {}, {}, name)


def progress(step: int, total: int, when: float) -> dict[str, Any]:
    return {"kind": "progress", "step": step, "total": total, "time": when}


def metrics(step: int, **values: float) -> dict[str, Any]:
    return {
        "kind": "metrics",
        "step": step,
        "time": 0.0,
        "values": {k.replace("__", "/"): v for k, v in values.items()},
    }


def test_a_meter_knows_its_position_and_the_time_left() -> None:
    expert = node("experts/sort")
    meter = Meter("experts/sort@0", [expert], now=100.0)
    assert (meter.position, meter.eta_seconds) == ("starting", None)
    meter.read(expert, [progress(10, 50, 110.0), progress(20, 50, 120.0)])
    assert meter.position == "20/50"
    assert meter.share == pytest.approx(0.4)
    assert meter.eta_seconds == pytest.approx(30.0)


def test_steps_of_an_earlier_attempt_do_not_count_as_speed() -> None:
    expert = node("experts/sort")
    meter = Meter("experts/sort@0", [expert], now=1000.0)
    meter.read(expert, [progress(10, 100, 10.0), progress(40, 100, 20.0)])
    assert meter.eta_seconds is None
    meter.read(expert, [progress(41, 100, 1010.0), progress(42, 100, 1020.0)])
    assert meter.eta_seconds == pytest.approx(58 * 500, rel=0.01)


def test_a_clock_set_back_makes_no_time_left_negative() -> None:
    meter = Meter("student@0", [node("student@0")], now=1000)
    meter.read(node("student@0"), [progress(1, 10, 1100), progress(2, 10, 1105), progress(3, 10, 1050)])
    assert meter.eta_seconds == pytest.approx(7 * 5)
    meter.read(node("student@0"), [progress(4, 10, 1060)])
    assert meter.eta_seconds == pytest.approx(6 * 10)


def test_the_measure_is_the_stages_own_averaged_over_domains() -> None:
    distill = node("student", "distill")
    meter = Meter("student@0", [distill])
    meter.read(distill, [metrics(1, distill__reverse_kl__sort=0.2, distill__reverse_kl__edit=0.4, distill__loss=9.0)])
    assert meter.measure == "reverse kl 0.3"
    meter.read(distill, [metrics(2, distill__reverse_kl=0.25, distill__reverse_kl__sort=0.1)])
    assert meter.measure == "reverse kl 0.25"


def test_evaluations_count_finished_domains() -> None:
    nodes = [node("eval/base/sort/held_out", "evaluate"), node("eval/base/edit/held_out", "evaluate")]
    meter = Meter("eval/base@0", nodes, now=0.0)
    meter.read(nodes[0], [progress(1, 2, 1.0), progress(2, 2, 2.0)])
    meter.read(nodes[1], [progress(1, 2, 3.0)])
    assert meter.position == "1/2 domains"
    assert meter.share == pytest.approx(0.75)
    assert meter.measure == ""


def test_a_stage_that_stops_early_is_done() -> None:
    student = node("student", "distill")
    meter = Meter("student@0", [student], now=0.0)
    meter.read(student, [progress(10, 100, 1.0), progress(40, 100, 2.0)])
    assert meter.stopped_early == ""
    meter.complete()
    assert (meter.share, meter.eta_seconds) == (1.0, 0.0)
    assert meter.line() == "stopped early at step 40 of 100"


def test_a_stage_that_took_all_its_steps_did_not_stop_early() -> None:
    student, base = node("student", "distill"), node("base", "load")
    whole, loaded = Meter("student@0", [student], now=0.0), Meter("base", [base], now=0.0)
    whole.read(student, [progress(100, 100, 2.0)])
    for meter in (whole, loaded):
        meter.complete()
        assert meter.stopped_early == ""
    assert (whole.line(), loaded.line()) == ("100/100", "done")


def test_notes_of_this_attempt_become_lines_with_the_stages_name() -> None:
    student = node("student", "distill")
    records = [
        {"kind": "note", "step": 3, "time": 50.0, "text": "alarm: of an earlier attempt"},
        {"kind": "note", "step": 12, "time": 101.0, "text": "alarm: sort repeats itself"},
        progress(12, 100, 101.0),
    ]
    assert notes(student, records, since=100.0) == ["student@0: step 12: alarm: sort repeats itself"]


def test_plain_lines_come_every_tenth_not_every_step() -> None:
    out = io.StringIO()
    expert = node("experts/sort")
    with ProgressDisplay(Console(file=out, width=200)) as display:
        meter = Meter("experts/sort@0", [expert])
        display.started(meter)
        for step in range(1, 101):
            meter.read(expert, [progress(step, 100, time.time())])
            display.moved(meter)
        display.finished(meter, "done in 5s")
    lines = out.getvalue().splitlines()
    assert lines[0] == "experts/sort@0: started"
    assert lines[-1] == "experts/sort@0: done in 5s"
    assert 10 <= len(lines) <= 13
    assert all("\x1b" not in line for line in lines)


def test_a_terminal_shows_a_line_for_each_running_job() -> None:
    out = io.StringIO()
    console = Console(file=out, width=100, force_terminal=True)
    with ProgressDisplay(console) as display:
        for name in ("experts/sort", "experts/reverse"):
            meter = Meter(name, [node(name)])
            display.started(meter)
            meter.read(node(name.removesuffix("@0")), [progress(3, 12, time.time())])
            display.moved(meter)
    assert "experts/sort" in out.getvalue()
    assert "experts/reverse" in out.getvalue()
    assert "3/12" in out.getvalue()


@pytest.mark.parametrize(("seconds", "text"), [(4.4, "4s"), (65, "1m05s"), (7260, "2h01m")])
def test_durations_are_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text
