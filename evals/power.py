"""How many examples a paired comparison needs, before anything is measured. Closed forms, without numpy."""

from collections.abc import Mapping
from math import ceil, sqrt
from statistics import NormalDist

from evals.claim_config import EXAMPLE_MEASURES, HypothesisConfig

POWER = 0.8
# Two binary scores of one example that are independent, each right half the time: the variance of their difference is
# 2 p (1 - p) <= 1/2. Scores of related checkpoints correlate, so theirs is smaller.
BINARY_SD = sqrt(0.5)


def resolved(examples: int, confidence: float = 0.95, sd: float = BINARY_SD) -> float:
    """Half the width of the two-sided normal interval of a mean paired difference: z sd / sqrt(n).

    Args:
        examples: How many examples are scored, n.
        confidence: Two-sided level of the interval.
        sd: Standard deviation of the difference of an example.
    """
    _check(confidence, sd)
    if examples < 1:
        raise ValueError("no examples")
    return _upper(confidence) * sd / sqrt(examples)


def examples_needed(margin: float, confidence: float = 0.95, power: float = POWER, sd: float = BINARY_SD) -> int:
    """Examples for which two equal checkpoints are shown non-inferior with probability `power`.

    n = ((z_(1 - alpha) + z_power) sd / margin)^2 with alpha = (1 - confidence) / 2, for the gate takes the lower bound
    of a two-sided interval (Julious 2004, Statistics in Medicine 23:1921, normal approximation, true difference 0).

    Args:
        margin: Allowed deficit, as a share.
        confidence: Two-sided level of the interval.
        power: Wanted probability of showing it.
        sd: Standard deviation of the difference of an example.

    Raises:
        ValueError: an argument is out of range.
    """
    _check(confidence, sd)
    if not (margin > 0 and 0.5 <= power < 1):
        raise ValueError(f"margin must be above 0 and power in [0.5, 1): {margin}, {power}")
    return ceil(((_upper(confidence) + NormalDist().inv_cdf(power)) * sd / margin) ** 2)


def equivalence_needed(margin: float, alpha: float = 0.05, power: float = POWER, sd: float = BINARY_SD) -> int:
    """Examples for which two equal checkpoints are shown equivalent (TOST) with probability `power`.

    n = ((z_(1 - alpha) + z_(1 - beta / 2)) sd / margin)^2 with beta = 1 - power (Julious 2004, as above, for a true
    difference of 0: both one-sided tests must succeed, so beta is shared between them).

    Args:
        margin: The difference either way that still counts as none, as a share.
        alpha: Level of each one-sided test.
        power: Wanted probability of showing it.
        sd: Standard deviation of the difference of an example.

    Raises:
        ValueError: an argument is out of range.
    """
    _check(1 - 2 * alpha, sd)
    if not (margin > 0 and 0.5 <= power < 1):
        raise ValueError(f"margin must be above 0 and power in [0.5, 1): {margin}, {power}")
    quantiles = NormalDist().inv_cdf(1 - alpha) + NormalDist().inv_cdf(1 - (1 - power) / 2)
    return ceil((quantiles * sd / margin) ** 2)


def margin_notes(hypotheses: Mapping[str, HypothesisConfig], confidence: float) -> list[str]:
    """What the plan says of the margins of a run's hypotheses: a line for each kind of test and margin."""
    wanted: dict[tuple[str, float], list[str]] = {}
    for key, hypothesis in hypotheses.items():
        for name, test in hypothesis.tests.items():
            if test.margin and not test.fit and test.measure in EXAMPLE_MEASURES:
                kind = "equivalence" if test.expect == "within" else "non-inferiority"
                wanted.setdefault((kind, test.margin), []).append(f"{key}.{name}")
    lines = []
    for (kind, margin), tests in wanted.items():
        both = kind == "equivalence"
        needed = equivalence_needed(margin) if both else examples_needed(margin, confidence)
        lines.append(
            f"hypotheses {', '.join(tests)}: {kind} within {margin:g} needs n ≥ {needed} for {100 * POWER:g} % power "
            f"at equal scores (one seed, same assumption)."
        )
    return lines


def precision_notes(examples: int, margin: float, confidence: float) -> list[str]:
    """What the plan says of a run's examples and margin, with the assumption it rests on.

    A warning follows where the interval's half-width reaches the margin: then a student equal to its teacher fails the
    gate at least half the time.
    """
    lines = [
        f"evaluate.examples {examples} resolves about ±{100 * resolved(examples, confidence):.1f} points "
        f"at {100 * confidence:g} % in a domain; gate.non_inferiority_margin {margin:g} needs n ≥ "
        f"{examples_needed(margin, confidence)} for {100 * POWER:g} % power at equal scores "
        f"(assumed: binary scores, sd {BINARY_SD:.2f} of a paired difference, one seed)."
    ]
    if resolved(examples, confidence) >= margin:
        lines.append(
            "warning: evaluate.examples is too small for gate.non_inferiority_margin: under that assumption a student "
            "as good as its teacher fails at least half the time"
        )
    return lines


def _upper(confidence: float) -> float:
    return NormalDist().inv_cdf((1 + confidence) / 2)


def _check(confidence: float, sd: float) -> None:
    if not (0 < confidence < 1 and sd > 0):
        raise ValueError(f"confidence must be in (0, 1) and sd above 0: {confidence}, {sd}")
