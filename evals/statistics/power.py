"""The number of examples that a paired comparison needs, before anything is measured. Closed forms, without numpy."""

from collections.abc import Mapping
from math import ceil, sqrt
from statistics import NormalDist

from evals.config.claims import EXAMPLE_MEASURES, HypothesisConfig

POWER = 0.8
# Examples that are added in every interval of a difference, half of them won and half lost; see
# `evals.statistics.crossed_effects`.
MADE_UP = 4
# For two independent binary scores of one example, each right half the time: the variance of their difference is 2 p (1
# - p) <= 1/2. Scores of related checkpoints correlate, so that their variance is smaller.
BINARY_SD = sqrt(0.5)
# For a student and a teacher whose answers agree on nine of ten examples.
RELATED_SD = sqrt(0.1)


def resolved(examples: int, confidence: float = 0.95, sd: float = BINARY_SD) -> float:
    """Half the width of the two-sided normal interval of a mean paired difference: z sqrt(sd² / n + MADE_UP / n²).

    Args:
        examples: The number of examples scored, n.
        confidence: Two-sided level of the interval.
        sd: Standard deviation of the difference of an example.
    """
    _check(confidence, sd)
    if examples < 1:
        raise ValueError("no examples")
    return _upper(confidence) * sqrt(sd**2 / examples + MADE_UP / examples**2)


def fewest_examples(margin: float, confidence: float = 0.95) -> int:
    """The number of examples below which not even equal answers show a candidate within the margin."""
    _check(confidence, BINARY_SD)
    if margin <= 0:
        raise ValueError(f"margin must be above 0: {margin}")
    examples = max(2, ceil(_upper(confidence) * sqrt(MADE_UP) / margin))
    while _student(_upper(confidence), examples - 1) * sqrt(MADE_UP) / examples >= margin:
        examples += 1
    return examples


def examples_needed(
    margin: float, confidence: float = 0.95, power: float = POWER, sd: float = BINARY_SD, domains: int = 1
) -> int:
    """The number of examples per domain with which two equal checkpoints are shown non-inferior on all domains.

    The n at which (z_(1 - alpha) + z_p) sqrt(sd² / n + MADE_UP / n²) is the margin, with alpha = (1 - confidence) / 2,
    because the gate takes the lower bound of a two-sided interval (Julious 2004, Statistics in Medicine 23:1921, normal
    approximation, true difference 0). Domains share no examples, so each must pass with p = power^(1 / domains).

    Args:
        margin: Allowed deficit, as a share.
        confidence: Two-sided level of the interval.
        power: Wanted probability of showing it on all domains.
        sd: Standard deviation of the difference of an example.
        domains: How many domains must pass.

    Raises:
        ValueError: an argument is out of range.
    """
    _check(confidence, sd)
    if not (margin > 0 and 0.5 <= power < 1):
        raise ValueError(f"margin must be above 0 and power in [0.5, 1): {margin}, {power}")
    quantiles = _upper(confidence) + NormalDist().inv_cdf(power ** (1 / domains))
    return _size(quantiles / margin, sd)


def power_of(examples: int, margin: float, confidence: float = 0.95, sd: float = BINARY_SD, domains: int = 1) -> float:
    """Probability that equal checkpoints are shown non-inferior on all domains; see `examples_needed`."""
    error = resolved(examples, confidence, sd) / _upper(confidence)
    return float(NormalDist().cdf(margin / error - _upper(confidence)) ** domains)


def equivalence_needed(margin: float) -> int:
    """The number of examples with which two equal checkpoints are shown equivalent (TOST) with probability `POWER`.

    As `examples_needed`, with z_(1 - beta / 2) in place of z_p, beta = 1 - POWER (Julious 2004, as above, for a true
    difference of 0: both one-sided tests must succeed, so beta is shared between them). Each is at level 0.05.

    Args:
        margin: The largest difference, either way, that still counts as none, as a share.

    Raises:
        ValueError: the margin is not above 0.
    """
    if margin <= 0:
        raise ValueError(f"margin must be above 0: {margin}")
    quantiles = NormalDist().inv_cdf(0.95) + NormalDist().inv_cdf(1 - (1 - POWER) / 2)
    return _size(quantiles / margin, BINARY_SD)


def margin_notes(hypotheses: Mapping[str, HypothesisConfig], confidence: float) -> list[str]:
    """The plan's lines on the margins of a run's hypotheses, one for each kind of test and margin."""
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


def precision_notes(examples: int, margin: float, confidence: float, domains: int = 1) -> list[str]:
    """The plan's lines on a run's examples and margin, with the assumption behind them.

    A warning follows if a student equal to its teachers, with related answers, is more likely to fail the gate than to
    pass it, and another if it cannot pass.

    Args:
        examples: Held-out examples of a domain.
        margin: Allowed deficit to each teacher.
        confidence: Two-sided level of the intervals.
        domains: Domains with a teacher.
    """
    chances = [power_of(examples, margin, confidence, sd, domains) for sd in (RELATED_SD, BINARY_SD)]
    wanted = examples_needed(margin, confidence, domains=domains)
    together = "its teacher passes" if domains == 1 else f"its teachers passes on all {domains} domains"
    lines = [
        f"evaluate.examples {examples} resolves about ±{100 * resolved(examples, confidence):.1f} points at "
        f"{100 * confidence:g} % in a domain. At gate.non_inferiority_margin {margin:g} a student equal to {together} "
        f"in {100 * chances[0]:.0f} of 100 runs if their answers agree on nine of ten examples, in "
        f"{100 * chances[1]:.0f} if they are independent, for which n ≥ {wanted} would make it {100 * POWER:g} "
        f"(assumed: binary scores, one seed)."
    ]
    if examples < (fewest := fewest_examples(margin, confidence)):
        lines.append(
            f"warning: evaluate.examples {examples} can show nothing within gate.non_inferiority_margin {margin:g}: "
            f"that needs {fewest} examples, even with equal answers"
        )
    elif chances[0] < 0.5:
        lines.append(
            "warning: evaluate.examples is too small for gate.non_inferiority_margin: even if their answers agree on "
            "nine of ten examples, a student equal to its teachers fails at least half the time"
        )
    return lines


def _size(scale: float, sd: float) -> int:
    """The smallest n with scale² (sd² / n + MADE_UP / n²) ≤ 1: the root of a quadratic equation."""
    seen = scale**2 * sd**2
    return ceil((seen + sqrt(seen**2 + 4 * MADE_UP * scale**2)) / 2)


def _student(z: float, freedom: int) -> float:
    """Student's t at a normal quantile: four terms of the series of Fisher & Cornish (1960, Technometrics 2:209)."""
    powers = [z**odd for odd in (1, 3, 5, 7, 9)]
    terms = (
        (powers[1] + z) / 4,
        (5 * powers[2] + 16 * powers[1] + 3 * z) / 96,
        (3 * powers[3] + 19 * powers[2] + 17 * powers[1] - 15 * z) / 384,
        (79 * powers[4] + 776 * powers[3] + 1482 * powers[2] - 1920 * powers[1] - 945 * z) / 92160,
    )
    return z + sum(term / freedom**order for order, term in enumerate(terms, 1))


def _upper(confidence: float) -> float:
    return NormalDist().inv_cdf((1 + confidence) / 2)


def _check(confidence: float, sd: float) -> None:
    if not (0 < confidence < 1 and sd >= 0):
        raise ValueError(f"confidence must be in (0, 1) and sd not negative: {confidence}, {sd}")
