"""The measurements of hypotheses as JSON, from which they can be judged again, also after the scores are deleted."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from evals.claims.verdicts import Finding, judged
from evals.config.claims import HypothesisConfig
from evals.statistics.crossed_effects import Estimate, Part


def findings_data(found: Sequence[Finding]) -> list[dict[str, Any]]:
    """One row for each test, with its measurement and its verdict."""
    return [{**asdict(one), "config": one.config.model_dump(mode="json")} for one in found]


def findings_again(
    rows: Sequence[Mapping[str, Any]], hypotheses: Mapping[str, HypothesisConfig], confidence: float
) -> list[Finding]:
    """Judge the tests of a run file from measurements that `findings_data` wrote.

    Args:
        rows: The measurements.
        hypotheses: As the run file has them now. The expectations may have changed since the measurement, the
            comparisons not.
        confidence: Level of the intervals.

    Raises:
        ValueError: a test of the run file compares other checkpoints, or by another measure, than its measurement.
    """
    measured = {(row["hypothesis"], row["test"]): row for row in rows}
    found = []
    for key, hypothesis in hypotheses.items():
        for name, test in hypothesis.tests.items():
            blank = Finding(key, name, test)
            row = measured.get((key, name))
            found.append(_again(blank, row) if row else blank)
    return judged(found, confidence)


def _again(blank: Finding, row: Mapping[str, Any]) -> Finding:
    test = blank.config
    same = ("measure", "split", "domains", "compare", "slope", "contrast")
    now = test.model_dump(mode="json")
    other = [key for key in same if now[key] != row["config"][key]]
    if test.fit is not None:
        kept = row["config"]["fit"] or {}
        other += [f"fit.{key}" for key in ("x", "x_domains") if now["fit"][key] != kept.get(key)]
    key = f"hypotheses.{blank.hypothesis}.tests.{blank.test}"
    if other:
        raise ValueError(f"{key}: {', '.join(other)} changed since the measurement")
    if row["points"] and set(row["points"]) != set(test.checkpoints):
        raise ValueError(f"{key}: fit.checkpoints changed since the measurement")
    return Finding(
        blank.hypothesis,
        blank.test,
        test,
        estimate=_estimate(row["estimate"]) if row["estimate"] else None,
        values=row["values"],
        by_seed={name: _by_seed(values) for name, values in row["by_seed"].items()},
        contrast=_by_seed(row["contrast"]),
        start=row["start"],
        seeds=row["seeds"],
        examples=row["examples"],
        points={name: (x, y) for name, (x, y) in row["points"].items()},
    )


def _estimate(row: Mapping[str, Any]) -> Estimate:
    return Estimate(row["mean"], Part(**row["examples"]), Part(**row["seeds"]))


def _by_seed(values: Mapping[str, float]) -> dict[int, float]:
    return {int(seed): value for seed, value in values.items()}
