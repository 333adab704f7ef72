"""Counts the students of a run that the gate has judged on the same held-out examples: each try may pass falsely."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from base.store.checkpoint import Store, write_whole
from experts.domain import HELD_OUT
from flows.plan.lock import lock_path
from flows.plan.state_files import TRIES_FILE, read_json
from flows.run_file.schema import STUDENT

if TYPE_CHECKING:
    from evals.comparison.results import Results


def try_number(store: Store, results: "Results", student: str) -> int:
    """The number of a student's try on these examples, from 1; a student judged before keeps its number.

    Args:
        store: Where the home is.
        results: The run's scores.
        student: Content key of the first seed's student: another first seed is another try.

    Raises:
        UserError: the file of tries is damaged.
    """
    examples = _first_examples(results)
    earlier = [each["student"] for each in read_tries(store, results.run) if _share(each["examples"], examples)]
    return 1 + (earlier.index(student) if student in earlier else len(earlier))


def note_try(store: Store, results: "Results", student: str) -> None:
    """Record that the gate judged a student for promotion."""
    with store.lock(f"tries-{results.run}"):
        kept = read_tries(store, results.run)
        if student not in [each["student"] for each in kept]:
            path = lock_path(store.home, results.run).with_name(TRIES_FILE)
            kept.append({"student": student, "examples": _first_examples(results)})
            write_whole(path, json.dumps({"tries": kept}, indent=1))


def read_tries(store: Store, run: str) -> list[dict[str, Any]]:
    """The students that were judged, in order.

    Raises:
        UserError: the file is damaged.
    """
    return list(read_json(lock_path(store.home, run).with_name(TRIES_FILE)).get("tries", []))


def _first_examples(results: "Results") -> dict[str, str]:
    """domain -> the first held-out example, which longer and shorter draws share."""
    sheets = {d: results.cells.get((STUDENT, d, HELD_OUT), {}).get(results.seeds[0]) for d in results.expert_domains}
    return {domain: sheet.ids[0] for domain, sheet in sheets.items() if sheet}


def _share(some: Mapping[str, str], others: Mapping[str, str]) -> bool:
    return any(others.get(domain) == example for domain, example in some.items())
