"""The comparison as tables: a rich rendering for the terminal and Markdown for a page, from the same cells."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from evals.claims.page import hypotheses_grid
from evals.comparison.forgetting import by_method, mean_drop
from evals.comparison.merges import best, lead, merges
from evals.comparison.results import BASELINES, ROLES, STUDENT, VARIANTS, Results
from evals.comparison.shifts import cosines_grid, shift_grid
from evals.statistics.interval import Interval
from evals.tables.grid import ABSENT, Grid
from evals.tables.markdown import plain
from experts.domain import HELD_OUT, OUT_OF_DISTRIBUTION

if TYPE_CHECKING:
    from rich.console import Group

WIDTH = 80
# A cell's padding and rule.
CELL_CHARACTERS = 3
ROLE_TITLES = {"base": "base", "cold_start": "cold start", "teacher": "teacher", "student": "student"}


def roles_grid(results: Results, cell: Callable[[Interval | None], str] | None = None) -> Grid:
    """Base, cold start, teacher and student on every domain and split, with the mean and the recovery.

    Args:
        results: The run's scores.
        cell: Formats an interval; `percent` by default.
    """
    write = cell or percent
    rows = []
    for domain in results.domains:
        for split in (HELD_OUT, OUT_OF_DISTRIBUTION):
            if split == HELD_OUT or any(key[1:] == (domain, split) for key in results.cells):
                cells = [write(results.score(role, domain, split)) for role in ROLES]
                recovered = split == HELD_OUT and domain in results.expert_domains
                last = write(results.recovery([domain])) if recovered else ABSENT
                rows.append((_label(results, domain, split), *cells, last))
    means = [write(results.mean_score(role)) for role in ROLES]
    rows.append(("mean of experts' domains", *means, write(results.recovery())))
    title = f"Greedy score, % [{100 * results.confidence:g}% interval over examples, seeds fixed]"
    return Grid(title, ("domain", *(ROLE_TITLES[role] for role in ROLES), "recovery"), tuple(rows))


def checkpoints_grid(results: Results) -> Grid:
    """Greedy means of every checkpoint, experts included, on every domain."""
    rows = []
    for name in results.checkpoints:
        cells = [_mean(results.score(name, domain)) for domain in results.domains]
        rows.append((name.removeprefix("experts/"), *cells, _mean(results.mean_score(name))))
    title = "Every checkpoint everywhere: greedy score, %, held out (mean: over experts' domains)"
    return Grid(title, ("checkpoint", *results.domains, "mean"), tuple(rows))


def sampled_grid(results: Results, cell: Callable[[Interval | None], str] | None = None) -> Grid | None:
    """Mean score and pass@k of the sampled completions of every role; None where nothing was sampled.

    Args:
        results: The run's scores.
        cell: Formats an interval; `percent` by default.
    """
    write = cell or percent
    rows: list[tuple[str, ...]] = []
    for domain in results.domains:
        drawn = [results.sampled(role, domain) for role in ROLES]
        tries = max((found[2] for found in drawn if found), default=0)
        if tries:
            rows.append((domain, "mean score", *(write(found[0] if found else None) for found in drawn)))
        # With one sample per example pass@k equals the mean score.
        if tries > 1:
            rows.append((domain, f"pass@{tries}", *(write(found[1] if found else None) for found in drawn)))
    head = ("domain", "of samples", *(ROLE_TITLES[role] for role in ROLES))
    title = f"Sampled completions: %, held out [{100 * results.confidence:g}% interval over examples, seeds fixed]"
    return Grid(title, head, tuple(rows)) if rows else None


def merges_grid(results: Results, cell: Callable[[Interval | None], str] | None = None) -> Grid | None:
    """MOPD beside its baselines: scores, forgetting and cost; None where the run has no baselines.

    Args:
        results: The run's scores.
        cell: Formats an interval; `percent` by default.
    """
    found = merges(results)
    if not found:
        return None
    write = cell or percent
    rows = []
    for merge in found:
        domains = [_mean(results.score(merge.name, domain)) for domain in results.expert_domains]
        cost = merge.cost
        cells = [write(merge.score), write(merge.over_student), write(merge.drop)]
        cells += [f"{cost.tokens / 1e6:.2f}", f"{cost.seconds:.0f}"] if cost else [ABSENT, ABSENT]
        cells.append(f"{cost.memory / 2**30:.1f}" if cost and cost.memory else ABSENT)
        rows.append((merge_title(merge.name), *domains, *cells))
    head = ("merge", *results.expert_domains, "mean", "over MOPD", "forgotten", "Mtokens", "seconds", "GiB")
    title = (
        "Merges of the same experts: greedy score, %, held out [intervals over examples, seeds fixed]; "
        "cost of the merge alone"
    )
    return Grid(title, head, tuple(rows))


def seeds_grid(results: Results) -> Grid | None:
    """The student's differences to start and teacher for new seeds as well; None with too few seeds."""
    spans = {_label(results, domain, HELD_OUT): [domain] for domain in results.domains}
    spans["mean of experts' domains"] = list(results.expert_domains)
    rows = []
    for name, domains in spans.items():
        gain = results.mean_difference("student", results.start, domains, new_seeds=True)
        taught = all(domain in results.teachers for domain in domains)
        gap = results.mean_difference("student", "teacher", domains, new_seeds=True) if taught else None
        if gain is not None:
            rows.append((name, points(gain), points(gap)))
    head = ("domain", f"student less {results.start}", "student less teacher")
    title = "Student's differences: points, held out [for new examples and new seeds]"
    return Grid(title, head, tuple(rows)) if rows else None


def merge_title(name: str) -> str:
    """A merge's name in a table: MOPD, MOPD with a variant's name, or the baseline's name."""
    if name == STUDENT or name.startswith(VARIANTS):
        return " ".join(["MOPD", *name.split("/")[1:]])
    return name.removeprefix(BASELINES)


def grids(results: Results, cell: Callable[[Interval | None], str] | None = None) -> list[Grid]:
    """All tables of a run; `cell` as for `roles_grid`."""
    between = [
        g
        for g in (
            seeds_grid(results),
            merges_grid(results, cell),
            hypotheses_grid(results),
            sampled_grid(results, cell),
        )
        if g
    ]
    after = [grid for grid in (shift_grid(results, narrow=cell is compact), cosines_grid(results)) if grid]
    return [roles_grid(results, cell), *between, checkpoints_grid(results), *after]


def statements(results: Results) -> list[str]:
    """The results in the tables as sentences, which also state that a difference is not shown."""
    lines = []
    for name, expert in results.experts.items():
        gain = results.expert_gain(name)
        over_seeds = results.mean_difference(name, results.start, [expert.domain], new_seeds=True)
        also = f"; for new seeds too: {difference(over_seeds)}" if over_seeds else ""
        lines.append(f"{name} ({expert.method}) over {results.start} on {expert.domain}: {difference(gain)}{also}.")
    over = results.mean_difference("student", results.start, results.expert_domains)
    over_seeds = results.mean_difference("student", results.start, results.expert_domains, new_seeds=True)
    also = f"; for new seeds too: {difference(over_seeds)}" if over_seeds else ""
    lines.append(f"Student over {results.start}, mean of expert domains: {difference(over)}{also}.")
    recovered = results.recovery()
    unsure = "not measured, or the teachers' mean gain is not shown to be above 0"
    recovered_seeds = results.recovery(new_seeds=True)
    also = f"; for new seeds too: {percent(recovered_seeds)} %" if recovered_seeds else ""
    lines.append(f"Recovery of the teachers' gain: {percent(recovered) + ' %' if recovered else unsure}{also}.")
    lines.append(
        f"Student's forgetting on domains no expert trains (mean drop): {difference(mean_drop(results, 'student'))}."
    )
    found = merges(results)
    if (first := best(found)) is not None:
        together = f" (interval for {len(found) - 1} comparisons at once)" if len(found) > 2 else ""
        ahead = "" if first.name == STUDENT else f", {difference(lead(results, found, first))} over MOPD{together}"
        name = merge_title(first.name)
        lines.append(f"Best of {len(found)} merges of these experts by mean score: {name}{ahead}.")
    for method in by_method(results):
        if method.drop is not None:
            lines.append(
                f"{method.method.upper()} experts ({method.experts}), mean drop outside their own domain: "
                f"{difference(method.drop)}."
            )
    lines += [
        f"{domain} has {len(weights)} teachers ({', '.join(f'{name} {w:.2g}' for name, w in weights.items())}); "
        f"its column 'teacher' is the heaviest, {results.teacher(domain)}."
        for domain, weights in results.teachers.items()
        if len(weights) > 1
    ]
    lines.append(_contamination(results))
    lines.append(
        f"Seeds {', '.join(map(str, results.seeds))}. The intervals of scores and differences keep these "
        "seeds fixed: they hold for new examples, not for new training runs. Intervals for new seeds, and "
        "those of KL, treat seeds and examples as crossed random effects."
    )
    if results.left_out:
        seeds = ", ".join(map(str, sorted(results.left_out)))
        lines.append(f"Left out of the tables, because some scores are missing: seeds {seeds}.")
    if results.mixes_seeds:
        lines.append("No seed has all scores yet: columns of a table may be of different seeds and cannot be compared.")
    return lines


def _contamination(results: Results) -> str:
    """A sentence with the number of cells with copies of training data, and of cells where this is unknown."""
    cells = {"/".join(key): list(cell.values()) for key, cell in results.cells.items()}
    flagged = {name: max(sheet.contaminated for sheet in sheets) for name, sheets in cells.items()}
    worst = max(flagged, key=lambda name: flagged[name], default="")
    count = sum(share > 0 for share in flagged.values())
    near = max((sheet.near_copies for sheets in cells.values() for sheet in sheets), default=0.0)
    unknown = sum(any(sheet.unknown for sheet in sheets) for sheets in cells.values())
    found = [
        f"in {count} of {len(cells)} cells, at most {100 * flagged[worst]:.1f} % ({worst})" if count else "",
        f"near copies at most {100 * near:.1f} %" if near else "",
        f"unknown in {unknown} of {len(cells)} cells, whose training data are not all recorded" if unknown else "",
    ]
    counts = "; ".join(part for part in found if part) or "none"
    return f"Contaminated examples (a copy in what the checkpoint or an ancestor was trained on): {counts}."


def render(results: Results, width: int = WIDTH) -> "Group":
    """The tables and statements as a rich renderable; a table too wide for the terminal is split into several parts."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    tables = []
    for grid in (part for whole in grids(results, compact) for part in fitted(whole, width)):
        table = Table(title=grid.title, title_justify="left")
        for index, column in enumerate(grid.head):
            table.add_column(column, justify="right" if index else "left", overflow="fold")
        for row in grid.rows:
            table.add_row(*(Text(cell) for cell in row))
        tables.append(table)
    return Group(*tables, *(Text(line) for line in statements(results)))


def fitted(grid: Grid, width: int) -> list[Grid]:
    """A table, or its parts by columns, narrow enough that no word is broken; each part has the first column."""

    def least(column: int) -> int:
        texts = [grid.head[column], *(row[column] for row in grid.rows)]
        return CELL_CHARACTERS + max((len(word) for text in texts for word in text.split()), default=1)

    parts: list[list[int]] = [[0]]
    for column in range(1, len(grid.head)):
        if len(parts[-1]) > 1 and 1 + sum(map(least, [*parts[-1], column])) > width:
            parts.append([0])
        parts[-1].append(column)
    if len(parts) == 1:
        return [grid]
    return [
        Grid(
            f"{grid.title} (part {number} of {len(parts)})",
            tuple(grid.head[column] for column in part),
            tuple(tuple(row[column] for column in part) for row in grid.rows),
        )
        for number, part in enumerate(parts, start=1)
    ]


def render_markdown(results: Results) -> str:
    """The same tables and statements as Markdown."""
    parts = [_markdown(grid) for grid in grids(results)]
    return "\n\n".join([*parts, "\n".join(f"- {plain(line)}" for line in statements(results))]) + "\n"


def percent(value: Interval | None) -> str:
    """A share as percent with its bounds."""
    return ABSENT if value is None else f"{100 * value.mean:.1f} [{100 * value.low:.1f}, {100 * value.high:.1f}]"


def compact(value: Interval | None) -> str:
    """A share as percent with half the width of its interval, for a terminal's eighty columns."""
    return ABSENT if value is None else f"{100 * value.mean:.1f} ±{50 * (value.high - value.low):.1f}"


def _mean(value: Interval | None) -> str:
    return ABSENT if value is None else f"{100 * value.mean:.1f}"


def difference(value: Interval | None) -> str:
    """A difference in points with its bounds, and whether a difference is shown."""
    if value is None:
        return "not measured"
    text = points(value).replace(" [", " points [")
    return text if value.shows_difference else f"{text}, no difference shown"


def points(value: Interval | None) -> str:
    """A difference in points with its bounds."""
    return f"{100 * value.mean:+.1f} [{100 * value.low:+.1f}, {100 * value.high:+.1f}]" if value else ABSENT


def _label(results: Results, domain: str, split: str) -> str:
    if split == OUT_OF_DISTRIBUTION:
        return f"{domain}, unseen kind"
    if domain in results.anchored:
        return f"{domain}, anchored"
    return domain if domain in results.expert_domains else f"{domain}, untouched"


def _markdown(grid: Grid) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(plain(cell) for cell in cells) + " |"

    rule = line(["---", *["---:"] * (len(grid.head) - 1)])
    return "\n".join([f"**{grid.title}**", "", line(grid.head), rule, *(line(row) for row in grid.rows)])
