"""Shingles, hashes of word runs: the likeness of two long prompts is the share of their common shingles (Broder 1997).

Shape suffixes: `W` words, `R` runs.
"""

import re
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from experts.data.normal_form import short_hash

# Consecutive words of a shingle.
SHINGLE_WORDS = 3
# With fewer shingles, a share of them is not meaningful.
FEWEST_SHINGLES = 16
# A shingle of more prompts than this, and of more than this share of them, belongs to their template.
FEW_PROMPTS, SHARE_OF_PROMPTS = 2, 0.01
_WORD = re.compile(r"\w+|[^\w\s]+")
_MIX = np.uint64(0x9E3779B97F4A7C15)


def shingles(form: str) -> np.ndarray:
    """32-bit hashes of all runs of `SHINGLE_WORDS` words of a normal form, in ascending order."""
    words_W = np.array([_word_hash(word) for word in _WORD.findall(form)], dtype=np.uint64)
    runs_R = np.zeros(max(0, len(words_W) - SHINGLE_WORDS + 1), dtype=np.uint64)
    for place in range(SHINGLE_WORDS if len(runs_R) else 0):
        # The factor is odd, so that the order of words counts; the high bits are the well-mixed ones.
        runs_R = (runs_R ^ words_W[place : place + len(runs_R)]) * _MIX
        runs_R ^= runs_R >> np.uint64(29)
    return np.unique((runs_R >> np.uint64(32)).astype(np.uint32))


def template_shingles(prompts: Sequence[np.ndarray]) -> np.ndarray:
    """The shingles of a domain's template: those that many of its prompts have."""
    if not prompts:
        return np.empty(0, dtype=np.uint32)
    runs, counts = np.unique(np.concatenate(prompts), return_counts=True)
    return runs[counts > max(FEW_PROMPTS, SHARE_OF_PROMPTS * len(prompts))]


def without(runs_R: np.ndarray, left_out_C: np.ndarray) -> np.ndarray:
    """The runs that are not in `left_out_C`; both are in ascending order."""
    if not len(left_out_C):
        return runs_R
    nearest_R = left_out_C[np.searchsorted(left_out_C, runs_R).clip(max=len(left_out_C) - 1)]
    return runs_R[nearest_R != runs_R]


@lru_cache(maxsize=2**18)
def _word_hash(word: str) -> int:
    return short_hash(word)
