"""Score sheets: the files that an evaluation wrote, read back and checked. Free of torch.

Shape suffixes: `N` examples, `G` groups of them, `K` samples of each, `S` seeds.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from base.errors import UserError
from evals.comparison.copies import NEAR
from evals.statistics.units import by_unit

FILE = "scores.jsonl"
# All checkpoints are measured on the same examples, whatever the seed of their training.
EXAMPLES_SEED = 0
ROW_KEYS = {"id", "source", "prompt", "answer", "contaminated", "greedy", "samples"}
COMPLETION_KEYS = {"completion", "score", "tokens", "truncated"}


@dataclass(frozen=True)
class Scores:
    """One checkpoint on one domain and split.

    Attributes:
        domain: Name of the domain.
        split: `held_out` or `out_of_distribution`.
        rows: One mapping per example, in the order that all checkpoints share.
    """

    domain: str
    split: str
    rows: Sequence[Mapping[str, Any]]

    @property
    def ids(self) -> list[str]:
        """Identities of the examples, in order."""
        return [row["id"] for row in self.rows]

    @property
    def units(self) -> list[str]:
        """The unit of each example; examples of one unit are not independent evidence (`evals.statistics.units`)."""
        return [row["source"] for row in self.rows]

    @property
    def greedy_N(self) -> np.ndarray:
        """Score of the greedy completion of each example."""
        return np.array([row["greedy"]["score"] for row in self.rows], dtype=float)

    @property
    def greedy_G(self) -> np.ndarray:
        """`greedy_N` as one value for each independent example; see `evals.statistics.units.by_unit`."""
        return by_unit(self.greedy_N, self.units)

    @property
    def samples_NK(self) -> np.ndarray | None:
        """Scores of the sampled completions; None when none were drawn."""
        if not self.rows[0]["samples"]:
            return None
        return np.array([[drawn["score"] for drawn in row["samples"]] for row in self.rows], dtype=float)

    @property
    def sampled_N(self) -> np.ndarray | None:
        """Mean score of the sampled completions of each example."""
        samples_NK = self.samples_NK
        return None if samples_NK is None else samples_NK.mean(axis=1)

    @property
    def contaminated(self) -> float:
        """Share of examples with a copy in the checkpoint's recorded training data."""
        return float(np.mean([bool(row["contaminated"]) for row in self.rows]))

    @property
    def near_copies(self) -> float:
        """Share of examples with no more than a near copy."""
        return float(np.mean([row.get("copy") == NEAR for row in self.rows]))

    @property
    def unknown(self) -> bool:
        """Whether examples without a copy found may have one, because not all training data are recorded."""
        return any(row["contaminated"] is None for row in self.rows)

    @property
    def contamination(self) -> str:
        """The share of contaminated examples in words."""
        if not self.contaminated:
            return "unknown" if self.unknown else "none"
        near = f", {100 * self.near_copies:.1f} % near copies" if self.near_copies else ""
        return f"{'at least ' if self.unknown else ''}{100 * self.contaminated:.1f} %{near}"


def read_scores(folder: Path, domain: str, split: str) -> Scores:
    """Read and check the sheet in an evaluation artifact's folder.

    Raises:
        UserError: the sheet is missing, empty or malformed; names the file and the line.
    """
    path = folder / FILE
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        raise UserError(f"{path}: no score sheet of {domain}/{split}") from None
    rows = [_row(f"{path}:{number}", line) for number, line in enumerate(lines, start=1)]
    if not rows:
        raise UserError(f"{path}: the score sheet of {domain}/{split} is empty")
    if len({row["id"] for row in rows}) != len(rows):
        raise UserError(f"{path}: an example id occurs twice, so scores cannot be paired")
    if len({len(row["samples"]) for row in rows}) != 1:
        raise UserError(f"{path}: examples have unequal numbers of samples")
    return Scores(domain, split, rows)


def _row(place: str, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: not valid JSON: {error}") from None
    if not isinstance(row, dict) or (missing := ROW_KEYS - row.keys()):
        raise UserError(f"{place}: a row lacks {', '.join(sorted(missing)) if isinstance(row, dict) else 'its keys'}")
    for drawn in [row["greedy"], *row["samples"]]:
        if missing := COMPLETION_KEYS - drawn.keys():
            raise UserError(f"{place}: a completion lacks {', '.join(sorted(missing))}")
        if not 0 <= drawn["score"] <= 1:
            raise UserError(f"{place}: score {drawn['score']} is outside [0, 1]")
    return row
