"""The few numbers of a run that a list of runs shows; `Results.metrics` has all. Free of torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evals.comparison.metrics import Triple, recovery
from evals.comparison.results import STUDENT, Results
from stages.config.on_policy import HISTOGRAM

MEAN, RECOVERY = "eval/mean/student", "eval/recovery"


def headline(results: Results) -> dict[str, float]:
    """Means, recovery, and student, teacher and gap of each expert's domain, as shares.

    The gap is the student's score less the teacher's. Missing measurements have no key.
    """
    measured = {
        MEAN: results.mean_score(STUDENT),
        "eval/mean/teacher": results.mean_score("teacher"),
        "eval/mean/start": results.mean_score(results.start),
        RECOVERY: results.recovery(),
    }
    for domain in results.expert_domains:
        measured[f"eval/{domain}/student"] = results.score(STUDENT, domain)
        measured[f"eval/{domain}/teacher"] = results.score("teacher", domain)
        measured[f"eval/{domain}/gap"] = results.difference(STUDENT, "teacher", domain)
    return {name: interval.mean for name, interval in measured.items() if interval is not None}


def histograms(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """The bins of histograms among the metric records of each training node, for `report.json`.

    Args:
        curves: node id -> its journal's records.

    Returns:
        node id -> records of `step` and `values`, those that have bins.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for node, records in curves.items():
        for record in records:
            bins = {name: value for name, value in record.get("values", {}).items() if f"/{HISTOGRAM}" in name}
            if bins:
                found.setdefault(node, []).append({"step": record["step"], "values": bins})
    return found


@dataclass(frozen=True)
class Compared:
    """One checkpoint on one split of a domain, beside the teacher it is compared with and the start; shares in [0, 1].

    Attributes:
        domain: The domain.
        split: Which examples.
        own: The checkpoint's mean greedy score.
        teacher: The score of the domain's teacher of the same seed; None where it was not scored or there is no
            teacher.
        start: The score of the checkpoint the student starts from.
        recovery: Share of the teacher's gain over the start; None where no gain is shown.
    """

    domain: str
    split: str
    own: float
    teacher: float | None = None
    start: float | None = None
    recovery: float | None = None


def compared(results: Results, name: str, seed: int) -> list[Compared]:
    """A checkpoint of one seed on every domain and split it was scored on, in the order of the results."""
    found = []
    for checkpoint, domain, split in results.cells:
        if checkpoint != name:
            continue
        teacher, start = results.teacher(domain), results.start
        own_SN, teacher_SN, start_SN = (_of_seed(results, who, domain, split, seed) for who in (name, teacher, start))
        if own_SN is None:
            continue
        share = None
        if teacher_SN is not None and start_SN is not None and domain in results.expert_domains:
            triple = Triple(start_SN, teacher_SN, own_SN)
            share = recovery({f"{domain}/{split}": triple}, results.confidence)
        found.append(
            Compared(
                domain,
                split,
                float(own_SN.mean()),
                None if teacher_SN is None else float(teacher_SN.mean()),
                None if start_SN is None else float(start_SN.mean()),
                None if share is None else share.mean,
            )
        )
    return found


def _of_seed(results: Results, name: str | None, domain: str, split: str, seed: int) -> np.ndarray | None:
    found = results.aligned([name], domain, split, seeds=(seed,))
    return found[0] if found else None
