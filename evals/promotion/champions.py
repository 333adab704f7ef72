"""Compares a candidate with earlier champions, on the examples that both were scored on."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from evals.comparison.results import Results
from evals.comparison.scores import Scores
from evals.promotion.criterion import Criterion, points
from evals.statistics.interval import Interval
from evals.statistics.intervals import mean_over
from evals.statistics.units import by_unit
from experts.domain import HELD_OUT

PREVIOUS = "not worse than the previous champion"
BEST = "not worse than the best champion before it"


def itself(candidate: str) -> Criterion:
    """The criterion of a candidate that is the champion already."""
    text = f"{candidate} is the champion itself: not compared"
    return Criterion(PREVIOUS, None, text, kind="champion")


def previous(results: Results, candidate: str, champion: Mapping[str, Scores] | None) -> Criterion:
    """The criterion against the present champion, whose held-out sheets are given by domain."""
    if not champion:
        return Criterion(PREVIOUS, None, "no scores of a previous champion: not compared", kind="champion")
    found = _against(results, candidate, champion)
    if found is None:
        text = "the champion was scored on none of these examples: not compared, so a person decides by `mopd promote`"
        return Criterion(PREVIOUS, False, text, kind="missing")
    passed = found.difference.high >= 0
    text = f"difference {points(found.difference)} over {found.where}; fails only if the candidate is shown worse"
    brief = f"{'not ' if passed else ''}shown worse than the champion: {points(found.difference)}"
    return Criterion(PREVIOUS, passed, text, brief, "champion")


def best_of_line(results: Results, candidate: str, former: Mapping[str, Mapping[str, Scores]]) -> list[Criterion]:
    """The criterion against the best former champion: each may be worse than the last by an undetected amount."""
    shared = results.at_share(1 / max(1, len(former)))
    found = {name: _against(shared, candidate, sheets) for name, sheets in former.items()}
    compared = {name: pair for name, pair in found.items() if pair is not None}
    if not compared:
        return []
    best = min(compared, key=lambda name: compared[name].difference.mean)
    difference = compared[best].difference
    passed = difference.high >= 0
    text = (
        f"{best}: difference {points(difference)} over {compared[best].where}, all that the line of champions lost or "
        f"gained since; fails only if the candidate is shown worse"
    )
    brief = f"{'not ' if passed else ''}shown worse than a former champion, {best}: {points(difference)}"
    return [Criterion(BEST, passed, text, brief, "champion")]


@dataclass(frozen=True)
class _Against:
    """A candidate's difference to another checkpoint on the examples of both, a mean over the experts' domains."""

    difference: Interval
    where: str


def _against(results: Results, candidate: str, other: Mapping[str, Scores]) -> _Against | None:
    """The comparison with another run's sheets; None if no domain has two examples in common."""
    strata: dict[str, np.ndarray] = {}
    shared = asked = 0
    for domain in results.expert_domains:
        # Only the first seed's checkpoint can become champion.
        own = results.cells.get((candidate, domain, HELD_OUT), {}).get(results.seeds[0])
        sheet = other.get(domain)
        if own is None or sheet is None:
            continue
        theirs = dict(zip(sheet.ids, sheet.greedy_N, strict=True))
        both = [number for number, each in enumerate(own.ids) if each in theirs]
        shared, asked = shared + len(both), asked + len(own.ids)
        if len(both) > 1:
            scores, ids, units = own.greedy_N, own.ids, own.units
            pairs = np.array([scores[number] - theirs[ids[number]] for number in both])
            strata[domain] = by_unit(pairs, [units[number] for number in both])
    if not strata:
        return None
    part = f" on the {shared} of {asked} examples that both have" if shared < asked else ""
    where = f"{len(strata)} of {len(results.expert_domains)} expert domains{part}"
    return _Against(mean_over(strata, results.confidence), where)
