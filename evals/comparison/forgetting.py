"""Forgetting: how far a checkpoint falls below the start on domains it was not trained for. Positive = forgot."""

from dataclasses import dataclass

import numpy as np

from evals.comparison.results import Results
from evals.statistics.interval import Interval
from evals.statistics.intervals import mean_over
from experts.domain import HELD_OUT
from stages.config.kinds import EXPERT_METHODS


@dataclass(frozen=True)
class MethodForgetting:
    """Mean drop of all experts of one method over domains other than their own.

    Attributes:
        method: `sft`, `rl` or `rft`.
        experts: How many experts were measured.
        drop: The mean drop; None when none was measured.
    """

    method: str
    experts: int
    drop: Interval | None


def drop(results: Results, checkpoint: str, domain: str) -> Interval | None:
    """Start minus checkpoint on one domain; None where either was not scored."""
    return results.difference(results.start, checkpoint, domain)


def mean_drop(results: Results, checkpoint: str) -> Interval | None:
    """Mean drop over the domains no expert trains; None unless every one was scored."""
    return results.mean_difference(results.start, checkpoint, results.untrained)


def by_method(results: Results) -> list[MethodForgetting]:
    """SFT experts against RL experts: mean drop over domains other than each one's own."""
    found = []
    for method in EXPERT_METHODS:
        drops: dict[str, list[np.ndarray]] = {}
        measured = set()
        for name, expert in results.experts.items():
            for domain in results.domains if expert.method == method else ():
                pair = results.aligned([results.start, name], domain) if domain != expert.domain else None
                if pair:
                    drops.setdefault(f"{domain}/{HELD_OUT}", []).append((pair[0] - pair[1]).mean(axis=0))
                    measured.add(name)
        strata = {domain: np.stack(values) for domain, values in drops.items()}
        value = mean_over(strata, results.confidence) if strata else None
        found.append(MethodForgetting(method, len(measured), value))
    return found
