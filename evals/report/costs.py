"""The costs of a run, stage by stage: seconds, tokens and memory of the checkpoints and of their evaluations."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from evals.comparison.results import BASELINES, STUDENT, VARIANTS, Cost, Results
from evals.report.table import merge_title
from evals.tables.templates import html

GROUPS: Mapping[str, Callable[[str], bool]] = {
    "base and cold start": lambda name: "/" not in name and name not in (STUDENT, "champion"),
    "the champion before": lambda name: name == "champion",
    "experts": lambda name: name.startswith("experts/"),
    "merge: MOPD": lambda name: name == STUDENT,
    "earlier rounds": lambda name: name.startswith("round"),
    "other merges": lambda name: name.startswith((BASELINES, VARIANTS)),
}
EVALUATION, ALL = "evaluation", "all"


@dataclass(frozen=True)
class Spending:
    """The costs of one checkpoint, a mean over seeds.

    Attributes:
        name: The checkpoint's node name.
        made: Cost of its training; tokens are those with a loss. None where it is not in the store.
        scored: Cost of all its evaluations; tokens are those of the completions. None where there are none.
    """

    name: str
    made: Cost | None
    scored: Cost | None


def spendings(results: Results, scoring: Mapping[str, Cost]) -> list[Spending]:
    """The costs of every checkpoint, in the graph's order; checkpoints without recorded costs are left out.

    Args:
        results: The run's scores and the checkpoints' costs.
        scoring: checkpoint -> cost of its evaluations, a mean over seeds.
    """
    found = [Spending(name, results.costs.get(name), scoring.get(name)) for name in results.checkpoints]
    return [one for one in found if one.made or one.scored]


def totals(found: Sequence[Spending]) -> dict[str, Cost]:
    """The costs of groups of stages, of the evaluations and of all: sums of seconds and tokens, maximum of memory."""
    groups = {title: [one.made for one in found if one.made and fits(one.name)] for title, fits in GROUPS.items()}
    groups[EVALUATION] = [one.scored for one in found if one.scored]
    groups[ALL] = [cost for costs in list(groups.values()) for cost in costs]
    return {title: _sum(costs) for title, costs in groups.items() if costs}


def costs_section(results: Results, scoring: Mapping[str, Cost]) -> Markup:
    """The totals and a table of all checkpoints, each with its share of all seconds as a bar; empty without costs."""
    found = spendings(results, scoring)
    if not found:
        return Markup()
    summed = totals(found)
    return html(
        "evals.report",
        "costs.html",
        seeds=len(results.seeds),
        totals=summed,
        whole=summed[ALL].seconds or 1.0,
        spendings=[(checkpoint_title(one.name), one) for one in found],
    )


def checkpoint_title(name: str) -> str:
    """A checkpoint's name in a table: a merge's as in the table of merges, any other's without its folder."""
    if name == STUDENT or name.startswith((BASELINES, VARIANTS)):
        return merge_title(name)
    return name.removeprefix("experts/")


def _sum(costs: Sequence[Cost]) -> Cost:
    tokens, seconds = sum(cost.tokens for cost in costs), sum(cost.seconds for cost in costs)
    return Cost(tokens, seconds, max(cost.memory for cost in costs))
