"""The measures that a test of the run file compares: per example, or one value per seed.

Shape suffixes: `C` checkpoints, `S` seeds, `N` examples.
"""

from collections.abc import Sequence

import numpy as np

from evals.comparison.results import Results
from evals.config.claims import COST_MEASURES, EXAMPLE_MEASURES, ComparisonConfig


def domains_of(results: Results, test: ComparisonConfig) -> Sequence[str]:
    """The domains a test averages over."""
    if test.domains is not None:
        return test.domains
    return results.untrained if test.measure == "drop" else results.expert_domains


def by_example(
    results: Results, names: Sequence[str], test: ComparisonConfig
) -> tuple[list[int], dict[str, np.ndarray]] | None:
    """The measure of several checkpoints over the seeds that all of them have on all of the test's domains.

    Returns:
        The seeds, and domain -> `[C, S, N]`; None where there are none.
    """
    drop, sampled = test.measure == "drop", test.measure == "sampled"
    domains = domains_of(results, test)
    asked = {
        domain: [*(results.checkpoint(name, domain) for name in names), *([results.start] if drop else [])]
        for domain in domains
    }
    cells = [results.cells.get((name or "", d, test.split), {}) for d, own in asked.items() for name in own]
    seeds = [seed for seed in results.seeds if cells and all(seed in cell for cell in cells)]
    tables = {}
    for domain, own in asked.items() if seeds else ():
        passes = test.measure == "passes"
        found = results.aligned(own, domain, test.split, sampled=sampled, seeds=seeds, passes=passes)
        if found is None:
            return None
        table_CSN = np.stack(found)
        tables[domain] = table_CSN[-1] - table_CSN[:-1] if drop else table_CSN
    return (seeds, tables) if tables else None


def by_seed(results: Results, name: str, test: ComparisonConfig) -> dict[int, float]:
    """seed -> the measure of a checkpoint, a mean over its examples and domains; empty where it was not measured."""
    if test.measure in COST_MEASURES:
        return {seed: getattr(cost, test.measure) for seed, cost in results.spent.get(name, {}).items()}
    if test.measure not in EXAMPLE_MEASURES:
        return results.shifted(name, test.measure, domains_of(results, test))
    found = by_example(results, [name], test)
    if found is None:
        return {}
    seeds, tables = found
    means_S = np.mean([table_CSN[0].mean(axis=1) for table_CSN in tables.values()], axis=0)
    return dict(zip(seeds, map(float, means_S), strict=True))


def start_score(results: Results, test: ComparisonConfig) -> float | None:
    """The start's mean score on a test's domains if it measures scores or drops; None for other measures."""
    if test.measure not in EXAMPLE_MEASURES:
        return None
    plain = test
    if test.measure == "drop":
        plain = test.model_copy(update={"measure": "score", "domains": list(domains_of(results, test))})
    values = by_seed(results, results.start, plain)
    return float(np.mean(list(values.values()))) if values else None
