"""Verdicts on measured hypotheses.

Each test has two p-values, one of the expectation and one of its opposite. Both are on the two-sided scale (twice the
one-sided p-value), and both are corrected by Holm over all tests of the run file:

    above, below     the contrast is above, or below, 0; the opposite is the other sign
    within           it lies within the margins (two one-sided tests, Schuirmann 1987); the opposite is outside
    not_below,       it lies within one margin; the opposite is beyond it
    not_above
    fit              the parabola explains more than the margin; the opposite is less

`shown` and `contradicted` need a corrected p below 1 - confidence. A test is `not informative` if the start itself, in
place of the first checkpoint, would keep the margin. A test `cannot be judged` if it has values but only one seed, or
fewer than `MIN_POINTS` independent points. Anything else is `not shown`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from evals.comparison.results import MIN_SEEDS
from evals.config.claims import EXAMPLE_MEASURES, ComparisonConfig
from evals.statistics.crossed_effects import Estimate
from evals.statistics.fit import MIN_POINTS, Fit, quadratic_fit
from evals.statistics.interval import Interval
from evals.statistics.tests_of_scores import holm

ClaimVerdict = Literal["shown", "not shown", "contradicted", "not informative", "cannot be judged", "not measured"]


@dataclass(frozen=True)
class Finding:
    """The result of one test, with all that is needed to compute it again.

    Attributes:
        hypothesis: Its key in the run file, such as `C1`.
        test: The test's name.
        config: The test as the run file has it.
        verdict: See the module.
        interval: Interval of the contrast, or of the share of variance that a fit explains; None where there is no
            estimate.
        p: P-value of the expectation, after Holm's correction; None where there is no estimate.
        opposite_p: P-value of the opposite, after Holm's correction.
        raw_p: `p` before the correction.
        estimate: Estimate of the contrast; None for a fit, and where there is only one seed.
        values: Each checkpoint's own mean, where it was measured.
        by_seed: checkpoint -> seed -> its own mean.
        contrast: seed -> the contrast, a mean over examples and domains.
        start: The start's mean score on the same examples, where the measure is a score or a drop.
        seeds: Number of seeds measured.
        examples: Number of independent examples of each seed; 0 for measures without examples.
        points: For a fit: checkpoint -> predictor and predicted measure, means over seeds.
        coefficients: For a fit: coefficients of x², x and 1.
    """

    hypothesis: str
    test: str
    config: ComparisonConfig
    verdict: ClaimVerdict = "not measured"
    interval: Interval | None = None
    p: float | None = None
    opposite_p: float | None = None
    raw_p: float | None = None
    estimate: Estimate | None = None
    values: Mapping[str, float] = field(default_factory=dict)
    by_seed: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    contrast: Mapping[int, float] = field(default_factory=dict)
    start: float | None = None
    seeds: int = 0
    examples: int = 0
    points: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    coefficients: tuple[float, float, float] | None = None

    @property
    def of_these_seeds(self) -> bool:
        """Whether the verdict holds only for the seeds that were run, as they are fewer than `MIN_SEEDS`."""
        few = 0 < self.seeds < MIN_SEEDS
        return few and self.config.measure in EXAMPLE_MEASURES and self.config.fit is None

    @property
    def label(self) -> str:
        """The verdict, with `of these seeds` where it holds for them only."""
        judged = self.verdict in ("shown", "contradicted")
        return f"{self.verdict} of these seeds" if judged and self.of_these_seeds else self.verdict


def judged(found: Sequence[Finding], confidence: float) -> list[Finding]:
    """Judge all tests of a run file together."""
    fits = [_fit(one) for one in found]
    tails = [_tails(one, fit) for one, fit in zip(found, fits, strict=True)]
    expected = holm({str(place): pair[0] for place, pair in enumerate(tails) if pair})
    opposite = holm({str(place): pair[1] for place, pair in enumerate(tails) if pair})
    ready = []
    for place, (one, fit, pair) in enumerate(zip(found, fits, tails, strict=True)):
        source = fit or one.estimate
        tested = replace(
            one,
            interval=source.interval(confidence) if source else None,
            coefficients=fit.coefficients if fit else None,
            raw_p=pair[0] if pair else None,
            p=expected.get(str(place)),
            opposite_p=opposite.get(str(place)),
        )
        ready.append(replace(tested, verdict=_verdict(tested, 1 - confidence)))
    return ready


def _fit(finding: Finding) -> Fit | None:
    """The parabola through a fit's points; with `MIN_POINTS` groups or more, each group counts as its mean."""
    asked, points = finding.config.fit, finding.points
    if asked is None or not points:
        return None
    groups = asked.groups if len(asked.groups) >= MIN_POINTS else [[name] for name in points]
    pairs = [np.mean([points[name] for name in group], axis=0) for group in groups]
    found = quadratic_fit([float(x) for x, _ in pairs], [float(y) for _, y in pairs])
    return replace(found, points=min(found.points, len(asked.groups))) if found else None


def _tails(finding: Finding, fit: Fit | None) -> tuple[float, float] | None:
    """Two-sided p-values of the expectation and of its opposite; None where neither can be tested."""
    margin = finding.config.margin
    if fit is not None:
        if fit.points < MIN_POINTS:
            return None
        above = fit.above(margin)
        return _doubled(above), _doubled(1 - above)
    estimate = finding.estimate
    if estimate is None:
        return None
    above_top, above_bottom = estimate.above(margin), estimate.above(-margin)
    below_top, below_bottom = estimate.below(margin), estimate.below(-margin)
    expected, opposite = {
        "above": (above_top, below_top),
        "below": (below_top, above_top),
        "within": (max(above_bottom, below_top), 2 * min(above_top, below_bottom)),
        "not_below": (above_bottom, below_bottom),
        "not_above": (below_top, above_top),
    }[finding.config.expect]
    return _doubled(expected), _doubled(opposite)


def _doubled(p: float) -> float:
    return min(1.0, 2 * p)


def _verdict(finding: Finding, level: float) -> ClaimVerdict:
    """The verdict that follows from the corrected p-values."""
    if finding.p is None or finding.opposite_p is None:
        return "cannot be judged" if finding.values else "not measured"
    if finding.p < level:
        return "shown" if _informs(finding) else "not informative"
    return "contradicted" if finding.opposite_p < level else "not shown"


def _informs(finding: Finding) -> bool:
    """Whether the margin of a comparison is smaller than what the second checkpoint gained, or forgot, since the start.

    If so, the start in place of the first checkpoint would fail the test. A start that learnt nothing always lies below
    an upper bound, so for these tests its distance from the second checkpoint is compared with the margin.
    """
    test = finding.config
    if test.compare is None or test.margin == 0 or finding.start is None:
        return True
    own = 0.0 if test.measure == "drop" else finding.start
    gap = own - finding.values[test.compare[1]]
    return gap <= -test.margin if test.expect == "not_below" else abs(gap) >= test.margin
