"""Measures and judges a run's hypotheses, each a contrast of checkpoints or a fit.

Measures by example (`score`, `sampled`, `passes`, `drop`) are paired by example and seed. With at least `MIN_SEEDS`
seeds their interval is for new seeds and new examples; with fewer it is for new examples of the same seeds
(`evals.statistics.crossed_effects`). Measures with one value per checkpoint and seed (shift, cost) are paired by seed
and take the t interval over seeds. `evals.claims.verdicts` judges them.

Shape suffixes: `C` checkpoints, `S` seeds, `N` examples.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from evals.claims.measures import by_example, by_seed, start_score
from evals.claims.verdicts import Finding, judged
from evals.comparison.results import MIN_SEEDS, Results
from evals.config.claims import EXAMPLE_MEASURES, HypothesisConfig
from evals.statistics.crossed_effects import Estimate, over_both, over_examples, over_seeds


def findings(results: Results, hypotheses: Mapping[str, HypothesisConfig]) -> list[Finding]:
    """Test every hypothesis of a run, with Holm's correction over all of its tests."""
    found = [
        _finding(results, Finding(key, name, test))
        for key, entry in hypotheses.items()
        for name, test in entry.tests.items()
    ]
    return judged(found, results.confidence)


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
    # The contrast of an example that every checkpoint with a weight above 0 wins and all others lose.
    largest = sum(map(abs, weights)) / 2
    estimate = (over_both if len(seeds) >= MIN_SEEDS else over_examples)(strata, largest)
    means_CS = np.mean([table_CSN.mean(axis=2) for table_CSN in tables.values()], axis=0)
    finding = _measured(blank, seeds, means_CS, estimate)
    return replace(finding, start=start_score(results, test), examples=next(iter(tables.values())).shape[-1])


def _by_seed(results: Results, blank: Finding) -> Finding:
    """The contrast of a measure with one value per checkpoint and seed; no estimate with a single seed."""
    columns = {name: by_seed(results, name, blank.config) for name in blank.config.weights}
    seeds = [seed for seed in results.seeds if all(seed in column for column in columns.values())]
    if not seeds:
        return blank
    values_CS = np.array([[column[seed] for seed in seeds] for column in columns.values()])
    contrast_S = np.array(list(blank.config.weights.values())) @ values_CS
    return _measured(blank, seeds, values_CS, over_seeds(contrast_S) if len(seeds) > 1 else None)


def _measured(blank: Finding, seeds: list[int], values_CS: np.ndarray, estimate: Estimate | None) -> Finding:
    """The finding of either kind of measure."""
    test = blank.config
    contrast_S = np.array(list(test.weights.values())) @ values_CS
    rows = dict(zip(test.weights, values_CS, strict=True))
    return replace(
        blank,
        estimate=estimate,
        values={name: float(np.mean(row_S)) for name, row_S in rows.items()},
        by_seed={name: dict(zip(seeds, map(float, row_S), strict=True)) for name, row_S in rows.items()},
        contrast=dict(zip(seeds, map(float, contrast_S), strict=True)),
        seeds=len(seeds),
    )


def _fitted(results: Results, blank: Finding) -> Finding:
    """The points of a fit: one for each checkpoint, means over seeds."""
    test = blank.config
    assert test.fit is not None
    across = test.model_copy(update={"measure": test.fit.x, "domains": test.fit.x_domains})
    sides = {name: (by_seed(results, name, across), by_seed(results, name, test)) for name in test.checkpoints}
    if not all(x and y for x, y in sides.values()):
        return blank
    points = {name: (_mean(x), _mean(y)) for name, (x, y) in sides.items()}
    return replace(
        blank,
        values={name: y for name, (_, y) in points.items()},
        by_seed={name: y for name, (_, y) in sides.items()},
        start=start_score(results, test),
        seeds=min(len(side) for pair in sides.values() for side in pair),
        points=points,
    )


def _mean(values: Mapping[int, float]) -> float:
    return float(np.mean(list(values.values())))
