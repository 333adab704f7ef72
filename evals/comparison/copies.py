"""Find held-out examples in what a checkpoint was trained on: the same unit, the same prompt, or a near copy.

Shape suffixes as in `stages.rows.trained_on`; `R` shingles of one prompt, `M` hashes of all sketches in order.
"""

from collections.abc import Sequence

import numpy as np

from experts.data.normal_form import normal_form, numbers, short_hash
from experts.domain import Domain, Example
from stages.rows.shingles import FEWEST_SHINGLES, shingles, template_shingles, without
from stages.rows.trained_on import Prompts, TrainedOn, answer_hash, unit_hash

UNIT, PROMPT, NEAR, NONE = "unit", "prompt", "near", ""
# Jaccard similarity of two prompts' shingles, the templates' left out, from which on one is a near copy of the other.
LIKENESS = 0.7


class Copies:
    """Looks for copies in what a checkpoint was trained on.

    Args:
        trained: What it was trained on in all domains, its ancestors included.
    """

    def __init__(self, trained: TrainedOn) -> None:
        self._groups = [_Index(prompts) for prompts in trained.groups.values()]

    def find(self, domain: Domain, examples: Sequence[Example]) -> list[str]:
        """The kind of copy of each example in the training data.

        Returns:
            `UNIT` if the unit by which the domain splits was trained on, `PROMPT` if a prompt of the same normal form
            was, `NEAR` for most of a long prompt's shingles and the same numbers, else `NONE`. Prompts that differ in
            case are no copies where their answers differ in case alone: there it is part of the exercise.
        """
        forms = [normal_form(example.question) for example in examples]
        parts = [shingles(form) for form in forms]
        template = template_shingles(parts)
        return [
            self._kind(unit_hash(domain, example), answer_hash(example.answer), form, part, template)
            for example, form, part in zip(examples, forms, parts, strict=True)
        ]

    def _kind(self, unit: int, answer: int, form: str, runs_R: np.ndarray, template_C: np.ndarray) -> str:
        if any(group.has_unit(unit) for group in self._groups):
            return UNIT
        if any(group.has_prompt(short_hash(form), answer) for group in self._groups):
            return PROMPT
        numbers_hash = short_hash(numbers(form))
        return NEAR if any(group.has_near(runs_R, template_C, numbers_hash) for group in self._groups) else NONE


class _Index:
    """One group of prompts, sorted for each kind of search."""

    def __init__(self, prompts: Prompts) -> None:
        self.prompts = prompts
        self.units_N = np.unique(prompts.units_N)
        by_form_N = np.argsort(prompts.forms_N, kind="stable")
        self.forms_N, self.answers_N = prompts.forms_N[by_form_N], prompts.answers_N[by_form_N]
        by_hash_M = np.argsort(prompts.sketches_S, kind="stable")
        self.hashes_M = prompts.sketches_S[by_hash_M]
        self.rows_M = np.searchsorted(prompts.ends_N, by_hash_M, side="right")

    def has_unit(self, unit: int) -> bool:
        """Whether a unit is among those trained on."""
        return _range(self.units_N, unit) != slice(0, 0)

    def has_prompt(self, form: int, answer: int) -> bool:
        """Whether a prompt of this form was trained on, and not with an answer that differs in case alone."""
        for theirs in self.answers_N[_range(self.forms_N, form)].tolist():
            if theirs == answer or theirs >> 32 != answer >> 32:
                return True
        return False

    def has_near(self, runs_R: np.ndarray, template_C: np.ndarray, numbers_hash: int) -> bool:
        """Whether a prompt has the same numbers and at least `LIKENESS` of the shingles in common.

        Args:
            runs_R: All shingles of a held-out prompt.
            template_C: Those of its own domain's template.
            numbers_hash: Hash of its numbers.
        """
        templates = np.union1d(template_C, self.prompts.template_C)
        own_R = without(runs_R, templates)
        if len(own_R) < FEWEST_SHINGLES or not len(self.hashes_M):
            return False
        lows = np.searchsorted(self.hashes_M, own_R, side="left")
        highs = np.searchsorted(self.hashes_M, own_R, side="right")
        places = [self.rows_M[low:high] for low, high in zip(lows, highs, strict=True) if high > low]
        if not places:
            return False
        rows, shared = np.unique(np.concatenate(places), return_counts=True)
        like = (shared >= LIKENESS * FEWEST_SHINGLES) & (self.prompts.numbers_N[rows] == numbers_hash)
        return any(self._likeness(row, own_R, template_C) >= LIKENESS for row in rows[like].tolist())

    def _likeness(self, row: int, own_R: np.ndarray, template_C: np.ndarray) -> float:
        """Estimate of the Jaccard similarity, over the hashes that the row's sketch is complete for; 0 for too few."""
        start, end = (int(self.prompts.ends_N[row - 1]) if row else 0), int(self.prompts.ends_N[row])
        theirs = without(self.prompts.sketches_S[start:end], template_C)
        mine = own_R[own_R <= self.prompts.limits_N[row]]
        both = len(np.intersect1d(mine, theirs, assume_unique=True))
        either = len(mine) + len(theirs) - both
        return both / either if either >= FEWEST_SHINGLES else 0.0


def _range(sorted_M: np.ndarray, value: int) -> slice:
    """The range of a value in a sorted array; empty at 0 where the value is absent."""
    wanted = sorted_M.dtype.type(value)
    low, high = (int(np.searchsorted(sorted_M, wanted, side=side)) for side in ("left", "right"))
    return slice(low, high) if high > low else slice(0, 0)
