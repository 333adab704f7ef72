"""Find held-out examples in what a checkpoint was trained on: the same unit, the same prompt, or a near copy.

Shape suffixes as in `stages.rows.trained_on`; `R` shingles of one prompt, `M` hashes of all sketches in order,
`G` groups and one more.
"""

from collections.abc import Sequence

import numpy as np

from experts.data.normal_form import normal_form, numbers, short_hash
from experts.domain import Domain, Example
from stages.rows.shingles import FEWEST_SHINGLES, shingles, template_shingles, without
from stages.rows.trained_on import TrainedOn, answer_hash, unit_hash

UNIT, PROMPT, NEAR, NONE = "unit", "prompt", "near", ""
# Jaccard similarity of two prompts' shingles, the templates' left out, from which on one is a near copy of the other.
LIKENESS = 0.7


class Copies:
    """Looks for copies in what a checkpoint was trained on.

    All groups share one index, so a search costs about the same for one domain as for hundreds.

    Args:
        trained: What it was trained on in all domains, its ancestors included.
    """

    def __init__(self, trained: TrainedOn) -> None:
        self._groups = list(trained.groups.values())
        counts = [len(prompts.numbers_N) for prompts in self._groups]
        # The index of the first prompt of each group among the prompts of all.
        self._starts_G = np.cumsum([0, *counts])
        self._units_N = np.unique(_joined([prompts.units_N for prompts in self._groups]))
        forms_N = _joined([prompts.forms_N for prompts in self._groups])
        by_form_N = np.argsort(forms_N, kind="stable")
        self._forms_N = forms_N[by_form_N]
        self._answers_N = _joined([prompts.answers_N for prompts in self._groups])[by_form_N]
        self._numbers_N = _joined([prompts.numbers_N for prompts in self._groups])
        hashes_S = _joined([prompts.sketches_S for prompts in self._groups])
        by_hash_M = np.argsort(hashes_S, kind="stable")
        self._hashes_M = hashes_S[by_hash_M]
        lengths_N = _joined([np.diff(prompts.ends_N, prepend=0) for prompts in self._groups]).astype(np.int64)
        self._rows_M = np.repeat(np.arange(len(lengths_N)), lengths_N)[by_hash_M]

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
        if _range(self._units_N, unit) != slice(0, 0):
            return UNIT
        if self._has_prompt(short_hash(form), answer):
            return PROMPT
        return NEAR if self._has_near(without(runs_R, template_C), template_C, short_hash(numbers(form))) else NONE

    def _has_prompt(self, form: int, answer: int) -> bool:
        """Whether a prompt of this form was trained on with an answer that differs in more than case, or not at all."""
        theirs = self._answers_N[_range(self._forms_N, form)].tolist()
        return any(other == answer or other >> 32 != answer >> 32 for other in theirs)

    def _has_near(self, own_R: np.ndarray, template_C: np.ndarray, numbers_hash: int) -> bool:
        """Whether a prompt has the same numbers and at least `LIKENESS` of the shingles in common.

        Args:
            own_R: The shingles of a held-out prompt without those of its own domain's template.
            template_C: Those of that template.
            numbers_hash: Hash of its numbers.
        """
        if len(own_R) < FEWEST_SHINGLES or not len(self._hashes_M):
            return False
        lows = np.searchsorted(self._hashes_M, own_R, side="left")
        highs = np.searchsorted(self._hashes_M, own_R, side="right")
        places = [self._rows_M[low:high] for low, high in zip(lows, highs, strict=True) if high > low]
        if not places:
            return False
        rows, shared = np.unique(np.concatenate(places), return_counts=True)
        like = (shared >= LIKENESS * FEWEST_SHINGLES) & (self._numbers_N[rows] == numbers_hash)
        return any(self._likeness(row, own_R, template_C) >= LIKENESS for row in rows[like].tolist())

    def _likeness(self, row: int, own_R: np.ndarray, template_C: np.ndarray) -> float:
        """Estimate of the Jaccard similarity, over the hashes that the row's sketch is complete for; 0 for too few."""
        group = int(np.searchsorted(self._starts_G, row, side="right")) - 1
        prompts, within = self._groups[group], row - int(self._starts_G[group])
        start, end = (int(prompts.ends_N[within - 1]) if within else 0), int(prompts.ends_N[within])
        theirs = without(prompts.sketches_S[start:end], template_C)
        mine = without(own_R, prompts.template_C)
        if len(mine) < FEWEST_SHINGLES:
            return 0.0
        mine = mine[mine <= prompts.limits_N[within]]
        both = len(np.intersect1d(mine, theirs, assume_unique=True))
        either = len(mine) + len(theirs) - both
        return both / either if either >= FEWEST_SHINGLES else 0.0


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    """The parts end to end; empty where there are none."""
    return np.concatenate([np.array([], dtype=np.uint64 if not parts else parts[0].dtype), *parts])


def _range(sorted_M: np.ndarray, value: int) -> slice:
    """The range of a value in a sorted array; empty at 0 where the value is absent."""
    wanted = sorted_M.dtype.type(value)
    low, high = (int(np.searchsorted(sorted_M, wanted, side=side)) for side in ("left", "right"))
    return slice(low, high) if high > low else slice(0, 0)
