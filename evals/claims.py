"""Hypotheses of a run, tested: each a contrast of checkpoints with its interval, verdict and Holm's correction.

Measures by example (`score`, `sampled`, `passes`, `drop`) are paired by example and seed; with `MIN_SEEDS` seeds and
more their t interval speaks of new seeds and new examples, with fewer of new examples alone (`evals.crossed`). Measures
with one value a checkpoint and seed (shift, cost) are paired by seed and take the t interval over seeds. Verdicts:

    above, below     shown where Holm's p over all such tests of the run is below 1 - confidence and the sign is right
    within           shown where the 1 - 2 alpha interval lies within the margins (TOST, Schuirmann 1987)
    not_below,       shown where the bound of the two-sided interval lies within the margin
    not_above

A verdict is `contradicted` only where the interval lies wholly on the other side; anything else is `not shown`.

Shape suffixes: `C` checkpoints, `S` seeds, `N` examples.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from evals.claim_config import EXAMPLE_MEASURES, ComparisonConfig, HypothesisConfig
from evals.claim_measures import by_example, by_seed, start_score
from evals.crossed import Estimate, over_both, over_examples, over_seeds
from evals.fit import quadratic_fit
from evals.hypotheses import holm
from evals.interval import Interval
from evals.results import MIN_SEEDS, Results

Verdict = Literal["shown", "not shown", "contradicted", "not measured"]
# One-sided level of an equivalence test; its interval is the two-sided one at 1 - 2 alpha.
EQUIVALENCE_ALPHA = 0.05


@dataclass(frozen=True)
class Curve:
    """The parabola of a fit.

    Attributes:
        points: checkpoint -> what predicts and what is predicted, means over seeds.
        coefficients: Of x², x and 1.
    """

    points: Mapping[str, tuple[float, float]]
    coefficients: tuple[float, float, float]


@dataclass(frozen=True)
class Finding:
    """What became of one test, with what a reader needs to compute it again.

    Attributes:
        hypothesis: Its key in the run file, such as `C1`.
        test: The test's name.
        config: The test as the run file has it.
        verdict: See the module.
        interval: Of the contrast, or of R squared; None where it was not measured.
        p: Two-sided; for above and below after Holm's correction; None for other tests.
        raw_p: The same before the correction.
        freedom: Degrees of freedom of the t interval; None for a fit.
        values: Each checkpoint's own mean, where it was measured.
        by_seed: checkpoint -> seed -> its own mean.
        contrast: seed -> the contrast, a mean over examples and domains.
        start: The start's mean score on the same examples, where the measure is a score or a drop.
        seeds: How many seeds it rests on.
        examples: How many examples of each seed; 0 for measures without.
        curve: Of a fit.
    """

    hypothesis: str
    test: str
    config: ComparisonConfig
    verdict: Verdict = "not measured"
    interval: Interval | None = None
    p: float | None = None
    raw_p: float | None = None
    freedom: float | None = None
    values: Mapping[str, float] = field(default_factory=dict)
    by_seed: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    contrast: Mapping[int, float] = field(default_factory=dict)
    start: float | None = None
    seeds: int = 0
    examples: int = 0
    curve: Curve | None = None


def findings(results: Results, hypotheses: Mapping[str, HypothesisConfig]) -> list[Finding]:
    """Test every hypothesis of a run, with Holm's correction over those of superiority."""
    found = [
        _finding(results, Finding(key, name, test))
        for key, entry in hypotheses.items()
        for name, test in entry.tests.items()
    ]
    adjusted = holm({f"{one.hypothesis}/{one.test}": one.raw_p for one in found if one.raw_p is not None})
    judged = []
    for one in found:
        corrected = replace(one, p=adjusted.get(f"{one.hypothesis}/{one.test}"))
        judged.append(replace(corrected, verdict=_verdict(corrected, results.confidence)))
    return judged


def _finding(results: Results, blank: Finding) -> Finding:
    if blank.config.fit is not None:
        return _fitted(results, blank)
    return (_by_example if blank.config.measure in EXAMPLE_MEASURES else _by_seed)(results, blank)


def _by_example(results: Results, blank: Finding) -> Finding:
    """The contrast of scores, paired by example and seed."""
    test = blank.config
    found = by_example(results, list(test.weights), test)
    if found is None or any(table_CSN.shape[-1] < 2 for table_CSN in found[1].values()):
        return blank
    seeds, tables = found
    weights = list(test.weights.values())
    strata = {domain: np.tensordot(weights, table_CSN, axes=1) for domain, table_CSN in tables.items()}
    estimate = over_both(strata) if len(seeds) >= MIN_SEEDS else over_examples(strata)
    means_CS = np.mean([table_CSN.mean(axis=2) for table_CSN in tables.values()], axis=0)
    told = _told(results, blank, seeds, means_CS, estimate)
    return replace(told, start=start_score(results, test), examples=next(iter(tables.values())).shape[-1])


def _by_seed(results: Results, blank: Finding) -> Finding:
    """The contrast of values that a checkpoint has one of for each seed; no interval with one seed."""
    columns = {name: by_seed(results, name, blank.config) for name in blank.config.weights}
    seeds = [seed for seed in results.seeds if all(seed in column for column in columns.values())]
    if not seeds:
        return blank
    values_CS = np.array([[column[seed] for seed in seeds] for column in columns.values()])
    contrast_S = np.array(list(blank.config.weights.values())) @ values_CS
    return _told(results, blank, seeds, values_CS, over_seeds(contrast_S) if len(seeds) > 1 else None)


def _told(
    results: Results, blank: Finding, seeds: list[int], values_CS: np.ndarray, estimate: Estimate | None
) -> Finding:
    """What both kinds of measures come to."""
    test = blank.config
    confidence = 1 - 2 * EQUIVALENCE_ALPHA if test.expect == "within" else results.confidence
    contrast_S = np.array(list(test.weights.values())) @ values_CS
    rows = dict(zip(test.weights, values_CS, strict=True))
    return replace(
        blank,
        interval=estimate.interval(confidence) if estimate else None,
        raw_p=estimate.p if estimate and test.expect in ("above", "below") else None,
        freedom=estimate.freedom if estimate else None,
        values={name: float(np.mean(row_S)) for name, row_S in rows.items()},
        by_seed={name: dict(zip(seeds, map(float, row_S), strict=True)) for name, row_S in rows.items()},
        contrast=dict(zip(seeds, map(float, contrast_S), strict=True)),
        seeds=len(seeds),
    )


def _fitted(results: Results, blank: Finding) -> Finding:
    """R squared of the measure's quadratic on another measure, points being checkpoints."""
    test = blank.config
    assert test.fit is not None
    across = test.model_copy(update={"measure": test.fit.x, "domains": test.fit.x_domains})
    sides = {name: (by_seed(results, name, across), by_seed(results, name, test)) for name in test.fit.checkpoints}
    if not all(x and y for x, y in sides.values()):
        return blank
    points = {name: (_mean(x), _mean(y)) for name, (x, y) in sides.items()}
    fitted = quadratic_fit([x for x, _ in points.values()], [y for _, y in points.values()], results.confidence)
    if fitted is None:
        return blank
    return replace(
        blank,
        interval=fitted.r_squared,
        values={name: y for name, (_, y) in points.items()},
        by_seed={name: y for name, (_, y) in sides.items()},
        start=start_score(results, test),
        seeds=min(len(side) for pair in sides.values() for side in pair),
        curve=Curve(points, fitted.coefficients),
    )


def _mean(values: Mapping[int, float]) -> float:
    return float(np.mean(list(values.values())))


def _verdict(finding: Finding, confidence: float) -> Verdict:
    """Judge an interval by what was expected of it."""
    interval, margin, expect = finding.interval, finding.config.margin, finding.config.expect
    if interval is None:
        return "not measured"
    if expect in ("above", "below"):
        sign = 1 if expect == "above" else -1
        low, high = sorted((sign * (interval.low - margin), sign * (interval.high - margin)))
        if high < 0:
            return "contradicted"
        sure = finding.p is None or finding.p < 1 - confidence
        return "shown" if low > 0 and sure else "not shown"
    inside = {
        "within": interval.low > -margin and interval.high < margin,
        "not_below": interval.low > -margin,
        "not_above": interval.high < margin,
    }[expect]
    outside = {
        "within": interval.low > margin or interval.high < -margin,
        "not_below": interval.high < -margin,
        "not_above": interval.low > margin,
    }[expect]
    return "shown" if inside else "contradicted" if outside else "not shown"
