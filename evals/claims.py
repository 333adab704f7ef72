"""Hypotheses of a run, tested: each a contrast of checkpoints with its interval, verdict and Holm's correction.

Measures by example (`score`, `passes`, `drop`) are paired by example and take their interval from the bootstrap of
`evals.compare`, with seeds resampled too where there are `MIN_SEEDS` of them. Measures with one value a checkpoint and
seed (shift, cost) are paired by seed and take a t interval over seeds. Verdicts:

    above, below     shown where Holm's p over all such tests of the run is below 1 - confidence and the sign is right
    within           shown where the 1 - 2 alpha interval lies within the margins (TOST, Schuirmann 1987)
    not_below,       shown where the bound of the two-sided interval lies within the margin
    not_above

A verdict is `contradicted` only where the interval lies wholly on the other side; anything else is `not shown`.

Shape suffixes: `S` seeds, `N` examples, `R` resamples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from evals.claim_config import COST_MEASURES, EXAMPLE_MEASURES, ComparisonConfig, HypothesisConfig
from evals.compare import MIN_SEEDS, Interval, Levels, percentile, resampled_means
from evals.fit import quadratic_fit
from evals.hypotheses import holm
from evals.results import Results

Verdict = Literal["shown", "not shown", "contradicted", "not measured"]
# One-sided level of an equivalence test; its interval is the two-sided one at 1 - 2 alpha.
EQUIVALENCE_ALPHA = 0.05


@dataclass(frozen=True)
class Finding:
    """What became of one test.

    Attributes:
        hypothesis: Its key in the run file, such as `C1`.
        test: The test's name.
        config: The test as fixed beforehand.
        verdict: See the module.
        interval: Of the contrast, or of R squared; None where it was not measured.
        p: Two-sided; for above and below after Holm's correction; None for other tests.
        values: Each checkpoint's own mean, where it was measured.
        seeds: How many seeds it rests on.
        examples: How many examples of each seed; 0 for measures without.
    """

    hypothesis: str
    test: str
    config: ComparisonConfig
    verdict: Verdict
    interval: Interval | None
    p: float | None
    values: Mapping[str, float]
    seeds: int
    examples: int


def findings(results: Results, hypotheses: Mapping[str, HypothesisConfig]) -> list[Finding]:
    """Test every hypothesis of a run, with Holm's correction over those of superiority."""
    found = [
        _finding(results, key, name, test) for key, entry in hypotheses.items() for name, test in entry.tests.items()
    ]
    raw = {f"{one.hypothesis}/{one.test}": one.p for one in found if one.p is not None}
    adjusted = holm(raw)
    judged = []
    for one in found:
        p = adjusted.get(f"{one.hypothesis}/{one.test}")
        judged.append(replace(one, p=p, verdict=_verdict(replace(one, p=p), results.confidence)))
    return judged


def _finding(results: Results, hypothesis: str, name: str, test: ComparisonConfig) -> Finding:
    nothing = Finding(hypothesis, name, test, "not measured", None, None, {}, 0, 0)
    if test.fit is not None:
        return _fitted(results, nothing)
    if test.measure in EXAMPLE_MEASURES:
        return _by_example(results, nothing)
    return _by_seed(results, nothing)


def _by_example(results: Results, blank: Finding) -> Finding:
    """The contrast of scores, paired by example and seed."""
    test = blank.config
    names = list(test.weights)
    scores = {domain: _scores(results, names, domain, test) for domain in domains_of(results, test)}
    if not scores or any(found is None for found in scores.values()):
        return blank
    known = {domain: found for domain, found in scores.items() if found is not None}
    weights = list(test.weights.values())
    strata = {
        f"{domain}/{test.split}": np.tensordot(weights, np.stack(found), axes=1) for domain, found in known.items()
    }
    first = next(iter(strata.values()))
    whole = {len(contrast_SN) for contrast_SN in strata.values()} == {len(results.seeds)}
    levels: Levels = "seeds" if whole and len(results.seeds) >= MIN_SEEDS else "examples"
    draws_R = np.mean([resampled_means(part_SN, name, levels) for name, part_SN in strata.items()], axis=0)
    estimate = float(np.mean([np.mean(part_SN) for part_SN in strata.values()]))
    confidence = 1 - 2 * EQUIVALENCE_ALPHA if test.expect == "within" else results.confidence
    values = {
        name: float(np.mean([np.mean(found[place]) for found in known.values()])) for place, name in enumerate(names)
    }
    return replace(
        blank,
        interval=percentile(estimate, draws_R, confidence),
        p=_two_sided(draws_R) if test.expect in ("above", "below") else None,
        values=values,
        seeds=len(first),
        examples=first.shape[1],
    )


def _scores(results: Results, names: Sequence[str], domain: str, test: ComparisonConfig) -> list[np.ndarray] | None:
    """The measure `[S, N]` of several checkpoints on a domain, over the seeds all of them have."""
    shown = [results.checkpoint(name, domain) for name in names]
    start = [results.start] if test.measure == "drop" else []
    found = results.aligned([*shown, *start], domain, test.split, sampled=test.measure == "sampled")
    if found is None:
        return None
    if test.measure == "drop":
        return [found[-1] - one_SN for one_SN in found[:-1]]
    return [(one_SN > 0).astype(float) if test.measure == "passes" else one_SN for one_SN in found]


def _by_seed(results: Results, blank: Finding) -> Finding:
    """The contrast of values that a checkpoint has one of for each seed: a t interval over seeds."""
    test = blank.config
    columns = {name: _seed_values(results, name, test) for name in test.weights}
    seeds = [seed for seed in results.seeds if all(seed in column for column in columns.values())]
    if not seeds:
        return blank
    values_CS = np.array([[column[seed] for seed in seeds] for column in columns.values()])
    contrast_S = np.array(list(test.weights.values())) @ values_CS
    confidence = 1 - 2 * EQUIVALENCE_ALPHA if test.expect == "within" else results.confidence
    interval, p = _t_interval(contrast_S, confidence)
    return replace(
        blank,
        interval=interval,
        p=p if test.expect in ("above", "below") else None,
        values={name: float(np.mean(row_S)) for name, row_S in zip(columns, values_CS, strict=True)},
        seeds=len(seeds),
    )


def _seed_values(results: Results, name: str, test: ComparisonConfig) -> dict[int, float]:
    """seed -> the measure of a checkpoint."""
    if test.measure in COST_MEASURES:
        return {seed: getattr(cost, test.measure) for seed, cost in results.spent.get(name, {}).items()}
    return results.shifted(name, test.measure, domains_of(results, test))


def _fitted(results: Results, blank: Finding) -> Finding:
    """R squared of the measure's quadratic on another measure, points being checkpoints."""
    test = blank.config
    assert test.fit is not None
    across = test.model_copy(update={"measure": test.fit.x, "domains": test.fit.x_domains})
    points = {}
    for name in test.fit.checkpoints:
        x, y = checkpoint_mean(results, name, across), checkpoint_mean(results, name, test)
        if x is not None and y is not None:
            points[name] = (x, y)
    fitted = quadratic_fit([x for x, _ in points.values()], [y for _, y in points.values()], results.confidence)
    if fitted is None or len(points) < len(test.fit.checkpoints):
        return blank
    values = {name: y for name, (_, y) in points.items()}
    return replace(blank, interval=fitted.r_squared, values=values, seeds=len(results.seeds))


def checkpoint_mean(results: Results, name: str, test: ComparisonConfig) -> float | None:
    """A checkpoint's mean of a test's measure over the test's domains and all seeds; None where it was not measured."""
    if test.measure not in EXAMPLE_MEASURES:
        values = _seed_values(results, name, test)
        return float(np.mean(list(values.values()))) if values else None
    means = []
    for domain in domains_of(results, test):
        found = _scores(results, [name], domain, test)
        if found is None:
            return None
        means.append(float(np.mean(found[0])))
    return float(np.mean(means)) if means else None


def domains_of(results: Results, test: ComparisonConfig) -> Sequence[str]:
    """The domains a test averages over."""
    if test.domains is not None:
        return test.domains
    return results.untrained if test.measure == "drop" else results.expert_domains


def _t_interval(values_S: np.ndarray, confidence: float) -> tuple[Interval | None, float | None]:
    """The t interval of a mean over seeds and the two-sided p-value; none with one seed."""
    if len(values_S) < 2:
        return None, None
    from scipy.stats import t

    mean, error = float(np.mean(values_S)), float(np.std(values_S, ddof=1) / np.sqrt(len(values_S)))
    half = float(t.ppf((1 + confidence) / 2, len(values_S) - 1)) * error
    p = float(2 * t.sf(abs(mean) / error, len(values_S) - 1)) if error > 0 else float(mean == 0)
    return Interval(mean, mean - half, mean + half), p


def _two_sided(draws_R: np.ndarray) -> float:
    """P-value against a contrast of 0 from its bootstrap draws, never 0 (Davison & Hinkley 1997, 4.3)."""
    below, above = (1 + int(np.sum(draws_R <= 0)), 1 + int(np.sum(draws_R >= 0)))
    return min(1.0, 2 * min(below, above) / (len(draws_R) + 1))


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
