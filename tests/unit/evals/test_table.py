"""The tables hold the numbers and say what is not shown."""

import dataclasses
import io
from dataclasses import replace

from rich.console import Console

from evals.report.table import fitted, render, render_markdown, roles_grid, seeds_grid, statements
from evals.statistics.crossed_effects import over_both
from evals.tables.grid import Grid
from tests.support.scored import results, sheet


def test_markdown_holds_every_number():
    text = render_markdown(results())
    assert "| domain | base | cold start | teacher | student | recovery |" in text
    row = next(line for line in text.splitlines() if line.startswith("| a |"))
    for number in ("20.0 [", "50.0 [", "90.0 [", "80.0 [", "75.0 ["):
        assert number in row
    assert "g, anchored" in text and "| b |" in text


def test_terminal_table_holds_the_same():
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(render(results()))
    assert "mean of experts' domains" in console.export_text()


def test_an_interval_with_zero_shows_no_difference():
    lines = statements(results({("experts/a", "a"): 0.5}))
    assert any(line.startswith("experts/a (rl)") and "no difference shown" in line for line in lines)
    assert any(line.startswith("experts/b (sft)") and "no difference shown" not in line for line in lines)


def test_a_partial_run_gives_a_partial_table():
    partial = dataclasses.replace(results(), cells={("base", "a", "held_out"): {0: sheet("a", 0.2)}})
    first, second = roles_grid(partial).rows[:2]
    assert first[1].startswith("20.0") and first[2:] == ("–",) * 4
    assert second[1:] == ("–",) * 5
    assert any("not measured" in line for line in statements(partial))


def test_of_several_teachers_the_heaviest_is_named_and_measured():
    shared = dataclasses.replace(results(), teachers={"a": {"experts/b": 0.3, "experts/a": 0.7}})
    row = roles_grid(shared).rows[0]
    assert row[3].startswith("90.0")
    assert "a has 2 teachers (experts/b 0.3, experts/a 0.7); its column 'teacher' is the heaviest, experts/a." in (
        statements(shared)
    )
    assert not any("teachers (" in line for line in statements(results()))


def test_out_of_distribution_and_untouched_rows():
    whole = results()
    cells = dict(whole.cells) | {
        ("student", "a", "out_of_distribution"): {0: sheet("a", 0.3, 100, "out_of_distribution")}
    }
    labels = [r[0] for r in roles_grid(dataclasses.replace(whole, cells=cells, anchored=())).rows]
    assert labels[:2] == ["a", "a, unseen kind"] and "g, untouched" in labels


def test_from_three_seeds_on_both_intervals_are_stated():
    found = [line for line in statements(results(seeds=(0, 1, 2))) if "for new seeds too" in line]
    assert [line.split(",")[0].split(" of")[0].split(" (")[0] for line in found] == [
        "experts/a",
        "experts/b",
        "Student over cold_start",
        "Recovery",
    ]
    grid = seeds_grid(results(seeds=(0, 1, 2)))
    assert [row[0] for row in grid.rows] == ["a", "b", "g, anchored", "mean of experts' domains"]
    assert grid.rows[0][1].startswith("+30.0 [") and grid.rows[0][2].startswith("-10.0 [")
    assert seeds_grid(results()) is None
    assert not any("for new seeds too" in line for line in statements(results()))


def test_what_is_said_for_new_seeds_is_the_t_interval_of_seeds_and_examples():
    whole = results(seeds=(0, 1, 2))
    cells = {key: dict(cell) for key, cell in whole.cells.items()}
    for seed, share in ((0, 0.6), (1, 0.8), (2, 1.0)):
        cells["student", "a", "held_out"][seed] = sheet("a", share)
    moved = dataclasses.replace(whole, cells=cells)
    student_SN, start_SN = moved.aligned(["student", "cold_start"], "a")
    expected = over_both({"a": student_SN - start_SN}, 1.0).interval(0.95)
    assert moved.mean_difference("student", "cold_start", ["a"], new_seeds=True) == expected
    # Seeds at 0.1, 0.3 and 0.5: sure of new examples, not of new seeds.
    assert expected.low < 0 < moved.mean_difference("student", "cold_start", ["a"]).low


def test_an_unfinished_run_does_not_mix_seeds():
    """The student has seed 0 alone, where it scores 80 %; the start is worse in seed 1."""
    whole = results(seeds=(0, 1))
    cells = {key: dict(cell) for key, cell in whole.cells.items()}
    cells["cold_start", "a", "held_out"][1] = sheet("a", 0.0)
    for key in [key for key in cells if key[0] == "student"]:
        del cells[key][1]
    partial = dataclasses.replace(whole, cells=cells)
    shown = partial.of_shared_seeds()
    assert roles_grid(partial).rows[0][2].startswith("25.0 [") and partial.mixes_seeds
    assert roles_grid(shown).rows[0][2].startswith("50.0 [") and not shown.mixes_seeds
    assert statements(shown)[-1] == "Left out of the tables, because some scores are missing: seeds 1."
    del cells["base", "a", "held_out"][0]
    torn = dataclasses.replace(whole, cells=cells)
    assert torn.of_shared_seeds() is torn and "No seed has all scores yet" in statements(torn)[-1]
    assert whole.of_shared_seeds() is whole and "Seeds 0, 1." in statements(whole)[-1]


def test_the_tables_say_whose_intervals_they_have():
    text = render_markdown(results())
    assert "interval over examples, seeds fixed]" in text
    assert "Seeds 0, 1. The intervals of scores and differences keep these seeds fixed" in text


def test_a_table_too_wide_for_the_terminal_stands_in_parts_and_breaks_no_word():
    names = [f"a_domain_of_a_long_name_{number}" for number in range(7)]
    wide = Grid("Every checkpoint", ("checkpoint", *names, "mean"), (("student", *["86.2"] * 8), ("base", *["–"] * 8)))
    parts = fitted(wide, 80)
    assert [part.head[0] for part in parts] == ["checkpoint"] * len(parts) and len(parts) == 4
    assert [name for part in parts for name in part.head[1:]] == [*names, "mean"]
    assert parts[0].title == "Every checkpoint (part 1 of 4)" and parts[-1].rows[0] == ("student", "86.2", "86.2")
    assert fitted(wide, 400) == [wide]
    # A single column that is wider than the terminal stands alone.
    assert [len(part.head) for part in fitted(wide, 20)] == [2] * 8


def test_the_terminals_tables_fit_eighty_columns():
    plain = results()
    long = {d: f"{d}_is_a_domain_with_a_long_name" for d in plain.domains}
    whole = dataclasses.replace(
        plain,
        domains=tuple(long.values()),
        cells={(name, long[d], split): cell for (name, d, split), cell in plain.cells.items()},
        experts={name: dataclasses.replace(one, domain=long[one.domain]) for name, one in plain.experts.items()},
        teachers={long[d]: weights for d, weights in plain.teachers.items()},
        anchored=(long["g"],),
    )
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(render(whole, 80))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80 and all(name in text for name in whole.domains)


def test_contamination_that_is_unknown_is_not_told_as_none():
    whole = results()

    def line(changes):
        cells = {
            key: {seed: replace(one, rows=[{**row, **changes} for row in one.rows]) for seed, one in cell.items()}
            for key, cell in whole.cells.items()
        }
        return next(line for line in statements(replace(whole, cells=cells)) if line.startswith("Contaminated"))

    count = len(whole.cells)
    unknown = f"unknown in {count} of {count} cells, whose training data are not all recorded."
    assert line({"contaminated": None, "copy": ""}).endswith(f": {unknown}")
    assert line({"contaminated": False, "copy": ""}).endswith(": none.")
    found = line({"contaminated": True, "copy": "near"})
    assert f"in {count} of {count} cells, at most 100.0 % (" in found and "near copies at most 100.0 %" in found
