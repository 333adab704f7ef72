"""The costs of a run, stage by stage: seconds, tokens and memory of the checkpoints and of their evaluations."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from evals.comparison.results import BASELINES, STUDENT, VARIANTS, Cost, Results
from evals.report.table import merge_title
from evals.tables.grid import ABSENT

GIB = 2**30
HEAD = ("seconds", "tokens", "peak GiB")
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


def costs_section(results: Results, scoring: Mapping[str, Cost]) -> str:
    """The totals and a table of all checkpoints, each with its share of all seconds as a bar; empty without costs."""
    found = spendings(results, scoring)
    if not found:
        return ""
    summed = totals(found)
    whole = summed[ALL].seconds or 1.0
    many = f"means over {len(results.seeds)} seeds" if len(results.seeds) > 1 else "one seed"
    intro = (
        f'<p class="soft">One seed\'s run ({many}), whether or not a stage was cached this time. Seconds are the time '
        "of the machine that ran it. Tokens: of training those with a loss, of an evaluation those of its completions. "
        f"Memory is the most held at one time by one process; {ABSENT} where it was not recorded.</p>"
    )
    heads = "".join(f"<th>{head}</th>" for head in HEAD)
    groups = "".join(
        f'<tr{" class=sum" if title == ALL else ""}><th scope="row">{title}</th>'
        f"{_cells(cost)}{_share(whole, cost)}</tr>"
        for title, cost in summed.items()
    )
    rows = "".join(
        f'<tr><th scope="row">{escape(checkpoint_title(one.name))}</th>{_cells(one.made)}{_cells(one.scored)}'
        f"{_share(whole, one.made, one.scored)}</tr>"
        for one in found
    )
    return (
        f'{intro}<div class="scroll"><table class="costs"><thead><tr><th>stages</th>{heads}'
        f'<th class="share">share of all seconds</th></tr></thead><tbody>{groups}</tbody></table></div>'
        '<h3>Every checkpoint <small><span class="key"><i class="made"></i>training</span>'
        '<span class="key"><i class="scored"></i>evaluations</span></small></h3>'
        '<div class="scroll"><table class="costs"><thead><tr><th rowspan="2">checkpoint</th>'
        f'<th colspan="{len(HEAD)}">training</th><th colspan="{len(HEAD)}">its evaluations</th>'
        f'<th class="share" rowspan="2">share of all seconds</th></tr><tr>{heads}{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def checkpoint_title(name: str) -> str:
    """A checkpoint's name in a table: a merge's as in the table of merges, any other's without its folder."""
    if name == STUDENT or name.startswith((BASELINES, VARIANTS)):
        return merge_title(name)
    return name.removeprefix("experts/")


def _sum(costs: Sequence[Cost]) -> Cost:
    tokens, seconds = sum(cost.tokens for cost in costs), sum(cost.seconds for cost in costs)
    return Cost(tokens, seconds, max(cost.memory for cost in costs))


def _cells(cost: Cost | None) -> str:
    if cost is None:
        return f"<td>{ABSENT}</td>" * len(HEAD)
    tokens = f"{cost.tokens:,.0f}" if cost.tokens else ABSENT
    memory = f"{cost.memory / GIB:.2f}" if cost.memory else ABSENT
    return f"<td>{cost.seconds:,.1f}</td><td>{tokens}</td><td>{memory}</td>"


def _share(whole: float, made: Cost | None, scored: Cost | None = None) -> str:
    shares = [100 * cost.seconds / whole if cost else 0.0 for cost in (made, scored)]
    parts = "".join(
        f'<i class="{kind}" style="width:{share:.1f}%"></i>'
        for kind, share in zip(("made", "scored"), shares, strict=True)
        if share
    )
    return f'<td class="share"><span>{sum(shares):.1f} %</span><span class="bar">{parts}</span></td>'
