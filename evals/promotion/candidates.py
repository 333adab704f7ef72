"""Selects a run's best merge: MOPD, unless another is shown better on the mean of the experts' domains."""

from dataclasses import dataclass

import numpy as np

from evals.comparison.results import BASELINES, STUDENT, VARIANTS, Results
from evals.statistics.tests_of_scores import holm, mean_superiority


@dataclass(frozen=True)
class Rival:
    """A merge of the same experts beside MOPD.

    Attributes:
        name: `baselines/NAME` or `variants/NAME`.
        gain: Its mean score over the experts' domains less MOPD's, on the same examples; a share.
        p_value: One-sided p-value of a gain above 0, after Holm's correction over all scored rivals.
        level: The p-value must be below it.
    """

    name: str
    gain: float
    p_value: float
    level: float

    @property
    def shown(self) -> bool:
        """Whether the rival is significantly better for new examples."""
        return self.p_value < self.level


def rivals(results: Results) -> list[Rival]:
    """The run's other merges that were scored on every expert's domain, the highest gain first.

    The level is one tail of the results' intervals, (1 - confidence) / 2, as everywhere in the gate. The probability of
    any false claim among all rivals is at most this level.
    """
    pairs = {name: whole for name in results.checkpoints if (whole := _pairs(results, name))}
    p_values = holm({name: mean_superiority(pairs[name]) for name in pairs})
    level = (1 - results.confidence) / 2
    found = [Rival(name, _gain(pairs[name]), p_value, level) for name, p_value in p_values.items()]
    return sorted(found, key=lambda rival: -rival.gain)


def _pairs(results: Results, name: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """domain -> scores of a rival and of MOPD; empty for another checkpoint, or where a domain was not scored."""
    if not name.startswith((BASELINES, VARIANTS)):
        return {}
    aligned = {domain: results.aligned([name, STUDENT], domain) for domain in results.expert_domains}
    whole = {domain: (found[0], found[1]) for domain, found in aligned.items() if found}
    return whole if len(whole) == len(aligned) else {}


def _gain(pairs: dict[str, tuple[np.ndarray, np.ndarray]]) -> float:
    return float(np.mean([a_SN.mean() - b_SN.mean() for a_SN, b_SN in pairs.values()]))
