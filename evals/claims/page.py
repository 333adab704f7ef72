"""The results of a run's hypotheses for readers: a table of the report, and the page of claims as Markdown."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evals.claims.findings import findings
from evals.claims.measures import domains_of
from evals.claims.verdicts import Finding
from evals.comparison.results import BASELINES, STUDENT, VARIANTS, Results
from evals.config.claims import EXAMPLE_MEASURES, ComparisonConfig
from evals.tables.grid import ABSENT, Grid
from evals.tables.templates import text

UNITS = {
    "kl_start": ("KL from the start", "nats a token", 1.0, 3),
    "kl_policy": ("KL to the start", "nats a token", 1.0, 3),
    "entropy": ("entropy", "nats a token", 1.0, 3),
    "length": ("length", "tokens", 1.0, 1),
    "repetition": ("repetition", "compression", 1.0, 2),
    "changed_bfloat16": ("weights changed at bfloat16", "%", 100.0, 1),
    "changed_float32": ("weights changed at float32", "%", 100.0, 1),
    "rounded_away": ("weights changed at float32 less those at bfloat16", "%", 100.0, 1),
    "seconds": ("seconds", "s", 1.0, 1),
    "tokens": ("tokens trained on", "k", 1e-3, 0),
    "score": ("greedy score", "points", 100.0, 1),
    "sampled": ("score of sampled completions", "points", 100.0, 1),
    "passes": ("share with a score above 0", "points", 100.0, 1),
    "drop": ("drop from the start", "points", 100.0, 1),
}


@dataclass(frozen=True)
class Judged:
    """A run whose hypotheses were tested.

    Attributes:
        file: The run file.
        results: Its results.
        found: Its findings.
    """

    file: Path
    results: Results
    found: Sequence[Finding]


def hypotheses_grid(results: Results) -> Grid | None:
    """A row for every test of the run's hypotheses; None where there are none."""
    if not results.hypotheses:
        return None
    rows = [
        (
            f"{one.hypothesis} {one.test}",
            what(results, one.config),
            expectation(one),
            measured(one),
            p_of(one),
            one.label,
        )
        for one in findings(results, results.hypotheses)
    ]
    head = ("hypothesis", "compared", "expected", "measured", "p", "verdict")
    return Grid("Hypotheses in the run file (p after Holm's correction)", head, tuple(rows))


def what(results: Results, test: ComparisonConfig) -> str:
    """The comparison of a test, in words."""
    title = UNITS[test.measure][0]
    if test.measure in EXAMPLE_MEASURES or test.measure.startswith(("kl", "entropy", "length", "repetition")):
        split = ", unseen kind" if test.split != "held_out" else ""
        title = f"{title} on {', '.join(domains_of(results, test))}{split}"
    if test.compare:
        return f"{short(test.compare[0])} − {short(test.compare[1])}: {title}"
    if test.slope:
        settings = ", ".join(f"{short(name)} at {setting:g}" for name, setting in test.slope.items())
        return f"slope of {title} over {settings}"
    if test.contrast:
        return f"{' '.join(f'{weight:+.3g} {short(name)}' for name, weight in test.contrast.items())}: {title}"
    assert test.fit is not None
    return (
        f"R² of {title} as a quadratic of {UNITS[test.fit.x][0]} on {', '.join(test.fit.x_domains)}, "
        f"{len(test.checkpoints)} checkpoints"
        + (f", {len(test.fit.groups)} of them independent" if len(test.fit.groups) < len(test.checkpoints) else "")
    )


def expectation(finding: Finding) -> str:
    """The expectation of a test, with the margin in the measure's unit."""
    test = finding.config
    margin = f"{test.margin:g}" if test.fit else _number(test.margin, test)
    return {
        "above": f"above {margin}" if test.fit else "above 0",
        "below": "below 0",
        "within": f"within ±{margin}",
        "not_below": f"above -{margin}",
        "not_above": f"below +{margin}",
    }[test.expect]


def measured(finding: Finding) -> str:
    """The estimate with its bounds and unit."""
    value, test = finding.interval, finding.config
    if value is None:
        return ABSENT
    if test.fit:
        return f"{value.mean:.2f} [{value.low:.2f}, {value.high:.2f}]"
    unit = UNITS[test.measure][1]
    per = " per unit" if test.slope else ""
    mean, low, high = (_number(bound, test, True) for bound in (value.mean, value.low, value.high))
    return f"{mean} [{low}, {high}] {unit}{per}"


def p_of(finding: Finding) -> str:
    """Holm's p-value of the expectation, or of its opposite if that is smaller."""
    p, other = finding.p, finding.opposite_p
    if p is None or other is None:
        return ABSENT
    value = min(p, other)
    return f"{'opposite: ' if other < p else ''}{'<0.001' if value < 0.001 else f'{value:.3f}'}"


def claims_page(tested: Sequence[Judged], intro: str, figures: Mapping[str, Path]) -> str:
    """The page of claims: an overview with figures, then each claim with its tests and values.

    Args:
        tested: The runs, in the order of the page.
        intro: How the page was made, as Markdown.
        figures: Title -> path of an image, relative to the page.
    """
    claims: dict[str, str] = {}
    for run in tested:
        for key, hypothesis in run.results.hypotheses.items():
            claims.setdefault(_claim(key), hypothesis.claim)
    verdicts = [(_claim(one.hypothesis), run.file, one) for run in tested for one in run.found]
    return (
        text(
            "evals.claims",
            "claims.md",
            intro=intro,
            figures=figures,
            claims={claim: claims[claim] for claim in sorted(claims, key=_number_of)},
            verdicts={claim: [(file, one) for its, file, one in verdicts if its == claim] for claim in claims},
            sections=[_section(run, key) for run in tested for key in run.results.hypotheses],
            what=what,
            expectation=expectation,
            measured=measured,
            p_of=p_of,
            marked=_marked,
        )
        + "\n"
    )


def by_hypothesis(tested: Sequence[Judged]) -> dict[str, list[Finding]]:
    """Hypothesis with its run file, in the claims' order -> its findings."""
    keys = [(_number_of(_claim(key)), key, run) for run in tested for key in run.results.hypotheses]
    keys.sort(key=lambda each: each[0])
    return {f"{key} ({run.file.stem})": [one for one in run.found if one.hypothesis == key] for _, key, run in keys}


def _section(run: Judged, key: str) -> dict[str, Any]:
    """A run's tests of one claim, and each checkpoint's own value."""
    own = [one for one in run.found if one.hypothesis == key]
    examples = max((one.examples for one in own), default=0)
    size = f"{max((one.seeds for one in own), default=0)} seeds"
    size += f", {examples} independent examples a domain and seed" if examples else ""
    shown = {"claim": _claim(key), "key": key, "hypothesis": run.results.hypotheses[key], "file": run.file}
    return {**shown, "results": run.results, "found": own, "size": size, "lines": _values(own)}


def _marked(finding: Finding) -> str:
    """The verdict as Markdown; `shown` and `contradicted` are bold."""
    return f"**{finding.label}**" if finding.verdict in ("shown", "contradicted") else finding.label


def _values(own: Sequence[Finding]) -> list[str]:
    """Each checkpoint's own value, and the start's score: a start near 0 or 100 % leaves little to see."""
    lines = []
    for one in own:
        if not one.values:
            continue
        start = "" if one.start is None else f"; the start scores {100 * one.start:.1f} %"
        if one.coefficients:
            squared, linear, constant = one.coefficients
            values = f"y = {squared:.4g} x² {linear:+.4g} x {constant:+.4g}, y as a share"
            lines.append(f"{one.test.replace('_', ' ')}: {values}{start}")
            continue
        unit = UNITS[one.config.measure][1].replace("points", "%")
        values = ", ".join(f"{short(name)} {_number(value, one.config)}" for name, value in one.values.items())
        lines.append(f"{one.test.replace('_', ' ')}: {values} ({unit}; {UNITS[one.config.measure][0]}){start}")
    return list(dict.fromkeys(lines))


def _number(value: float, test: ComparisonConfig, signed: bool = False) -> str:
    _, _, scale, digits = UNITS[test.measure]
    return f"{value * scale:{'+' if signed else ''}.{digits}f}"


def short(name: str) -> str:
    """A checkpoint's name for readers: `expert sort`, `student half`, `baseline ties`."""
    for prefix, role in (("experts/", "expert"), (VARIANTS, STUDENT), (BASELINES, "baseline")):
        if name.startswith(prefix):
            return f"{role} {name.removeprefix(prefix).replace('_', ' ')}"
    return name.replace("_", " ")


def _claim(key: str) -> str:
    """The claim that a hypothesis belongs to: `C1` of `C1_spelling`."""
    return key.partition("_")[0]


def _number_of(claim: str) -> tuple[int, str]:
    digits = "".join(filter(str.isdigit, claim))
    return int(digits) if digits else 0, claim
