"""The data of a report for programs, in two files beside the page.

`scores.csv` has one row for each checkpoint, domain, split, seed and example, with these columns:

- `checkpoint`: node name, as `base`, `cold_start`, `experts/NAME`, `student`, `baselines/NAME`;
- `domain`, `split`: the examples it was scored on; the split is `held_out` or `out_of_distribution`;
- `seed`: seed of the run; a checkpoint that all seeds share has a row for each of them, with equal scores;
- `example`: identity of the example, the same for every checkpoint and seed, so that rows can be paired;
- `greedy_score`: score of the greedy completion, 0 to 1;
- `sampled_score`: mean score of the sampled completions; empty where none were drawn;
- `tokens`: length of the greedy completion;
- `truncated`: 1 where the greedy completion was truncated at the longest length allowed, else 0;
- `contaminated`: 1 where the checkpoint or an ancestor was trained on a copy of the example, 0 where not, empty where
  that is unknown;
- `copy`: the kind of copy found: the same `unit` by which its domain splits, the same `prompt`, or a `near` copy; else
  empty.

`report.json` has `run`, `made` (UTC), `seeds`, `confidence`, `checkpoints`, `domains`, `summary` (the first screen: its
sentence, a line for each domain, what failed, what next), `missing` (ids of the run's nodes that are not made yet),
`tables` (each `title`, `head`, `rows`, as on the page), `metrics` (shares, bounds end in `_low` and `_high`),
`statements`, `verdict` (null where nothing was judged), `costs` (`totals` by group of stages and `checkpoints`, each
with `tokens`, `seconds` and `memory` in bytes, means over seeds), `provenance` (node id -> `key`, `digest` of each
measurement), `lineage` (a mapping for each checkpoint) and `histograms` (node id -> records of `step` and `values`: the
share of tokens in each bin). A number that is not finite is null.
"""

import csv
import dataclasses
import io
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from base.store.checkpoint import write_whole
from evals.comparison.results import Cost, Results, metrics
from evals.promotion.gate import GateVerdict
from evals.report.costs import spendings, totals
from evals.report.summary import Summary
from evals.report.table import grids, statements

SCORES_FILE, DATA_FILE = "scores.csv", "report.json"
COLUMNS = (
    "checkpoint",
    "domain",
    "split",
    "seed",
    "example",
    "greedy_score",
    "sampled_score",
    "tokens",
    "truncated",
    "contaminated",
    "copy",
)


def write_scores(path: Path, results: Results) -> None:
    """Write `scores.csv`, replacing the whole file; the module's docstring lists the columns."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(_score_rows(results))
    write_whole(path, text.getvalue())


def _score_rows(results: Results) -> Iterator[tuple[Any, ...]]:
    for (checkpoint, domain, split), cell in results.cells.items():
        for seed, sheet in cell.items():
            sampled_N = sheet.sampled_N
            for number, row in enumerate(sheet.rows):
                greedy = row["greedy"]
                yield (
                    checkpoint,
                    domain,
                    split,
                    seed,
                    row["id"],
                    f"{greedy['score']:.6g}",
                    "" if sampled_N is None else f"{sampled_N[number]:.6g}",
                    greedy["tokens"],
                    int(greedy["truncated"]),
                    "" if row["contaminated"] is None else int(row["contaminated"]),
                    row.get("copy", ""),
                )


def write_data(
    path: Path,
    results: Results,
    verdict: GateVerdict | None,
    scoring: Mapping[str, Cost],
    lineage: Sequence[Mapping[str, str]],
    made: datetime,
    summary: Summary,
    missing: Sequence[str] = (),
    bins: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
) -> None:
    """Write `report.json`, replacing the whole file; the module's docstring lists its keys."""
    from pydantic_core import to_json

    found = spendings(results, scoring)
    judged = None
    if verdict is not None:
        outcome = {"promoted": verdict.promoted, "conclusion": verdict.conclusion}
        judged = dataclasses.asdict(verdict) | outcome
    content = {
        "run": results.run,
        "made": made,
        "seeds": results.seeds,
        "confidence": results.confidence,
        "checkpoints": results.checkpoints,
        "domains": results.domains,
        "summary": summary,
        "missing": missing,
        "tables": grids(results),
        "metrics": metrics(results),
        "statements": statements(results),
        "verdict": judged,
        "costs": {
            "totals": totals(found),
            "checkpoints": {one.name: {"training": one.made, "evaluation": one.scored} for one in found},
        },
        "provenance": {node: {"key": key, "digest": digest} for node, (key, digest) in results.provenance.items()},
        "lineage": lineage,
        "histograms": bins or {},
    }
    write_whole(path, to_json(content, indent=1, inf_nan_mode="null").decode() + "\n")
