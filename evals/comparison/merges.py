"""The merges of the same experts side by side: scores, forgetting and cost."""

from dataclasses import dataclass

from evals.comparison.forgetting import mean_drop
from evals.comparison.results import BASELINES, STUDENT, VARIANTS, Cost, Results
from evals.statistics.interval import Interval


@dataclass(frozen=True)
class Merge:
    """One way to make the student.

    Attributes:
        name: `student` (MOPD), `baselines/NAME`, or `variants/NAME` (MOPD with other settings).
        score: Mean over the experts' domains.
        over_student: This score less MOPD's, on the same examples; None for MOPD itself.
        drop: Mean drop from the start on domains no expert trains.
        cost: Cost of this merge alone, without the experts; a mean over seeds.
    """

    name: str
    score: Interval | None
    over_student: Interval | None
    drop: Interval | None
    cost: Cost | None


def merges(results: Results) -> list[Merge]:
    """MOPD, its variants and its baselines, in the graph's order; empty where MOPD is the only merge."""
    others = [name for name in results.checkpoints if name.startswith((BASELINES, VARIANTS))]
    if not others:
        return []
    return [
        Merge(
            name,
            results.mean_score(name),
            None if name == STUDENT else results.mean_difference(name, STUDENT, results.expert_domains),
            mean_drop(results, name),
            results.costs.get(name),
        )
        for name in (STUDENT, *others)
    ]


def best(found: list[Merge]) -> Merge | None:
    """The merge with the highest mean score; None if any was not scored."""
    scored = [(merge.score.mean, merge) for merge in found if merge.score is not None]
    return max(scored, key=lambda pair: pair[0])[1] if scored and len(scored) == len(found) else None


def lead(results: Results, found: list[Merge], first: Merge) -> Interval | None:
    """How far the best merge is ahead of MOPD, with an interval that holds for all comparisons with MOPD at once.

    The winner's own interval would exclude 0 too often, because it is the best of several (Bonferroni).
    """
    together = results.at_share(1 / max(1, len(found) - 1))
    return together.mean_difference(first.name, STUDENT, results.expert_domains)
